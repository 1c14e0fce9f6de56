"""One KV agent with its hub, as either end of ``hexgen2 bench kv`` has it."""

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import torch

from hexgen2.bench.kv_talk import SHAPE, SLICE, Setup
from hexgen2.config import KvConfig
from hexgen2.kv.agent import KvAgent
from hexgen2.kv.choose import make_transports
from hexgen2.kv.ranks import Ranks


@asynccontextmanager
async def agent_up(
    setup: Setup, timeout_s: float, *, send_bytes: int = 0, staging_bytes: int = 0, landing_bytes: int = 0
) -> AsyncIterator[tuple[Ranks, KvAgent]]:
    """Both, connected; stopped at the end."""
    with tempfile.TemporaryDirectory(prefix="hexgen2-") as folder:
        hub = Ranks(Path(folder) / "s", 1)
        await hub.start()
        agent = await asyncio.to_thread(
            KvAgent,
            hub.socket_path,
            SLICE,
            SHAPE,
            make_transports(setup.transport, setup.hosts, setup.devices),
            device=torch.device("cpu"),
            send_bytes=send_bytes,
            staging_bytes=staging_bytes,
            landing_bytes=landing_bytes,
            stall_s=KvConfig().stall_s,
        )
        try:
            await hub.wait_complete(timeout_s)
            yield hub, agent
        finally:
            await hub.stop()
            await asyncio.to_thread(agent.close)
