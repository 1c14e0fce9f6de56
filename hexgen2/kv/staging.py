"""Staging of one rank: each piece that has landed (``kv.reads``) is in a private page once it is digested, so that what
was verified is what is loaded. It is copied there from its slot, which may be written again, or it has landed there.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import chain, islice, takewhile
from threading import Lock
from time import perf_counter
from typing import Literal

import torch

from hexgen2.kv.codec import to_wire
from hexgen2.kv.layout import Pick, plan_picks
from hexgen2.kv.messages import Failed, Fetched, OpenRecv, Piece, RouteShare, Source, ToService
from hexgen2.kv.pieces import TORCH_DTYPE, PieceFormat
from hexgen2.kv.quantise import Coder
from hexgen2.kv.reads import Bundle, Claim, Part, Reads, Slots
from hexgen2.kv.transport import Transport
from hexgen2.kv.verifying import Verifier
from hexgen2.kv.wire import CHUNK_TOKENS, PageLayout, chunk_span, num_chunks

#: Less than so much is verified sooner than another thread is woken.
_HERE_BYTES = 256 << 10


@dataclass(slots=True)
class _Recv:
    """One transfer's share of staging."""

    request: OpenRecv
    format: PieceFormat
    sources: dict[int, Source]
    #: The senders' pages, by rank.
    layouts: dict[int, PageLayout]
    picks: dict[tuple[int, int], list[Pick]]
    #: Parts that are not verified yet.
    num_remaining: int
    claim: Claim = field(default_factory=Claim)
    num_bytes: int = 0
    num_pieces: int = 0
    verify_s: float = 0.0
    open: bool = True
    loading: bool = False
    #: Bundles with pieces of it that are being copied to its pages.
    num_verifying: int = 0
    failed: bool = False

    @property
    def verified(self) -> bool:
        return self.num_remaining == 0 and not self.failed


@dataclass(slots=True, eq=False)
class _Job:
    """What is to be read (``kv.reads.Readable``): some heads of one layer of consecutive chunks, a part for each."""

    recv: _Recv
    pick: Pick
    #: The first.
    chunk: int
    source: Source
    parts: list[Part]
    #: As announced, part by part.
    digests: tuple[int, ...]
    #: Where the parts are to stay, in bytes of ``Reads.landing``.
    pages_at: list[int]

    @property
    def claim(self) -> Claim:
        return self.recv.claim

    @property
    def peer(self) -> tuple[bytes, ...]:
        return self.source.endpoints

    @property
    def num_bytes(self) -> int:
        # Of all parts but the prompt's last, which may be short, alike.
        return self.parts[0].num_bytes * (len(self.parts) - 1) + self.parts[-1].num_bytes

    def split(self, count: int) -> "tuple[_Job, _Job]":
        num = count * self.pick.num_kv_heads
        return (
            replace(self, parts=self.parts[:count], digests=self.digests[:num], pages_at=self.pages_at[:count]),
            replace(
                self,
                chunk=self.chunk + count,
                parts=self.parts[count:],
                digests=self.digests[num:],
                pages_at=self.pages_at[count:],
            ),
        )

    def num_tokens(self, part: int) -> int:
        """Tokens of a part."""
        start, stop = chunk_span(self.chunk + part, self.recv.request.num_tokens)
        return stop - start


