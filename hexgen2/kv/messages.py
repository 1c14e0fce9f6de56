"""What a service and its ranks' KV agents say to each other over the local socket. Frozen data, framed msgpack.

A frame is 4 bytes of length, little-endian, and one message. The socket is a Unix socket in a directory
that only its owner may enter; both ends are one program, so there is no version to negotiate.
"""

from typing import Final, Generic, Literal, TypeVar

import msgspec

from hexgen2.kv.wire import KvShape, RankSlice

#: Longer frames are an error: no message comes near it.
MAX_FRAME_BYTES: Final = 64 << 20


class Message(msgspec.Struct, frozen=True, tag=True):
    """Base of all messages; the class name is the tag."""


class Piece(msgspec.Struct, frozen=True, array_like=True):
    """One layer of consecutive chunks of one sending rank: a step of the engine may complete several."""

    rank: int
    layer: int
    #: The first.
    chunk: int
    #: Chunk by chunk, one per KV head of that rank.
    digests: tuple[int, ...]

    def end(self, num_heads: int) -> int:
        """The chunk after the last."""
        return self.chunk + len(self.digests) // num_heads

    def by_chunk(self, num_heads: int) -> "list[Piece]":
        """The same, a piece for each chunk; empty unless there are whole chunks of ``num_heads`` digests."""
        count, rest = divmod(len(self.digests), max(1, num_heads))
        if rest or count < 2:
            return [self] if count and not rest else []
        return [
            Piece(self.rank, self.layer, self.chunk + n, self.digests[n * num_heads : (n + 1) * num_heads])
            for n in range(count)
        ]


class Source(msgspec.Struct, frozen=True):
    """A sending rank: what it holds, where to read from it (one endpoint for each of its transports), and where each
    chunk's page begins in its buffer."""

    slice: RankSlice
    endpoints: tuple[bytes, ...]
    page_offsets: tuple[int, ...]


# Service to agent.


class OpenSend(Message, frozen=True):
    """Hold these pages of the send buffer for a transfer. Answered by Opened."""

    transfer_id: str
    token: bytes
    num_tokens: int
    codec: str
    pages: tuple[int, ...]


class OpenRecv(Message, frozen=True):
    """Hold these pages of staging for a transfer that comes from ``sources``. Answered by Opened."""

    transfer_id: str
    token: bytes
    num_tokens: int
    codec: str
    #: The sources'; with codec "none" their bytes are of it.
    dtype: str
    pages: tuple[int, ...]
    sources: tuple[Source, ...]


class Fetch(Message, frozen=True):
    """These pieces may be read now. Answered, once every piece of the transfer is verified, by Fetched."""

    transfer_id: str
    pieces: tuple[Piece, ...]


class Close(Message, frozen=True):
    """Forget the transfer. Answered by Closed once nothing touches its pages any more."""

    transfer_id: str


# Agent to service.


class Hello(Message, frozen=True):
    """First message of a rank."""

    slice: RankSlice
    shape: KvShape
    send_pages: int
    staging_pages: int
    page_bytes: int
    endpoints: tuple[bytes, ...]
    transport: str
    transport_detail: str
    pid: int


class Opened(Message, frozen=True):
    """The pages are held."""

    transfer_id: str


class Closed(Message, frozen=True):
    """The pages are free."""

    transfer_id: str


class Ready(Message, frozen=True):
    """Pieces that lie complete in the send buffer."""

    transfer_id: str
    pieces: tuple[Piece, ...]


class RouteShare(msgspec.Struct, frozen=True, array_like=True):
    """What one route carried of a transfer: from its first read to its last verified piece, ns since 1970."""

    name: str
    num_bytes: int
    began_ns: int
    ended_ns: int


class Fetched(Message, frozen=True):
    """Everything this rank needs of the transfer is in staging and verified."""

    transfer_id: str
    num_bytes: int
    num_pieces: int
    #: Seconds spent verifying (copy and digest), of the agent's own thread.
    verify_s: float
    #: What carried it, for people: ``Transport.describe()`` after the last read.
    transport_detail: str
    routes: tuple[RouteShare, ...] = ()


class Failed(Message, frozen=True):
    """The transfer cannot complete on this rank."""

    transfer_id: str
    reason: Literal["corrupt", "lost", "invalid"]
    detail: str


class Loaded(Message, frozen=True):
    """The KV is in the engine's own blocks."""

    transfer_id: str


class Counts(Message, frozen=True):
    """Increments of named counters, e.g. ``recomputed_tokens``; also from processes that have no rank."""

    values: tuple[tuple[str, int], ...]


class Quarantine(Message, frozen=True):
    """Bytes of landing memory whose reads belong to closed transfers and are not known to be over."""

    num_bytes: int


ToAgent = OpenSend | OpenRecv | Fetch | Close
ToService = Hello | Opened | Closed | Ready | Fetched | Failed | Loaded | Counts | Quarantine

_encoder = msgspec.msgpack.Encoder()


def encode(message: ToAgent | ToService) -> bytes:
    """One frame."""
    body = _encoder.encode(message)
    return len(body).to_bytes(4, "little") + body


M = TypeVar("M", ToAgent, ToService)


class FrameReader(Generic[M]):
    """Bytes in, messages out, however the stream is cut.

    Raises:
        ValueError: a frame that is too long or not one of the expected messages.
    """

    def __init__(self, decoder: "msgspec.msgpack.Decoder[M]") -> None:
        self._decoder: msgspec.msgpack.Decoder[M] = decoder
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[M]:
        """Messages completed by ``data``, in order."""
        self._buffer += data
        messages: list[M] = []
        at = 0
        while len(self._buffer) - at >= 4:
            length = int.from_bytes(self._buffer[at : at + 4], "little")
            if length > MAX_FRAME_BYTES:
                raise ValueError(f"frame of {length} bytes; the limit is {MAX_FRAME_BYTES}")
            if len(self._buffer) - at - 4 < length:
                break
            messages.append(self._decoder.decode(bytes(self._buffer[at + 4 : at + 4 + length])))
            at += 4 + length
        del self._buffer[:at]
        return messages


def agent_reader() -> FrameReader[ToAgent]:
    """Of what the service says."""
    return FrameReader(msgspec.msgpack.Decoder(ToAgent))


def service_reader() -> FrameReader[ToService]:
    """Of what an agent says."""
    return FrameReader(msgspec.msgpack.Decoder(ToService))
