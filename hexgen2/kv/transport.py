"""What moves bytes between ranks: one-sided reads, posted and polled by the one thread that owns it.

The reader names where bytes land, so nothing but the reader ever writes its memory. Implementations:
``ucx.UcxTransport`` (NIXL over UCX), ``tcp.TcpTransport`` (plain sockets), ``memory.MemoryTransport``
(same process, for tests). None is thread-safe: the KV agent's thread calls every method.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


#: Transports that a rank may have, each a route to a peer.
MAX_ROUTES = 16


class TransportError(Exception):
    """A read cannot be posted or did not succeed: the peer is gone, refused, or the endpoint is not ours."""


@dataclass(frozen=True, slots=True)
class Span:
    """``num_bytes`` from ``remote_offset`` in the peer's registered buffer to ``local_offset`` in ours."""

    remote_offset: int
    local_offset: int
    num_bytes: int


def check_spans(spans: Sequence[Span], send_bytes: int, landing_bytes: int) -> None:
    """Raise TransportError unless all spans are within both buffers."""
    for span in spans:
        if min(span.num_bytes, span.remote_offset, span.local_offset) < 0:
            raise TransportError(f"{span} has a negative field")
        if span.remote_offset + span.num_bytes > send_bytes:
            raise TransportError(f"{span} is outside the peer's send buffer of {send_bytes} bytes")
        if span.local_offset + span.num_bytes > landing_bytes:
            raise TransportError(f"{span} is outside our landing buffer of {landing_bytes} bytes")


def merged(spans: Iterable[Span]) -> tuple[Span, ...]:
    """The same bytes in fewer spans: neighbours at both ends joined, empty ones left out."""
    result: list[Span] = []
    for span in spans:
        last = result[-1] if result else None
        if not span.num_bytes:
            continue
        if (
            last is not None
            and last.remote_offset + last.num_bytes == span.remote_offset
            and last.local_offset + last.num_bytes == span.local_offset
        ):
            result[-1] = Span(last.remote_offset, last.local_offset, last.num_bytes + span.num_bytes)
        else:
            result.append(span)
    return tuple(result)


class Transport(Protocol):
    """See the module. Life: ``register`` once, then ``read``/``poll`` until ``close``."""

    #: "ucx", "tcp" or "memory": both sides of a transfer must have the same.
    name: str
    #: For people: the address or device that this one uses, where a rank has several.
    local: str
    #: The most that one direct read (``is_direct``) is to carry; 0: none ever is.
    direct_read_bytes: int

    def register(self, send: "torch.Tensor | None", landing: "torch.Tensor | None") -> None:
        """Make ``send`` (uint8, 1-d, contiguous) readable by peers and ``landing`` writable by our reads."""

    def endpoint(self) -> bytes:
        """What a peer needs to read our send buffer. Opaque, stable after ``register``."""

    def describe(self) -> str:
        """For people: the name and what is beneath it, e.g. ``ucx (cma/memory)``; may know more after a read."""

    def read(self, endpoint: bytes, spans: Sequence[Span]) -> int:
        """Post one read of all spans and return its handle. Does not block on the network.

        Raises:
            TransportError: the read cannot even be posted.
        """

    def poll(self) -> Sequence[tuple[int, TransportError | None]]:
        """Make progress, both for our reads and for peers that read from us.

        Returns the handles whose reads are *over* since the last call, each with its error or None.
        Only when a handle has been returned will nothing write its landing bytes any more.
        """

    def is_direct(self, endpoint: bytes) -> bool:
        """Whether reads from this peer may go straight to where their bytes are to stay: they can be revoked, or the
        peer has no part in them, so that they are soon over whatever becomes of it."""

    def revoke(self, handle: int) -> bool:
        """Let an open read write nothing any more from now on, though it is not over. False: that cannot be."""

    def landed_bytes(self, handle: int) -> int:
        """How much of an open read is known to have landed, to see whether it goes on; 0 where nobody can tell."""

    def cut(self, endpoint: bytes) -> None:
        """Give up a peer that makes no progress. Its reads are over with the next ``poll``, in error, where this
        transport can make sure of that; else they stay open until they are over by themselves."""

    def serving(self, active: bool) -> None:
        """Whether peers may be reading from us now, so that ``poll`` is needed even without own reads."""

    def needs_poll(self) -> bool:
        """Whether the owner must poll (every 0.2 ms) or may sleep until it has work or a ``selectable`` wakes it."""

    def failed_handshakes(self) -> int:
        """Connections to us whose TLS handshake came to nothing, since the last call."""

    def selectable(self) -> Sequence[int]:
        """File descriptors, the same from ``register`` to ``close``, readable when ``poll`` has something to do.

        The owner must watch them while it sleeps. TCP needs no other polling; UCX cannot wake anybody and has none.
        """

    def close(self) -> None:
        """Release everything. Idempotent."""
