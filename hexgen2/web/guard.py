"""Clients that bring no request or take no answer: each has so long for it, and all together have so much room.

A slow or silent client, or a flood of them, costs those connections alone. How long a body may take is
``request_timeout_s``; how long a connection may be idle between requests is uvicorn's to say.
"""

import asyncio
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


class Guard:
    """Of one server."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        # Those whose next request has not begun, the one that has waited longest first.
        self._waiting: dict[asyncio.Transport, asyncio.TimerHandle] = {}
        # Those that have not taken all that was written.
        self._unread: dict[asyncio.Transport, asyncio.TimerHandle] = {}
        self._open = 0

    def opened(self, transport: asyncio.Transport) -> None:
        """A connection is there; the one that has waited longest makes room for it, maybe itself."""
        self._open += 1
        # Whatever the kernel does not take at once counts as unread. Not 0: over TLS an empty buffer would be full.
        transport.set_write_buffer_limits(high=1)
        self.wait(transport)
        if self._open > self._limits.max_connections:
            self._close(next(iter(self._waiting)), "too_many")

    def wait(self, transport: asyncio.Transport) -> None:
        """It has begun to bring a head (or nothing)."""
        if transport not in self._waiting:
            loop = asyncio.get_running_loop()
            self._waiting[transport] = loop.call_later(self._limits.head_timeout_s, self._close, transport, "slow")

    def served(self, transport: asyncio.Transport) -> None:
        """Its head is complete. Idempotent."""
        if timer := self._waiting.pop(transport, None):
            timer.cancel()

    def unread(self, transport: asyncio.Transport) -> None:
        """It did not take all at once: from now on it must take something within each ``unread_timeout_s``."""
        num_bytes = transport.get_write_buffer_size()
        loop = asyncio.get_running_loop()
        self._unread[transport] = loop.call_later(
            self._limits.unread_timeout_s, self._check_unread, transport, num_bytes
        )

    def read(self, transport: asyncio.Transport) -> None:
        """It has taken all. Idempotent."""
        if timer := self._unread.pop(transport, None):
            timer.cancel()

    def closed(self, transport: asyncio.Transport) -> None:
        """It is gone."""
        self._open -= 1
        self.served(transport)
        self.read(transport)

    def _check_unread(self, transport: asyncio.Transport, num_bytes: int) -> None:
        if transport.get_write_buffer_size() < num_bytes:
            self.unread(transport)
        else:
            self._close(transport, "unread")

    def _close(self, transport: asyncio.Transport, reason: str) -> None:
        self.served(transport)
        self.read(transport)
        metrics.HTTP_CONNECTIONS_CLOSED.labels(reason).inc()
        transport.abort()


class GuardedProtocol(_Protocol):  # type: ignore[misc]
    """uvicorn's own, watched by a guard."""

    guard: Guard

    def connection_made(self, transport: asyncio.Transport) -> None:
        """See asyncio."""
        super().connection_made(transport)
        self._guarded = transport
        self.guard.opened(transport)

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self.guard.wait(self._guarded)
        else:
            self.guard.served(self._guarded)

    def pause_writing(self) -> None:
        """See asyncio."""
        super().pause_writing()
        self.guard.unread(self._guarded)

    def resume_writing(self) -> None:
        """See asyncio."""
        super().resume_writing()
        self.guard.read(self._guarded)

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio."""
        self.guard.closed(self._guarded)
        super().connection_lost(exc)


def guarded(limits: Limits) -> type[GuardedProtocol]:
    """The protocol for one server."""
    return type("GuardedProtocol", (GuardedProtocol,), {"guard": Guard(limits)})
