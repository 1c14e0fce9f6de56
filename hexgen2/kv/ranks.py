"""The service's side of the local socket: one connection per rank's KV agent, requests answered, events delivered.

A replica is whole: when one rank's agent is gone, everything that waits fails and the service is told.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import structlog

from hexgen2 import metrics
from hexgen2.errors import ConfigError, EngineFailed
from hexgen2.kv.messages import (
    Close,
    Closed,
    Counts,
    Failed,
    Fetch,
    Fetched,
    Hello,
    Loaded,
    Opened,
    OpenRecv,
    OpenSend,
    Piece,
    Quarantine,
    Ready,
    Source,
    ToAgent,
    ToService,
    encode,
    service_reader,
)

log = structlog.get_logger(__name__)

#: An agent answers from memory; one that does not within this time is broken.
ANSWER_TIMEOUT_S = 30.0

Event = Ready | Fetched | Failed | Loaded
Listener = Callable[[int, Event], None]

_COUNTERS = {
    "recomputed_tokens": metrics.RECOMPUTED_TOKENS,
    "kv_handshakes_failed": metrics.TLS_HANDSHAKES_FAILED.labels("kv"),
}


@dataclass(slots=True)
class _Rank:
    hello: Hello
    writer: asyncio.StreamWriter


class Ranks:
    """Listens at ``socket_path`` for ``num_ranks`` agents. All methods belong to one event loop."""

    def __init__(self, socket_path: Path, num_ranks: int) -> None:
        self.socket_path = socket_path
        self.num_ranks = num_ranks
        self._ranks: dict[int, _Rank] = {}
        self._complete = asyncio.Event()
        self._lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._listeners: dict[str, Listener] = {}
        self._answers: dict[tuple[type, str], tuple[set[int], asyncio.Future[None]]] = {}
        self._server: asyncio.Server | None = None
        self._quarantine: dict[int, int] = {}
        self._stopping = False

    def expect_end(self) -> None:
        """The engine is about to be stopped: agents that leave are no loss."""
        self._stopping = True

    async def start(self) -> None:
        """Listen. The engine may start its ranks now."""
        self._server = await asyncio.start_unix_server(self._serve, str(self.socket_path))

    async def wait_complete(self, timeout_s: float) -> None:
        """Wait until every rank has said hello.

        Raises:
            EngineFailed: they have not within ``timeout_s``.
        """
        try:
            await asyncio.wait_for(self._complete.wait(), timeout_s)
        except TimeoutError:
            have = len(self._ranks)
            raise EngineFailed(f"{have} of {self.num_ranks} KV agents answered within {timeout_s:.0f} s") from None
        shapes = {hello.shape for hello in self.hellos}
        if len(shapes) != 1:
            raise ConfigError(f"ranks disagree about the shape of the KV: {shapes}")

    @property
    def hellos(self) -> tuple[Hello, ...]:
        """What the ranks said of themselves, by rank."""
        return tuple(self._ranks[rank].hello for rank in sorted(self._ranks))

    @property
    def quarantine_bytes(self) -> int:
        """Over all ranks."""
        return sum(self._quarantine.values())

    async def lost(self) -> str:
        """Return, with the reason, when an agent is gone."""
        return await asyncio.shield(self._lost)

    async def open_send(
        self,
        transfer_id: str,
        token: bytes,
        num_tokens: int,
        codec: str,
        pages: tuple[int, ...],
        listener: Listener,
    ) -> None:
        """Every rank holds ``pages`` for a transfer; ``listener`` hears of its pieces."""
        self._listeners[transfer_id] = listener
        await self._ask(OpenSend(transfer_id, token, num_tokens, codec, pages), Opened)

    async def open_recv(
        self,
        transfer_id: str,
        token: bytes,
        num_tokens: int,
        codec: str,
        dtype: str,
        pages: tuple[int, ...],
        sources: tuple[Source, ...],
        listener: Listener,
    ) -> None:
        """Every rank holds ``pages`` for KV of ``dtype`` from ``sources``; ``listener`` hears how it goes."""
        self._listeners[transfer_id] = listener
        await self._ask(OpenRecv(transfer_id, token, num_tokens, codec, dtype, pages, sources), Opened)

    def fetch(self, transfer_id: str, pieces: tuple[Piece, ...]) -> None:
        """Let every rank read what it needs of ``pieces``."""
        self._tell(Fetch(transfer_id, pieces))

    async def close(self, transfer_id: str) -> None:
        """Every rank forgets the transfer; on return nothing touches its pages. Without agents nothing can."""
        self._listeners.pop(transfer_id, None)
        with suppress(EngineFailed):
            await self._ask(Close(transfer_id), Closed)

    async def stop(self) -> None:
        """Close all connections. Idempotent."""
        self._stopping = True
        if self._server is not None:
            self._server.close()
            for rank in self._ranks.values():
                rank.writer.close()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._server.wait_closed(), 5.0)
            self._server = None
        self.socket_path.unlink(missing_ok=True)

    async def _ask(self, message: OpenSend | OpenRecv | Close, answer: type[Opened] | type[Closed]) -> None:
        if self._lost.done():
            raise EngineFailed(self._lost.result())
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        key = (answer, message.transfer_id)
        self._answers[key] = (set(self._ranks), future)
        try:
            self._tell(message)
            await asyncio.wait_for(future, ANSWER_TIMEOUT_S)
        except TimeoutError:
            # Not merely late: an agent answers from memory. The replica must not go on taking requests.
            self._lose(f"a KV agent did not answer within {ANSWER_TIMEOUT_S:.0f} s")
            raise EngineFailed(self._lost.result()) from None
        finally:
            self._answers.pop(key, None)

    def _tell(self, message: ToAgent) -> None:
        frame = encode(message)
        for rank in self._ranks.values():
            rank.writer.write(frame)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        frames = service_reader()
        rank: int | None = None
        try:
            while data := await reader.read(1 << 20):
                for message in frames.feed(data):
                    if isinstance(message, Hello):
                        rank = message.slice.rank
                        self._ranks[rank] = _Rank(message, writer)
                        if len(self._ranks) == self.num_ranks:
                            self._complete.set()
                    else:
                        self._hear(rank, message)
        except (ConnectionError, ValueError) as error:
            log.warning("kv_agent_connection", rank=rank, error=str(error))
        finally:
            writer.close()
            if rank is not None:
                self._lose(f"the KV agent of rank {rank} is gone")

    def _hear(self, rank: int | None, message: ToService) -> None:
        if isinstance(message, Counts):
            for name, value in message.values:
                _COUNTERS[name].inc(value)
        elif rank is None:
            raise ValueError(f"{type(message).__name__} before Hello")
        elif isinstance(message, Quarantine):
            self._quarantine[rank] = message.num_bytes
            metrics.KV_QUARANTINE_BYTES.set(self.quarantine_bytes)
        elif isinstance(message, Opened | Closed):
            waiting = self._answers.get((type(message), message.transfer_id))
            if waiting is not None:
                ranks, future = waiting
                ranks.discard(rank)
                if not ranks and not future.done():
                    future.set_result(None)
        elif not isinstance(message, Hello):
            listener = self._listeners.get(message.transfer_id)
            if listener is not None:
                listener(rank, message)

    def _lose(self, why: str) -> None:
        if self._lost.done():
            return
        if not self._stopping:
            log.error("kv_agent_lost", error=why)
        self._lost.set_result(why)
        for _, future in self._answers.values():
            if not future.done():
                future.set_exception(EngineFailed(why))
        for transfer_id, listener in list(self._listeners.items()):
            for rank in self._ranks:
                listener(rank, Failed(transfer_id, "lost", why))
