"""The two sides of one KV hand-off as state machines. Pure: they check and decide; ``hexgen2.worker`` acts.

Send:    QUEUED -> HELD -> PRODUCING -> PRODUCED -> RELEASED      | ABORTED from any
Receive: QUEUED -> FETCHING -> VERIFIED -> LOADED                 | REFUSED, ABORTED from any

Messages may be late, repeated or out of order: whatever does not fit the state is ignored when it is harmless
and refused when it is not.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from hexgen2.errors import TransferRefused
from hexgen2.kv.codecs import NONE
from hexgen2.kv.messages import Piece
from hexgen2.kv.wire import CHUNK_TOKENS, KvShape, RankSlice, num_chunks


@dataclass(frozen=True, slots=True)
class Header:
    """What a transfer carries; the receiver compares it with what it was given."""

    model_sha256: bytes
    prompt_sha256: bytes
    num_tokens: int
    shape: KvShape
    codec: str
    chunk_tokens: int
    transport: str


class SendState(StrEnum):
    """See the module."""

    QUEUED = "queued"
    HELD = "held"
    PRODUCING = "producing"
    PRODUCED = "produced"
    RELEASED = "released"
    ABORTED = "aborted"


class RecvState(StrEnum):
    """See the module."""

    QUEUED = "queued"
    FETCHING = "fetching"
    VERIFIED = "verified"
    LOADED = "loaded"
    REFUSED = "refused"
    ABORTED = "aborted"


@dataclass(slots=True)
class SendTransfer:
    """The sending side. ``pieces`` is a log: every reader of FetchKv follows it from its beginning."""

    header: Header
    slices: Sequence[RankSlice]
    state: SendState = SendState.QUEUED
    pieces: list[Piece] = field(default_factory=list)
    _seen: set[tuple[int, int, int]] = field(default_factory=set)

    @property
    def num_expected(self) -> int:
        """Pieces of all ranks."""
        return num_chunks(self.header.num_tokens) * sum(s.num_layers for s in self.slices)

    @property
    def over(self) -> bool:
        """Whether its memory is given up."""
        return self.state in (SendState.RELEASED, SendState.ABORTED)

    def hold(self) -> None:
        """Every rank holds its pages."""
        if self.state is SendState.QUEUED:
            self.state = SendState.HELD

    def ready(self, pieces: Iterable[Piece]) -> None:
        """Pieces lie complete in a rank's send buffer. Late and repeated ones change nothing."""
        if self.state not in (SendState.HELD, SendState.PRODUCING):
            return
        self.state = SendState.PRODUCING
        for piece in pieces:
            key = (piece.rank, piece.layer, piece.chunk)
            if key not in self._seen:
                self._seen.add(key)
                self.pieces.append(piece)
        if len(self.pieces) == self.num_expected:
            self.state = SendState.PRODUCED

    def end(self) -> None:
        """The Prefill call ended. It is a release when everything had been produced, else an abort."""
        if not self.over:
            self.state = SendState.RELEASED if self.state is SendState.PRODUCED else SendState.ABORTED


@dataclass(slots=True)
class RecvTransfer:
    """The receiving side. ``expected`` is what this replica was asked to decode and is able to load."""

    expected: Header
    num_ranks: int
    state: RecvState = RecvState.QUEUED
    _sources: dict[int, RankSlice] = field(default_factory=dict)
    _pieces: dict[tuple[int, int, int], tuple[int, ...]] = field(default_factory=dict)
    _fetched: set[int] = field(default_factory=set)
    _loaded: set[int] = field(default_factory=set)

    def begin(self, header: Header, slices: Sequence[RankSlice]) -> None:
        """The sender's header has come. After a reconnect it may come again, unchanged.

        Raises:
            TransferRefused: naming the first difference from what was expected.
        """
        want = self.expected
        for name, offered, asked in (
            ("model", header.model_sha256.hex()[:16], want.model_sha256.hex()[:16]),
            ("prompt", header.prompt_sha256.hex()[:16], want.prompt_sha256.hex()[:16]),
            ("prompt_tokens", header.num_tokens, want.num_tokens),
            ("num_layers", header.shape.num_layers, want.shape.num_layers),
            ("num_kv_heads", header.shape.num_kv_heads, want.shape.num_kv_heads),
            ("head_dim", header.shape.head_dim, want.shape.head_dim),
            ("dtype", header.shape.dtype, want.shape.dtype),
            ("codec", header.codec, want.codec),
            ("chunk_tokens", header.chunk_tokens, want.chunk_tokens),
            ("transport", header.transport, want.transport),
        ):
            if offered != asked:
                self._refuse(f"{name} differs: offered {offered}, expected {asked}")
        sources = {s.rank: s for s in slices}
        if len(sources) != len(slices):
            self._refuse("a sending rank is listed twice")
        if self.state is RecvState.QUEUED:
            self._sources = sources
            self.state = RecvState.FETCHING
        elif sources != self._sources:
            self._refuse("the sending ranks changed during the transfer")

    def offer(self, pieces: Iterable[Piece]) -> list[Piece]:
        """Those of ``pieces`` that are new and may be fetched.

        Raises:
            TransferRefused: a piece outside the header's ranks, layers or chunks, or one whose digests changed.
        """
        if self.state is not RecvState.FETCHING:
            return []
        new: list[Piece] = []
        chunks = num_chunks(self.expected.num_tokens)
        for piece in pieces:
            source = self._sources.get(piece.rank)
            if source is None or piece.layer not in source.layers or not 0 <= piece.chunk < chunks:
                self._refuse(f"no such piece: rank {piece.rank}, layer {piece.layer}, chunk {piece.chunk}")
            elif len(piece.digests) != source.num_kv_heads:
                self._refuse(f"{len(piece.digests)} digests for {source.num_kv_heads} KV heads")
            key = (piece.rank, piece.layer, piece.chunk)
            known = self._pieces.get(key)
            if known is None:
                self._pieces[key] = piece.digests
                new.append(piece)
            elif known != piece.digests:
                self._refuse(f"digests of rank {piece.rank}, layer {piece.layer}, chunk {piece.chunk} changed")
        return new

    def fetched(self, rank: int) -> None:
        """This rank has all it needs, verified. With the last rank the transfer is verified."""
        if self.state is RecvState.FETCHING:
            self._fetched.add(rank)
            if len(self._fetched) == self.num_ranks:
                self.state = RecvState.VERIFIED

    def loaded(self, rank: int) -> None:
        """This rank's engine has the KV in its blocks. With the last rank the transfer is loaded."""
        if self.state is RecvState.VERIFIED:
            self._loaded.add(rank)
            if len(self._loaded) == self.num_ranks:
                self.state = RecvState.LOADED

    def fail(self) -> None:
        """A digest did not match or bytes are lost: nothing of it may be loaded."""
        if self.state is not RecvState.LOADED:
            self.state = RecvState.REFUSED

    def end(self) -> None:
        """The Decode call ended."""
        if self.state not in (RecvState.LOADED, RecvState.REFUSED):
            self.state = RecvState.ABORTED

    def _refuse(self, why: str) -> None:
        self.state = RecvState.REFUSED
        raise TransferRefused(why)


def header_for(
    model_sha256: bytes, prompt_digest: bytes, num_tokens: int, shape: KvShape, transport: str, codec: str = NONE
) -> Header:
    """The header of a transfer as this version makes and accepts it."""
    return Header(model_sha256, prompt_digest, num_tokens, shape, codec, CHUNK_TOKENS, transport)
