"""Clients that bring no request or take no answer: each has so long for it, and all together have so much room.

A slow or silent client, or a flood of them, costs those connections alone. How long a body may take is
``request_timeout_s``; how long a connection may be idle between requests is uvicorn's to say.
"""

import asyncio
import socket
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from hexgen2 import metrics

if TYPE_CHECKING:
    _Protocol: Any
else:
    _Protocol = AutoHTTPProtocol


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one server: open connections, time for each request's head, and without taking anything of an answer."""

    max_connections: int = 768
    head_timeout_s: float = 10.0
    unread_timeout_s: float = 30.0


class Client(socket.socket):
    """One connection, from when it is accepted (with TLS, the handshake follows) until it is closed."""

    guard: "Guard"
    #: Once it speaks HTTP.
    transport: asyncio.Transport | None = None

    def hang_up(self) -> None:
        """Its owner, the event loop, closes it then."""
        if self.transport is not None:
            self.transport.abort()
        else:
            with suppress(OSError):
                self.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """See socket."""
        self.guard.closed(self)
        super().close()


class Doorway(socket.socket):
    """A listening socket whose connections are watched from the beginning."""

    guard: "Guard"

    def accept(self) -> tuple[socket.socket, Any]:
        """See socket."""
        accepted, address = super().accept()
        client = Client(accepted.family, accepted.type, accepted.proto, fileno=accepted.detach())
        client.guard = self.guard
        self.guard.accepted(client)
        return client, address


class Guard:
    """Of one server."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        #: By number, as transports tell which is theirs.
        self._open: dict[int, Client] = {}
        # Those whose next request has not begun, the one that has waited longest first.
        self._waiting: dict[Client, asyncio.TimerHandle] = {}
        # Those that have not taken all that was written.
        self._unread: dict[Client, asyncio.TimerHandle] = {}

    def accepted(self, client: Client) -> None:
        """A connection is there; the one that has waited longest makes room for it, maybe itself."""
        self._open[client.fileno()] = client
        self.wait(client)
        if len(self._open) > self._limits.max_connections:
            self._close(next(iter(self._waiting)), "too_many")

    def opened(self, transport: asyncio.Transport) -> Client:
        """It speaks HTTP from now on."""
        client = self._open[transport.get_extra_info("socket").fileno()]
        client.transport = transport
        # Whatever the kernel does not take at once counts as unread. Not 0: over TLS an empty buffer would be full.
        transport.set_write_buffer_limits(high=1)
        return client

    def wait(self, client: Client) -> None:
        """It has begun to bring a head (or nothing)."""
        if client not in self._waiting:
            loop = asyncio.get_running_loop()
            self._waiting[client] = loop.call_later(self._limits.head_timeout_s, self._close, client, "slow")

    def served(self, client: Client) -> None:
        """Its head is complete. Idempotent."""
        if timer := self._waiting.pop(client, None):
            timer.cancel()

    def unread(self, client: Client) -> None:
        """It did not take all at once: from now on it must take something within each ``unread_timeout_s``."""
        assert client.transport is not None  # It speaks HTTP.
        num_bytes = client.transport.get_write_buffer_size()
        loop = asyncio.get_running_loop()
        self._unread[client] = loop.call_later(self._limits.unread_timeout_s, self._check_unread, client, num_bytes)

    def read(self, client: Client) -> None:
        """It has taken all. Idempotent."""
        if timer := self._unread.pop(client, None):
            timer.cancel()

    def closed(self, client: Client) -> None:
        """It is gone. Idempotent."""
        self._open.pop(client.fileno(), None)
        self.served(client)
        self.read(client)

    def _check_unread(self, client: Client, num_bytes: int) -> None:
        assert client.transport is not None
        if client.transport.get_write_buffer_size() < num_bytes:
            self.unread(client)
        else:
            self._close(client, "unread")

    def _close(self, client: Client, reason: str) -> None:
        self.served(client)
        self.read(client)
        metrics.HTTP_CONNECTIONS_CLOSED.labels(reason).inc()
        client.hang_up()


class GuardedProtocol(_Protocol):  # type: ignore[misc]
    """uvicorn's own, watched by a guard."""

    guard: Guard

    def connection_made(self, transport: asyncio.Transport) -> None:
        """See asyncio."""
        super().connection_made(transport)
        self._client = self.guard.opened(transport)

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self.guard.wait(self._client)
        else:
            self.guard.served(self._client)

    def pause_writing(self) -> None:
        """See asyncio."""
        super().pause_writing()
        self.guard.unread(self._client)

    def resume_writing(self) -> None:
        """See asyncio."""
        super().resume_writing()
        self.guard.read(self._client)


def guarded(guard: Guard) -> type[GuardedProtocol]:
    """The protocol for one server."""
    return type("GuardedProtocol", (GuardedProtocol,), {"guard": guard})
