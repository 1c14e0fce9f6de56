"""An engine, the ranks that hold its KV, and the pools that bound it: made, started and stopped as one."""

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import structlog

from hexgen2.config import VllmEngineConfig, WorkerConfig
from hexgen2.engine.base import Engine
from hexgen2.engine.make import make_engine
from hexgen2.errors import EngineFailed
from hexgen2.kv.pool import PagePool
from hexgen2.kv.ranks import Ranks
from hexgen2.plan import Role
from hexgen2.security.tls import load_tls
from hexgen2.worker.aio import PageQueue
from hexgen2.worker.relay import Relay

log = structlog.get_logger(__name__)

#: From the engine's start to the last agent's hello; agents connect while the engine starts.
AGENTS_TIMEOUT_S = 30.0


class Pools:
    """Send buffers and staging, each one pool for all ranks: page numbers are the same on each, so the rank with the
    fewest pages bounds it.
    """

    def __init__(self, ranks: Ranks, max_queued: int) -> None:
        hellos, page_bytes = ranks.hellos, sum(hello.page_bytes for hello in ranks.hellos)
        self._queues: dict[str, PageQueue] = {}
        for name, num_pages in (
            ("send", min(hello.send_pages for hello in hellos)),
            ("staging", min(hello.staging_pages for hello in hellos)),
        ):
            if num_pages:
                self._queues[name] = PageQueue(PagePool(name, num_pages, max_queued), page_bytes)

    @property
    def send(self) -> PageQueue:
        """Of a worker that prefills."""
        return self._queues["send"]

    @property
    def staging(self) -> PageQueue:
        """Of a worker that decodes."""
        return self._queues["staging"]

    @property
    def num_waiting(self) -> int:
        """Requests in line, in all."""
        return sum(queue.num_waiting for queue in self._queues.values())

    def max_tokens(self, name: str) -> int:
        """Of one prompt that ``send`` or ``staging`` holds; 0: there is none."""
        return self._queues[name].max_tokens if name in self._queues else 0

    @property
    def bytes_total(self) -> int:
        """Of all."""
        return sum(queue.bytes_total for queue in self._queues.values())

    def of(self, role: Role) -> PageQueue:
        """The one that bounds a role."""
        return self.send if role is Role.PREFILL else self.staging


@dataclass(slots=True)
class Loading:
    """What ``loading`` yields. ``pools`` are there once ``start`` has returned."""

    engine: Engine
    ranks: Ranks
    num_ranks: int
    max_queued: int
    #: To the other machines, where the ranks are on several.
    relay: Relay | None = None
    pools: Pools | None = None

    async def start(self) -> Pools:
        """Wait for the other machines, load the model and wait for every rank.

        Raises:
            EngineFailed: the engine did not start, or another machine was lost meanwhile.
            ConfigError: it cannot be started as it is configured.
        """
        if self.relay is None:
            await self.engine.start()
        else:
            log.info("waiting_for_nodes")
            await self.relay.wait_complete()
            await _start_with(self.engine, self.relay)
        await self.ranks.wait_complete(AGENTS_TIMEOUT_S)
        self.pools = Pools(self.ranks, self.max_queued)
        return self.pools


async def _start_with(engine: Engine, relay: Relay) -> None:
    """Start an engine that has ranks behind ``relay``; it would wait for them long after they are gone."""
    starting, lost = asyncio.ensure_future(engine.start()), asyncio.ensure_future(relay.lost())
    try:
        await asyncio.wait((starting, lost), return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            raise EngineFailed("another machine of this replica was lost while the engine started")
        starting.result()
    finally:
        lost.cancel()
        starting.cancel()
        await asyncio.wait((starting, lost))


@asynccontextmanager
async def loading(config: WorkerConfig) -> AsyncIterator[Loading]:
    """The engine of a worker and its ranks, not yet started; whatever of them runs is stopped at the end."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hexgen2-")))
        engine, num_ranks = make_engine(config, folder / "kv.sock")
        ranks = Ranks(folder / "kv.sock", num_ranks)
        await ranks.start()
        stack.push_async_callback(ranks.stop)
        relay = None
        if config.nodes_listen:
            nnodes = config.engine.nnodes if isinstance(config.engine, VllmEngineConfig) else 1
            relay = Relay(config.nodes_listen, ranks.socket_path, load_tls(config.tls), nnodes - 1)
            await relay.start()
            stack.push_async_callback(relay.stop)
        stack.push_async_callback(engine.stop)
        stack.callback(ranks.expect_end)
        yield Loading(engine, ranks, num_ranks, config.kv.max_queued, relay)
