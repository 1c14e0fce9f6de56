"""The sending side of KV hand-offs: each transfer's state, what its readers get next, and which ids are used up. Pure.

QUEUED -> HELD -> PRODUCING -> PRODUCED -> RELEASED      | ABORTED from any

Messages may be late, repeated or out of order: whatever does not fit the state is ignored when it is harmless
and refused when it is not. Time comes in as ``now``, seconds of one clock.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from hmac import compare_digest
from math import inf

from hexgen2.errors import (
    DeadlineExceeded,
    EngineFailed,
    HexgenError,
    InvalidRequest,
    TransferEnded,
    TransferNotFound,
)
from hexgen2.kv.handoff import FetchMessage, FirstToken, Header, Offer
from hexgen2.kv.messages import Piece, Source
from hexgen2.kv.wire import RankSlice, num_chunks

#: Ended transfers that are remembered, the newest: a minute and more of them at any rate that one replica reaches.
MAX_ENDED = 16_384


class SendState(StrEnum):
    """See the module."""

    QUEUED = "queued"
    HELD = "held"
    PRODUCING = "producing"
    PRODUCED = "produced"
    RELEASED = "released"
    ABORTED = "aborted"


@dataclass(slots=True)
class SendTransfer:
    """One transfer. ``pieces`` is a log: every reader of FetchKv follows it from its beginning."""

    transfer_id: str
    token: bytes
    header: Header
    slices: Sequence[RankSlice]
    #: When the Prefill call that owns it is over at the latest.
    deadline: float = inf
    state: SendState = SendState.QUEUED
    sources: tuple[Source, ...] = ()
    pieces: list[Piece] = field(default_factory=list)
    first: FirstToken | None = None
    #: Why the call that owns it must end, once there is a reason.
    error: HexgenError | None = None
    _seen: set[tuple[int, int, int]] = field(default_factory=set)

    @property
    def complete(self) -> bool:
        """Whether all chunks of all layers of all ranks are announced."""
        return len(self._seen) == num_chunks(self.header.num_tokens) * sum(s.num_layers for s in self.slices)

    @property
    def over(self) -> bool:
        """Whether its memory is given up."""
        return self.state in (SendState.RELEASED, SendState.ABORTED)

    def hold(self, sources: tuple[Source, ...]) -> None:
        """Every rank holds its pages; ``sources`` says where."""
        if self.state is SendState.QUEUED:
            self.state = SendState.HELD
            self.sources = sources

    def ready(self, pieces: Iterable[Piece]) -> None:
        """Pieces lie complete in a rank's send buffer. Late and repeated ones change nothing."""
        if self.state not in (SendState.HELD, SendState.PRODUCING):
            return
        self.state = SendState.PRODUCING
        slices = {s.rank: s for s in self.slices}
        for piece in pieces:
            held = slices.get(piece.rank)
            chunks = piece.by_chunk(held.num_kv_heads) if held is not None and piece.layer in held.layers else []
            if not chunks or chunks[-1].chunk >= num_chunks(self.header.num_tokens):
                where = f"layer {piece.layer}, chunk {piece.chunk}"
                self.fail(EngineFailed(f"rank {piece.rank} announced {where}, which it has not"))
                continue
            new = [each for each in chunks if (each.rank, each.layer, each.chunk) not in self._seen]
            self._seen.update((each.rank, each.layer, each.chunk) for each in new)
            self.pieces += [piece] if len(new) == len(chunks) else new
        if self.complete:
            self.state = SendState.PRODUCED

    def sampled(self, first: FirstToken) -> None:
        """The engine has made the first token."""
        self.first = self.first or first

    def fail(self, error: HexgenError) -> None:
        """It cannot go on. The first reason counts."""
        self.error = self.error or error

    def expire(self, now: float) -> None:
        """Fail when the deadline has passed."""
        if now >= self.deadline:
            self.fail(DeadlineExceeded(f"the deadline passed while transfer {self.transfer_id} was {self.state}"))

    def end(self) -> None:
        """The Prefill call ended. It is a release when everything had been produced, else an abort."""
        if not self.over:
            self.state = SendState.RELEASED if self.state is SendState.PRODUCED else SendState.ABORTED


@dataclass(slots=True)
class Reader:
    """One FetchKv call: the offer, pieces in the order in which they became ready, the first token as it comes."""

    transfer: SendTransfer
    _offered: bool = False
    _num_sent: int = 0
    _first_sent: bool = False

    @property
    def over(self) -> bool:
        """Whether nothing follows.

        While the KV is held the call stays open after the last message: reads of what was announced may still run,
        and its keepalive watches over them.
        """
        first = self.transfer.first
        if self._first_sent and first is not None and first.finish_reason is not None:
            return True
        return self.transfer.over and self._complete

    def next(self) -> FetchMessage | None:
        """The next message; None when there is none now.

        Raises:
            TransferEnded: the Prefill call ended before everything was sent.
        """
        transfer = self.transfer
        if not self._offered and not transfer.over and transfer.state is not SendState.QUEUED:
            self._offered = True
            return Offer(transfer.header, transfer.sources)
        if self._offered and transfer.first is not None and not self._first_sent:
            self._first_sent = True
            return transfer.first
        if transfer.over and not self._complete:
            raise TransferEnded(f"transfer {transfer.transfer_id} ended before all of it was sent")
        new = tuple(transfer.pieces[self._num_sent :]) if self._offered else ()
        self._num_sent += len(new)
        return new or None

    @property
    def _complete(self) -> bool:
        return self._first_sent and self.transfer.complete and self._num_sent == len(self.transfer.pieces)


class SendTransfers:
    """All transfers that leave a replica, and a bounded memory of those that have ended.

    Invariant: an id is open or ended, never both, and serves one token only.
    """

    def __init__(self, max_ended: int = MAX_ENDED) -> None:
        self._max_ended = max_ended
        self._open: dict[str, SendTransfer] = {}
        self._ended: OrderedDict[str, bytes] = OrderedDict()

    def __len__(self) -> int:
        """Transfers that are open."""
        return len(self._open)

    def open(self, transfer: SendTransfer) -> None:
        """A Prefill call begins.

        Raises:
            InvalidRequest: a transfer of that id is under way.
            TransferEnded: one of that id was.
        """
        if transfer.transfer_id in self._open:
            raise InvalidRequest("transfer.transfer_id", "a transfer of that id is under way")
        if transfer.transfer_id in self._ended:
            raise TransferEnded(f"transfer {transfer.transfer_id} is used up: each Prefill call needs an id of its own")
        self._open[transfer.transfer_id] = transfer

    def find(self, transfer_id: str, token: bytes, now: float, until: float) -> SendTransfer | None:
        """The transfer to read; None while its Prefill call may still come, until ``until``.

        Raises:
            TransferNotFound: no such transfer, or another token is its token.
            TransferEnded: it was here, and the token was its token.
        """
        transfer = self._open.get(transfer_id)
        known = transfer.token if transfer is not None else self._ended.get(transfer_id)
        if known is None and now < until:
            return None
        if known is None or not compare_digest(known, token):
            raise TransferNotFound(f"no transfer {transfer_id} is held here for that token")
        if transfer is None or transfer.over:
            raise TransferEnded(f"transfer {transfer_id} has ended: its token is used up")
        return transfer

    def close(self, transfer_id: str) -> None:
        """The Prefill call is over and its memory free. Idempotent."""
        transfer = self._open.pop(transfer_id, None)
        if transfer is not None:
            self._ended[transfer_id] = transfer.token
            if len(self._ended) > self._max_ended:
                self._ended.popitem(last=False)