@dataclass(frozen=True, slots=True)
class _Verified:
    """Of one job: the digests of its parts in their pages, as they travel, and how long it took."""

    digests: tuple[int, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class StagedKv:
    """Verified KV of one transfer, as this rank needs it."""

    num_tokens: int
    #: In which it came.
    codec: str
    _staging: "Staging"
    _pages: tuple[int, ...]

    def layer(self, layer: int) -> torch.Tensor:
        """``[kv_head, 2 (K, V), token, head_dim]`` of one (global) layer, this rank's heads, all tokens."""
        pieces = [
            self._staging.piece(page, layer, stop - start)
            for page, (start, stop) in zip(
                self._pages,
                (chunk_span(c, self.num_tokens) for c in range(num_chunks(self.num_tokens))),
                strict=True,
            )
        ]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


class Staging:
    """The agent's thread calls everything but ``staged`` and ``unpin``, which belong to the engine's forward thread."""

    def __init__(
        self,
        layout: PageLayout,
        transports: Sequence[Transport],
        device: torch.device,
        *,
        staging_bytes: int,
        landing_bytes: int,
        stall_s: float,
        wake: Callable[[], None] | None = None,
    ) -> None:
        """``wake``: called by another thread when ``turn`` has something to do; None: there is no other thread."""
        self.layout = layout
        self.device = device
        self.num_pages = staging_bytes // layout.page_bytes
        pages_bytes = self.num_pages * layout.page_bytes
        self.reads: Reads[_Job] = Reads(
            transports, landing_bytes, layout.slot_bytes, device, stall_s, stay_bytes=pages_bytes
        )
        self._transports = tuple(transports)
        memory = self.reads.landing
        self._values = memory.view(TORCH_DTYPE[layout.shape.dtype])
        self._memory_at = memory.data_ptr()
        # Asked for with each piece, and each a product of products.
        self._page_bytes, self._head_token_bytes = layout.page_bytes, layout.head_bytes_per_token
        self._recvs: dict[str, _Recv] = {}
        self._lock = Lock()
        self._verifier: Verifier[Bundle[_Job], list[_Verified]] = Verifier(self._verify, wake)
        # Whoever verifies uses it: never two threads at once.
        self._make_coder = lru_cache(maxsize=8)(Coder)

    def open(self, request: OpenRecv) -> None:
        """Hold the pages of one transfer.

        Raises:
            TransferRefused: the sources do not cover what this rank holds.
        """
        # Written by the sender, of its dtype.
        shape = replace(self.layout.shape, dtype=request.dtype)
        piece_format = PieceFormat(request.token, request.codec, shape, self.device, self._make_coder)
        most_heads = self.layout.slot_bytes // piece_format.head_bytes(CHUNK_TOKENS)
        picks: dict[tuple[int, int], list[Pick]] = {}
        for pick in plan_picks([s.slice for s in request.sources], self.layout.slice, most_heads):
            picks.setdefault((pick.rank, pick.layer), []).append(pick)
        self._recvs[request.transfer_id] = _Recv(
            request=request,
            format=piece_format,
            sources={s.slice.rank: s for s in request.sources},
            layouts={s.slice.rank: PageLayout(shape, s.slice) for s in request.sources},
            picks=picks,
            num_remaining=sum(map(len, picks.values())) * num_chunks(request.num_tokens),
        )

    def fetch(self, transfer_id: str, pieces: Iterable[Piece]) -> None:
        """Queue the reads of what this rank needs of ``pieces``."""
        recv = self._recvs.get(transfer_id)
        if recv is None or not recv.open:
            return
        for piece in pieces:
            for pick in recv.picks.get((piece.rank, piece.layer), ()):
                self.reads.add(self._job(recv, piece, pick))

    def _job(self, recv: _Recv, piece: Piece, pick: Pick) -> _Job:
        """What of ``piece`` this rank needs for ``pick``."""
        source, theirs, request = recv.sources[piece.rank], recv.layouts[piece.rank], recv.request
        num_heads = source.slice.num_kv_heads
        first = pick.first_kv_head - source.slice.first_kv_head
        ours = pick.first_kv_head - self.layout.slice.first_kv_head
        stays = recv.format.keeps(self._values.dtype)
        layer_at, their_layer_at = self._at(0, piece.layer), theirs.piece_offset(piece.layer)
        parts, pages_at = [], []
        for chunk in range(piece.chunk, piece.end(num_heads)):
            start, stop = chunk_span(chunk, request.num_tokens)
            per_head = recv.format.head_bytes(stop - start)
            to = layer_at + request.pages[chunk] * self._page_bytes + ours * self._head_token_bytes * (stop - start)
            of = source.page_offsets[chunk] + their_layer_at + first * per_head
            parts.append(Part(of, pick.num_kv_heads * per_head, to if stays else None))
            pages_at.append(to)
        digests = piece.digests
        if pick.num_kv_heads < num_heads:
            firsts = range(first, len(digests), num_heads)
            digests = tuple(chain.from_iterable(digests[at : at + pick.num_kv_heads] for at in firsts))
        return _Job(recv, pick, piece.chunk, source, parts, digests, pages_at)

    def turn(self) -> list[ToService]:
        """Post reads, verify what has landed, report what is complete or broken."""
        messages: list[ToService] = []
        for bundle in self.reads.poll():
            for recv in _recvs_of(bundle):
                recv.num_verifying += 1
            self._verifier.give(bundle, here=bundle.read.num_bytes < _HERE_BYTES or not self.reads.busy)
        for bundle, outcome in self._verifier.collect():
            self.reads.free(bundle)
            for recv in _recvs_of(bundle):
                recv.num_verifying -= 1
            for (job, _), verified in zip(bundle.pieces, outcome, strict=True):
                messages += self._settle(job, verified)
        for job, why in self.reads.pump():
            messages += self._fail(job.recv, "lost", why)
        return messages

    def stop(self) -> None:
        """Nothing will be verified any more. Idempotent."""
        self._verifier.stop()

    def close(self, transfer_id: str) -> bool:
        """Give the transfer up. False while something reads or writes its pages: ask again after a ``turn``."""
        with self._lock:
            recv = self._recvs.get(transfer_id)
            if recv is None:
                return True
            recv.open = False
            self.reads.drop(recv.claim)
            if recv.loading or recv.num_verifying or recv.claim.num_direct:
                return False
            del self._recvs[transfer_id]
            return True

    def staged(self, transfer_id: str) -> StagedKv | None:
        """The verified KV, pinned until ``unpin``; None when the transfer is closed or not verified."""
        with self._lock:
            recv = self._recvs.get(transfer_id)
            if recv is None or not recv.open or not recv.verified:
                return None
            recv.loading = True
            return StagedKv(recv.request.num_tokens, recv.request.codec, self, recv.request.pages)

    def unpin(self, transfer_id: str) -> None:
        """The engine reads the pages no more."""
        with self._lock:
            recv = self._recvs.get(transfer_id)
            if recv is not None:
                recv.loading = False

    def piece(self, page: int, layer: int, num_tokens: int) -> torch.Tensor:
        """View of ``[kv_head, 2, token, head_dim]`` in a page."""
        heads, head_dim = self.layout.slice.num_kv_heads, self.layout.shape.head_dim
        at = self._at(page, layer)
        row = num_tokens * head_dim
        # One call into torch: pieces are small enough for each to count.
        return self._values.as_strided(
            (heads, 2, num_tokens, head_dim), (2 * row, row, head_dim, 1), at // self._values.itemsize
        )

    def _at(self, page: int, layer: int) -> int:
        """Where a layer of a page begins in ``Reads.landing``."""
        return self.reads.stays_from + page * self._page_bytes + self.layout.piece_offset(layer)

    def _verify(self, bundle: "Bundle[_Job]") -> "list[_Verified]":
        """Copy each part to its page, if it is not there, and digest it there. Runs in any thread."""
        verified: list[_Verified] = []
        pieces = bundle.pieces
        while len(verified) < len(pieces):
            recv = pieces[len(verified)][0].recv
            same = list(takewhile(lambda piece: piece[0].recv is recv, pieces[len(verified) :]))  # noqa: B023, used at once
            began = perf_counter()
            digests = self._move(recv, same)
            seconds = (perf_counter() - began) / len(same)
            verified += (_Verified(each, seconds) for each in digests)
        return verified

    def _move(self, recv: _Recv, pieces: "list[tuple[_Job, Slots]]") -> list[tuple[int, ...]]:
        """The digests of each job's parts in their pages."""
        if recv.format.keeps(self._values.dtype):
            moves = [
                recv.format.as_move(
                    self._memory_at + to,
                    self._memory_at + of,
                    job.pick.num_kv_heads,
                    job.num_tokens(part),
                    layer=job.pick.layer,
                    chunk=job.chunk + part,
                    first_head=job.pick.first_kv_head,
                )
                for job, slots in pieces
                for part, (to, of) in enumerate(zip(job.pages_at, self.reads.offsets(job, slots), strict=True))
            ]
            digests = recv.format.move(moves)
            if digests is not None:
                heads = iter(digests)
                return [tuple(islice(heads, len(job.digests))) for job, _ in pieces]
        return [self._read(recv.format, job, self.reads.offsets(job, slots)) for job, slots in pieces]

    def _read(self, form: PieceFormat, job: _Job, offsets: list[int]) -> tuple[int, ...]:
        pick = job.pick
        first = pick.first_kv_head - self.layout.slice.first_kv_head
        digests: list[int] = []
        for number, at in enumerate(offsets):
            chunk = job.chunk + number
            page = self.piece(job.recv.request.pages[chunk], pick.layer, job.num_tokens(number))
            encoded = self.reads.landing[at : at + job.parts[number].num_bytes].view(pick.num_kv_heads, -1)
            target = page[first : first + pick.num_kv_heads]
            of = form.read(target, encoded, layer=pick.layer, chunk=chunk, first_head=pick.first_kv_head)
            digests += to_wire(of)
        return tuple(digests)

    def _settle(self, job: _Job, verified: "_Verified") -> list[ToService]:
        """Take note of what was verified, or was not what was announced."""
        recv, pick = job.recv, job.pick
        recv.verify_s += verified.seconds
        if verified.digests != job.digests:
            wrong = next(n for n, (a, b) in enumerate(zip(verified.digests, job.digests, strict=True)) if a != b)
            where = f"layer {pick.layer}, chunk {job.chunk + wrong // pick.num_kv_heads}, rank {pick.rank}"
            return self._fail(recv, "corrupt", f"digest mismatch at {where}")
        recv.num_remaining -= len(job.parts)
        recv.num_bytes += job.num_bytes
        recv.num_pieces += len(job.parts)
        if recv.num_remaining:
            return []
        detail = ", ".join(dict.fromkeys(transport.describe() for transport in self._transports))
        routes = tuple(RouteShare(n, use.num_bytes, use.began_ns, use.ended_ns) for n, use in recv.claim.routes.items())
        return [Fetched(recv.request.transfer_id, recv.num_bytes, recv.num_pieces, recv.verify_s, detail, routes)]

    def _fail(self, recv: _Recv, reason: Literal["corrupt", "lost"], detail: str) -> list[ToService]:
        if recv.failed:
            return []
        recv.failed = True
        self.reads.drop(recv.claim)
        return [Failed(recv.request.transfer_id, reason, detail)]


def _recvs_of(bundle: Bundle[_Job]) -> Iterable[_Recv]:
    """Each once."""
    return {id(job.recv): job.recv for job, _ in bundle.pieces}.values()
