"""Connections that bring no request: each has so long for the head of its next one, and all together have so much room.

A slow or silent client, or a flood of them, costs those connections alone. How long a body may take is
``request_timeout_s``; how long a connection may be idle between requests is uvicorn's to say.
"""

import asyncio
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from hexgen2 import metrics

if TYPE_CHECKING:
    _Protocol: Any
else:
    _Protocol = AutoHTTPProtocol


class Guard:
    """Of one server. ``max_connections`` counts all that are open, ``head_timeout_s`` is for each request's head."""

    def __init__(self, max_connections: int, head_timeout_s: float) -> None:
        self._max_connections = max_connections
        self._head_timeout_s = head_timeout_s
        # Those whose next request has not begun, the one that has waited longest first.
        self._waiting: dict[asyncio.Transport, asyncio.TimerHandle] = {}
        self._open = 0

    def opened(self, transport: asyncio.Transport) -> None:
        """A connection is there; the one that has waited longest makes room for it, maybe itself."""
        self._open += 1
        self.wait(transport)
        if self._open > self._max_connections:
            self._close(next(iter(self._waiting)), "too_many")

    def wait(self, transport: asyncio.Transport) -> None:
        """It has begun to bring a head (or nothing)."""
        if transport not in self._waiting:
            loop = asyncio.get_running_loop()
            self._waiting[transport] = loop.call_later(self._head_timeout_s, self._close, transport, "slow")

    def served(self, transport: asyncio.Transport) -> None:
        """Its head is complete. Idempotent."""
        if timer := self._waiting.pop(transport, None):
            timer.cancel()

    def closed(self, transport: asyncio.Transport) -> None:
        """It is gone."""
        self._open -= 1
        self.served(transport)

    def _close(self, transport: asyncio.Transport, reason: str) -> None:
        self.served(transport)
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

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio."""
        self.guard.closed(self._guarded)
        super().connection_lost(exc)


def guarded(max_connections: int, head_timeout_s: float) -> type[GuardedProtocol]:
    """The protocol for one server."""
    return type("GuardedProtocol", (GuardedProtocol,), {"guard": Guard(max_connections, head_timeout_s)})
