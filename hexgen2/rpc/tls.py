"""gRPC over TLS: a server that picks up new certificates by itself, and a channel that does.

gRPC asks a server for new certificates at each handshake. A channel has those that it was made with, so ``TlsChannel``
is a channel whose inner one is replaced when the files have changed; calls that run keep theirs.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import grpc

from hexgen2 import metrics
from hexgen2.security.callers import Caller, callers_of
from hexgen2.security.tls import Material, TlsFiles

#: An old connection outlives its last call by so long.
_LINGER_S = 30.0


def server_credentials(files: TlsFiles, *, client_certs: bool) -> grpc.ServerCredentials:
    """With ``client_certs`` only who shows a certificate of ``files``'s authority gets a connection."""
    used = files.current()

    def fetch() -> Any:
        # Called by gRPC's own threads, at each handshake; None: nothing new.
        nonlocal used
        metrics.TLS_HANDSHAKES_BEGUN.labels("grpc").inc()
        material = files.current()
        if material is used:
            return None
        used = material
        return _configuration(material)

    return grpc.dynamic_ssl_server_credentials(_configuration(used), fetch, require_client_authentication=client_certs)


def callers_in(context: Any) -> frozenset[Caller]:
    """The roles in the certificate of a call's peer."""
    return callers_of(each.decode(errors="replace") for each in context.auth_context().get("peer_uri", ()))


def _configuration(material: Material) -> Any:
    return grpc.ssl_server_certificate_configuration([(material.key, material.cert)], material.ca)


class _Connection:
    """An inner channel and the calls that use it."""

    def __init__(self, channel: grpc.aio.Channel, material: Material) -> None:
        self.channel = channel
        self.material = material
        self.calls = 0


class TlsChannel(grpc.aio.Channel):
    """See the module. Unary and server-stream calls only, as everywhere here."""

    def __init__(self, address: str, files: TlsFiles, options: Sequence[tuple[str, int]]) -> None:
        self._address, self._files, self._options = address, files, options
        # Of earlier certificates: those with calls, and what closes those without.
        self._old: set[_Connection] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self._connection = self._connect(files.current())

    def unary_unary(self, method: str, *arguments: Any, **named: Any) -> Any:
        """See grpc.aio."""
        return lambda *a, **k: self._call(lambda inner: inner.unary_unary(method, *arguments, **named)(*a, **k))

    def unary_stream(self, method: str, *arguments: Any, **named: Any) -> Any:
        """See grpc.aio."""
        return lambda *a, **k: self._call(lambda inner: inner.unary_stream(method, *arguments, **named)(*a, **k))

    def stream_unary(self, method: str, *arguments: Any, **named: Any) -> Any:
        """Not offered."""
        raise NotImplementedError(method)

    def stream_stream(self, method: str, *arguments: Any, **named: Any) -> Any:
        """See grpc.aio. For reflection."""
        return lambda *a, **k: self._call(lambda inner: inner.stream_stream(method, *arguments, **named)(*a, **k))

    async def close(self, grace: float | None = None) -> None:
        """End all calls and connections. Idempotent."""
        for task in self._closing:
            task.cancel()
        for connection in (self._connection, *self._old):
            await connection.channel.close(grace)
        await asyncio.gather(*self._closing, return_exceptions=True)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """See grpc.aio."""
        return self._current().channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """See grpc.aio."""
        await self._connection.channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        """See grpc.aio."""
        await self._current().channel.channel_ready()

    async def __aenter__(self) -> "TlsChannel":
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    def _call(self, start: Callable[[grpc.aio.Channel], Any]) -> Any:
        connection = self._current()
        call = start(connection.channel)
        connection.calls += 1
        call.add_done_callback(lambda _: self._ended(connection))
        return call

    def _current(self) -> _Connection:
        material = self._files.current()
        if material is not self._connection.material:
            old, self._connection = self._connection, self._connect(material)
            self._old.add(old)
            self._close_unused(old)
        return self._connection

    def _ended(self, connection: _Connection) -> None:
        connection.calls -= 1
        self._close_unused(connection)

    def _close_unused(self, connection: _Connection) -> None:
        if connection in self._old and not connection.calls:
            task = asyncio.get_running_loop().create_task(self._close_old(connection))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def _close_old(self, connection: _Connection) -> None:
        # What a call that is over has received may not all have been read yet.
        await asyncio.sleep(_LINGER_S)
        self._old.discard(connection)
        await connection.channel.close()

    def _connect(self, material: Material) -> _Connection:
        credentials = grpc.ssl_channel_credentials(material.ca, material.key, material.cert)
        return _Connection(grpc.aio.secure_channel(self._address, credentials, self._options), material)
