"""A machine with further ranks of a replica whose first machine has the worker: it lives and ends with that worker.

The ranks are vLLM's own (``engine.vllm_node``, in a process of its own), bound together by its multi-node executor.
Their KV agents reach the worker through ``worker.relay``.
"""

import asyncio
import os
import signal
import sys
import tempfile
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import structlog

from hexgen2 import telemetry
from hexgen2.config import NodeConfig
from hexgen2.errors import EngineFailed
from hexgen2.kv.choose import transport_name
from hexgen2.rpc.server import run_until_signal
from hexgen2.security.tls import TlsFiles, load_tls
from hexgen2.worker.aio import owned
from hexgen2.worker.relay import LIFE, Streams, carrying, dial

log = structlog.get_logger(__name__)

#: The process of the ranks; its configuration and the agents' socket follow.
RANKS = (sys.executable, "-m", "hexgen2.engine.vllm_node")
#: Between two attempts to reach a worker that is not there yet.
RETRY_S = 2.0
#: How long the ranks may take to end.
STOP_S = 10.0


async def serve(config: NodeConfig) -> None:
    """Run the ranks until a signal.

    Raises:
        EngineFailed: the worker, or a rank, is gone: whoever started this starts it again.
        ConfigError: KV cannot travel as configured.
    """
    transport_name(config.kv, config.tls)
    tls = load_tls(config.tls)
    failed = ""
    async with AsyncExitStack() as stack:
        stack.callback(telemetry.setup("node", f"{config.replica_id}-{config.engine.node_rank}"))

        async def start() -> None:
            reader, writer = await _leader(config.leader, tls)
            stack.callback(writer.close)
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hexgen2-")))
            await stack.enter_async_context(carrying(folder / "kv.sock", config.leader, tls))
            (folder / "node.json").write_text(config.model_dump_json(), encoding="utf-8")
            ranks = await asyncio.create_subprocess_exec(
                *RANKS,
                str(folder / "node.json"),
                str(folder / "kv.sock"),
                start_new_session=True,
            )
            stack.push_async_callback(_stop, ranks)
            await stack.enter_async_context(owned(watch(reader, ranks)))
            log.info("ranks_started", leader=config.leader, node_rank=config.engine.node_rank, pid=ranks.pid)

        async def watch(reader: asyncio.StreamReader, ranks: asyncio.subprocess.Process) -> None:
            nonlocal failed
            ends = {
                asyncio.ensure_future(_end_of(reader)): f"the worker at {config.leader} is gone",
                asyncio.ensure_future(ranks.wait()): "the ranks have ended",
            }
            try:
                done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for each in ends:
                    each.cancel()
            failed = ends[done.pop()]
            log.error("node_lost", error=failed)
            os.kill(os.getpid(), signal.SIGTERM)

        async def drain() -> None:
            """Nothing: the worker drains, and is stopped first."""

        await run_until_signal(start, drain)
    log.info("stopped")
    if failed:
        raise EngineFailed(failed)


async def _leader(address: str, tls: TlsFiles | None) -> Streams:
    """Wait for the worker: it may be started later than this, or again."""
    said = ""
    while True:
        try:
            return await dial(address, LIFE, tls)
        except OSError as error:
            if str(error) != said:
                said = str(error)
                log.warning("leader_away", leader=address, error=said)
            await asyncio.sleep(RETRY_S)


async def _end_of(reader: asyncio.StreamReader) -> None:
    """Return when the other end is gone, with or without a word."""
    with suppress(OSError):
        await reader.read(1)


async def _stop(ranks: asyncio.subprocess.Process) -> None:
    """End the process and all that it has started."""
    for number, wait_s in ((signal.SIGTERM, STOP_S), (signal.SIGKILL, STOP_S)):
        try:
            os.killpg(ranks.pid, number)
            await asyncio.wait_for(ranks.wait(), wait_s)
        except ProcessLookupError:
            return
        except TimeoutError:
            continue
