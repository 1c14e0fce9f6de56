"""The receiving side of one KV hand-off as a state machine. Pure.

QUEUED -> FETCHING -> VERIFIED -> LOADED                 | REFUSED, ABORTED from any

Messages may be late, repeated or out of order: whatever does not fit the state is ignored when it is harmless
and refused when it is not. Time comes in as ``now``, seconds of one clock.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from math import inf

from hexgen2.errors import DeadlineExceeded, HexgenError, KvCorrupt, TransferRefused, Unavailable
from hexgen2.kv.handoff import FirstToken, Header, Offer, difference
from hexgen2.kv.layout import missing
from hexgen2.kv.messages import Piece
from hexgen2.kv.wire import num_chunks

#: FetchKv calls per transfer. A connection that broke is worth one more; prefill lost is not.
MAX_FETCHES = 2


class RecvState(StrEnum):
    """See the module."""

    QUEUED = "queued"
    FETCHING = "fetching"
    VERIFIED = "verified"
    LOADED = "loaded"
    REFUSED = "refused"
    ABORTED = "aborted"


@dataclass(slots=True)
class RecvTransfer:
    """``expected`` is what this replica was asked to decode and is able to load."""

    expected: Header
    num_ranks: int
    #: When the Decode call that owns it is over at the latest.
    deadline: float = inf
    state: RecvState = RecvState.QUEUED
    first: FirstToken | None = None
    #: Why nothing of it may be used, once there is a reason.
    error: HexgenError | None = None
    num_fetches: int = 1
    _offer: Offer | None = None
    _wanted: bool = False
    #: By chunk.
    _pieces: dict[tuple[int, int, int], Piece] = field(default_factory=dict)
    #: Announced before staging was held.
    _waiting: list[Piece] = field(default_factory=list)
    _fetched: set[int] = field(default_factory=set)
    _loaded: set[int] = field(default_factory=set)

    @property
    def offer_seen(self) -> bool:
        """Whether an offer was accepted."""
        return self._offer is not None

    @property
    def settled(self) -> bool:
        """Whether the fetch is over: failed, needed no more (the first token was final), or all here and verified."""
        if self.error is not None:
            return True
        return self.first is not None and (
            self.first.finish_reason is not None or self.state in (RecvState.VERIFIED, RecvState.LOADED)
        )

    def offered(self, offer: Offer) -> None:
        """What prefill holds. It may come again, unchanged.

        A difference from what was expected refuses the transfer, as every refusal here does by ``error``.
        """
        if self.settled:
            return
        if self.offer_seen:
            if offer != self._offer:
                self._refuse("offer: changed during the transfer")
            return
        num_pages, shape = num_chunks(self.expected.num_tokens), offer.header.shape
        odd = next((s for s in offer.sources if len(s.page_offsets) != num_pages), None)
        if why := difference(offer.header, self.expected):
            self._refuse(why)
        elif not offer.sources or len({s.slice.rank for s in offer.sources}) != len(offer.sources):
            self._refuse("ranks: a sending rank is listed twice, or none is")
        elif odd is not None:
            self._refuse(f"page_offsets: {len(odd.page_offsets)} given, {num_pages} chunks expected")
        elif why := missing(tuple(s.slice for s in offer.sources), shape.num_layers, shape.num_kv_heads):
            self._refuse(why)
        else:
            self._offer = offer

    def wanted(self) -> Offer | None:
        """The offer, once: when there is something to read, and staging is to be acquired for it."""
        if self._wanted or not self._pieces or self.settled:
            return None
        self._wanted = True
        return self._offer

    def opened(self) -> tuple[Piece, ...]:
        """Every rank holds its share of staging. Returns the pieces that were announced meanwhile, to be fetched."""
        if self.settled or self.state is not RecvState.QUEUED:
            return ()
        self.state = RecvState.FETCHING
        waiting, self._waiting = tuple(self._waiting), []
        return waiting

    def ready(self, pieces: Iterable[Piece]) -> tuple[Piece, ...]:
        """Pieces that may be read. Returns those to be fetched now: the new ones, once staging is held.

        Outside the offer's ranks, layers or chunks, or with digests other than before, they refuse the transfer.
        """
        if self.settled or self.state not in (RecvState.QUEUED, RecvState.FETCHING):
            return ()
        new: list[Piece] = []
        slices = {s.slice.rank: s.slice for s in self._offer.sources} if self._offer is not None else {}
        chunks = num_chunks(self.expected.num_tokens)
        for piece in pieces:
            source = slices.get(piece.rank)
            split = piece.by_chunk(source.num_kv_heads) if source is not None else []
            last = split[-1].chunk if split else piece.chunk
            if source is None or piece.layer not in source.layers or not 0 <= piece.chunk <= last < chunks:
                self._refuse(f"pieces: there is no rank {piece.rank}, layer {piece.layer}, chunk {last}")
            elif not split:
                self._refuse(f"pieces: {len(piece.digests)} digests for {source.num_kv_heads} KV heads")
            else:
                unknown = [each for each in split if self._is_new(each)]
                new += [piece] if len(unknown) == len(split) else unknown
        if self.error is not None:
            return ()
        if self.state is not RecvState.FETCHING:
            self._waiting += new
            return ()
        return tuple(new)

    def sampled(self, first: FirstToken) -> None:
        """Prefill's token. It may come again, the same."""
        if self.first is None:
            self.first = first
        elif self.first != first and not self.settled:
            self._refuse("first_token: changed during the transfer")

    def fetched(self, rank: int) -> None:
        """This rank has all it needs, verified. With the last rank the transfer is verified."""
        if self.state is RecvState.FETCHING and self.error is None:
            self._fetched.add(rank)
            if len(self._fetched) == self.num_ranks:
                self.state = RecvState.VERIFIED

    def loaded(self, rank: int) -> None:
        """This rank's engine has the KV in its blocks. With the last rank the transfer is loaded."""
        if self.state is RecvState.VERIFIED and self.error is None:
            self._loaded.add(rank)
            if len(self._loaded) == self.num_ranks:
                self.state = RecvState.LOADED

    def fetch_ended(self, error: HexgenError | None) -> bool:
        """FetchKv ended (``error``: not by OK). Whether to call it again; what is here and verified stays.

        Prefill keeps the call open as long as it holds the KV, so an end before that means that the KV is gone;
        only a connection that broke says nothing of the kind.
        """
        if self.settled:
            return False
        if isinstance(error, Unavailable) and self.num_fetches < MAX_FETCHES:
            self.num_fetches += 1
            return True
        self.fail(error or Unavailable("prefill ended the transfer before all of it had arrived"))
        return False

    def fail(self, error: HexgenError) -> None:
        """Nothing of it may be used any more. What the engine has loaded stays loaded; the first reason counts."""
        if self.error is None and self.state is not RecvState.LOADED:
            self.error = error
            refused = isinstance(error, TransferRefused | KvCorrupt)
            self.state = RecvState.REFUSED if refused else RecvState.ABORTED

    def expire(self, now: float) -> None:
        """Fail when the deadline has passed."""
        if now >= self.deadline:
            self.fail(DeadlineExceeded(f"the deadline passed while the KV was {self.state}"))

    def end(self) -> None:
        """The Decode call ended."""
        if self.state not in (RecvState.LOADED, RecvState.REFUSED):
            self.state = RecvState.ABORTED

    def _is_new(self, piece: Piece) -> bool:
        """Take note of one chunk's; one that was another before refuses the transfer."""
        key = (piece.rank, piece.layer, piece.chunk)
        known = self._pieces.get(key)
        if known is None:
            self._pieces[key] = piece
        elif known != piece:
            self._refuse(f"pieces: rank {piece.rank}, layer {piece.layer}, chunk {piece.chunk} changed")
        return known is None

    def _refuse(self, why: str) -> None:
        self.fail(TransferRefused(why))
