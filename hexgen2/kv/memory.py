"""MemoryTransport: reads between objects of one process, for tests, with the faults that networks have.

Every endpoint lives on a ``MemoryNetwork`` that the test makes and passes on; nothing is shared otherwise.
Bytes move when the reader polls, so whatever happens to the send buffer before that is seen, as with real reads.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hexgen2.kv.transport import Span, TransportError, check_spans

if TYPE_CHECKING:
    import torch


@dataclass
class MemoryNetwork:
    """Joins the transports of one test and holds the faults to come: each a number of reads, from the next one on."""

    delay_polls: int = 0  #: polls that every read takes before the one that performs it
    drop: int = 0  #: reads that stay open until ``release``, as from a peer that was stopped
    fail: int = 0  #: reads that end with an error after half of their spans were written
    corrupt: int = 0  #: reads in which one bit of the landed bytes is flipped
    _peers: "dict[bytes, MemoryTransport]" = field(default_factory=dict)
    _num_joined: int = 0
    _num_releases: int = 0

    def release(self) -> None:
        """Let the reads that were dropped so far go on."""
        self._num_releases += 1

    def join(self, transport: "MemoryTransport") -> bytes:
        """Name a transport; called by it."""
        self._num_joined += 1
        name = b"memory-%d" % self._num_joined
        self._peers[name] = transport
        return name

    def leave(self, name: bytes) -> None:
        """Forget a transport: reads from it fail."""
        self._peers.pop(name, None)

    def peer(self, name: bytes) -> "MemoryTransport":
        """The transport with this endpoint. Raises TransportError when it has left."""
        try:
            return self._peers[name]
        except KeyError:
            raise TransportError(f"memory: no peer {name!r}") from None


@dataclass
class _Read:
    endpoint: bytes
    spans: tuple[Span, ...]
    polls_left: int
    revoked: bool = False
    dropped_at: int | None = None  # network._num_releases then

    @property
    def num_bytes(self) -> int:
        return sum(span.num_bytes for span in self.spans)


class MemoryTransport:
    """See the module and ``transport.Transport``."""

    name = "memory"
    local = "memory"

    def __init__(
        self, network: MemoryNetwork, bytes_per_poll: int | None = None, *, direct: bool = False, revocable: bool = True
    ) -> None:
        self.direct_read_bytes, self._revocable = 4 << 20 if direct else 0, revocable
        #: What our reads get each poll, one read after another; None: all they want. 0 is a silent link.
        self.bytes_per_poll = bytes_per_poll
        self._earned_bytes = 0
        self._network = network
        self._endpoint = network.join(self)
        self._send: torch.Tensor | None = None
        self._landing: torch.Tensor | None = None
        self._reads: dict[int, _Read] = {}
        self._next_handle = 0

    def register(self, send: "torch.Tensor | None", landing: "torch.Tensor | None") -> None:
        """Keep both buffers (uint8, 1-d); they stay the caller's."""
        self._send, self._landing = send, landing

    def endpoint(self) -> bytes:
        """Our name on the network."""
        return self._endpoint

    def describe(self) -> str:
        """For people."""
        return "memory"

    def read(self, endpoint: bytes, spans: Sequence[Span]) -> int:
        """Post a read. Raises TransportError for a peer that has left or spans out of bounds."""
        remote = self._network.peer(endpoint)._send
        check_spans(spans, _size(remote), _size(self._landing))
        self._next_handle += 1
        self._reads[self._next_handle] = _Read(endpoint, tuple(spans), self._network.delay_polls)
        return self._next_handle

    def poll(self) -> Sequence[tuple[int, TransportError | None]]:
        """Perform what is due, in the order it was posted."""
        over: list[tuple[int, TransportError | None]] = []
        if self._reads and self.bytes_per_poll is not None:
            self._earned_bytes += self.bytes_per_poll
        for handle, read in list(self._reads.items()):
            if self.bytes_per_poll is not None:
                if self._earned_bytes < read.num_bytes:
                    break
                self._earned_bytes -= read.num_bytes
            if read.polls_left > 0:
                read.polls_left -= 1
            elif not self._is_dropped(read):
                over.append((handle, self._perform(read)))
                del self._reads[handle]
        if not self._reads:
            self._earned_bytes = 0
        return over

    def is_direct(self, endpoint: bytes) -> bool:
        """As it was made."""
        return self.direct_read_bytes > 0

    def revoke(self, handle: int) -> bool:
        """It will be over when it would have been; as it was made."""
        read = self._reads.get(handle)
        if read is None or not self._revocable:
            return False
        read.revoked = True
        return True

    def landed_bytes(self, handle: int) -> int:
        """Nobody can tell."""
        return 0

    def cut(self, endpoint: bytes) -> None:
        """Nothing to do: reads stay open until they are over."""

    def serving(self, active: bool) -> None:
        """Nothing to do: readers copy by themselves."""

    def needs_poll(self) -> bool:
        """While reads are open."""
        return bool(self._reads)

    def failed_handshakes(self) -> int:
        """There are none."""
        return 0

    def selectable(self) -> Sequence[int]:
        """None."""
        return ()

    def close(self) -> None:
        """Leave the network; peers' reads from us fail from now on."""
        self._network.leave(self._endpoint)
        self._reads.clear()
        self._send = self._landing = None

    def _is_dropped(self, read: _Read) -> bool:
        network = self._network
        if read.dropped_at is None and network.drop > 0:
            network.drop -= 1
            read.dropped_at = network._num_releases
        return read.dropped_at == network._num_releases

    def _perform(self, read: _Read) -> TransportError | None:
        network, landing = self._network, self._landing
        try:
            send = network.peer(read.endpoint)._send
        except TransportError as error:
            return error
        assert send is not None, "read() checked it"
        assert landing is not None, "read() checked it"
        fails = network.fail > 0
        spans = () if read.revoked else read.spans
        for span in spans[: len(spans) // 2] if fails else spans:
            source = send[span.remote_offset : span.remote_offset + span.num_bytes]
            landing[span.local_offset : span.local_offset + span.num_bytes].copy_(source)
        if fails:
            network.fail -= 1
            return TransportError("memory: this read was told to fail")
        if network.corrupt > 0 and spans:
            network.corrupt -= 1
            span = spans[-1]
            landing[span.local_offset + span.num_bytes // 2] ^= 0x10
        return None


def _size(buffer: "torch.Tensor | None") -> int:
    return 0 if buffer is None else buffer.numel()
