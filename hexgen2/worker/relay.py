"""Ranks of one replica on several machines: those elsewhere reach the service's local socket through this.

The first machine's worker listens (``Relay``); on each other machine a node (``worker.node``) has a local socket of its
own, and carries every connection of its ranks' KV agents to the first, byte for byte, over TLS where there are
certificates. One more connection says that the other machine is still there: vLLM's own would not tell for minutes.
Control messages alone: KV goes from rank to rank.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import structlog

from hexgen2.address import parse_address
from hexgen2.errors import ConfigError
from hexgen2.kv.tcp_socket import tune
from hexgen2.security.callers import Caller
from hexgen2.security.handshakes import counted
from hexgen2.security.tls import TlsFiles
from hexgen2.security.tls_context import callers_at, peer_context

log = structlog.get_logger(__name__)

#: The first byte of a connection: a rank's, or the one that says that a node lives.
RANK, LIFE = b"R", b"L"
#: For connecting and for the first byte.
GREETING_S = 10.0
BLOCK = 1 << 16


class Relay:
    """The first machine's side: listens at ``listen``, hands connections to ``socket_path`` and knows which of
    ``num_nodes`` other machines are there.
    """

    def __init__(self, listen: str, socket_path: Path, tls: TlsFiles | None, num_nodes: int = 1) -> None:
        self._listen, self._socket_path, self._tls, self._num_nodes = listen, socket_path, tls, num_nodes
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.Task[None]] = set()
        self._num_alive = 0
        self._complete, self._incomplete = asyncio.Event(), asyncio.Event()

    async def start(self) -> None:
        """Listen. Raises ConfigError where that cannot be."""
        host, port = parse_address(self._listen, what="nodes_listen")
        context, timeout_s = None, None
        if self._tls is not None:
            timeout_s = GREETING_S
            context = counted(peer_context(self._tls, server=True), "nodes", timeout_s)
        try:
            self._server = await asyncio.start_server(
                self._serve, host, port, ssl=context, ssl_handshake_timeout=timeout_s
            )
        except OSError as error:
            raise ConfigError(f"nodes_listen: {self._listen}: {error.strerror}") from error

    @property
    def port(self) -> int:
        """Where it listens."""
        assert self._server is not None
        return int(self._server.sockets[0].getsockname()[1])

    async def wait_complete(self) -> None:
        """Return when every other machine is there. What ran of an earlier start is over by then."""
        await self._complete.wait()

    async def lost(self) -> None:
        """Return when one of them, after all were there, is gone."""
        await self._incomplete.wait()

    async def stop(self) -> None:
        """Close everything; nodes end with it. Idempotent."""
        if self._server is not None:
            self._server.close()
        for task in self._open:
            task.cancel()
        if self._open:
            await asyncio.wait(self._open)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        tune(writer.get_extra_info("socket"))
        try:
            async with asyncio.timeout(GREETING_S):
                kind = await reader.readexactly(1)
            connection = writer.get_extra_info("ssl_object")
            if self._tls is not None and Caller.WORKER not in callers_at(connection):
                log.warning("node_refused", reason="its certificate is no worker's")
            elif kind == LIFE:
                await self._live(reader)
            elif kind == RANK:
                local = await asyncio.open_unix_connection(str(self._socket_path))
                await carry((reader, writer), local)
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            log.warning("node_connection", error=str(error) or type(error).__name__)
        except asyncio.CancelledError:
            # Only ``stop`` cancels this.
            pass
        finally:
            writer.close()
            self._open.discard(task)

    async def _live(self, reader: asyncio.StreamReader) -> None:
        """Until it, or we, are gone."""
        self._num_alive += 1
        if self._num_alive >= self._num_nodes:
            self._complete.set()
        try:
            while await reader.read(BLOCK):
                pass
        finally:
            self._num_alive -= 1
            if self._complete.is_set():
                self._incomplete.set()


Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def carry(one: Streams, other: Streams) -> None:
    """Every byte from each to the other, until one of them ends; then close both."""

    async def way(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, ssl.SSLError):
            while data := await reader.read(BLOCK):
                writer.write(data)
                await writer.drain()

    ways = [asyncio.ensure_future(way(one[0], other[1])), asyncio.ensure_future(way(other[0], one[1]))]
    try:
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for each in ways:
            each.cancel()
        await asyncio.wait(ways)
        for _, writer in (one, other):
            writer.close()


async def dial(address: str, kind: bytes, tls: TlsFiles | None) -> Streams:
    """A connection to the first machine. Raises OSError."""
    host, port = parse_address(address, what="leader")
    context = None if tls is None else peer_context(tls, server=False)
    async with asyncio.timeout(GREETING_S):
        reader, writer = await asyncio.open_connection(
            host, port, ssl=context, server_hostname=host if context is not None else None
        )
    tune(writer.get_extra_info("socket"))
    writer.write(kind)
    return reader, writer


@asynccontextmanager
async def carrying(socket_path: Path, leader: str, tls: TlsFiles | None) -> AsyncIterator[None]:
    """For the length of a block: whoever connects to ``socket_path`` here talks to the service at ``leader``."""
    running: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        running.add(task)
        try:
            await carry((reader, writer), await dial(leader, RANK, tls))
        except OSError as error:
            log.warning("leader_lost", leader=leader, error=str(error))
        except asyncio.CancelledError:
            # Only the end of the block cancels this.
            pass
        finally:
            writer.close()
            running.discard(task)

    server = await asyncio.start_unix_server(serve, str(socket_path))
    try:
        yield
    finally:
        server.close()
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running)
