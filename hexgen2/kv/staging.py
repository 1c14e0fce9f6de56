"""Staging of one rank: each piece that has landed (``kv.reads``) is copied once to a private page and digested there,
so that what was verified is what is loaded, whatever still happens to the slot it landed in.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from threading import Lock
from time import perf_counter
from typing import Literal

import torch

from hexgen2.kv.codec import to_wire
from hexgen2.kv.layout import Pick, plan_picks
from hexgen2.kv.messages import Failed, Fetched, OpenRecv, Piece, RouteShare, Source, ToService
from hexgen2.kv.pieces import TORCH_DTYPE, PieceFormat
from hexgen2.kv.quantise import Coder
from hexgen2.kv.reads import Claim, Reads
from hexgen2.kv.transport import Transport
from hexgen2.kv.wire import CHUNK_TOKENS, PageLayout, chunk_span, num_chunks


@dataclass(slots=True)
class _Recv:
    """One transfer's share of staging."""

    request: OpenRecv
    format: PieceFormat
    sources: dict[int, Source]
    #: The senders' pages, by rank.
    layouts: dict[int, PageLayout]
    picks: dict[tuple[int, int], list[Pick]]
    num_remaining: int
    claim: Claim = field(default_factory=Claim)
    num_bytes: int = 0
    num_pieces: int = 0
    verify_s: float = 0.0
    open: bool = True
    loading: bool = False
    failed: bool = False

    @property
    def verified(self) -> bool:
        return self.num_remaining == 0 and not self.failed


@dataclass(frozen=True, slots=True)
class _Job:
    """One contiguous read (``kv.reads.Readable``): some heads of one (layer, chunk)."""

    recv: _Recv
    pick: Pick
    chunk: int
    num_tokens: int
    source: Source
    remote_offset: int
    num_bytes: int
    digests: tuple[int, ...]

    @property
    def claim(self) -> Claim:
        return self.recv.claim

    @property
    def peer(self) -> tuple[bytes, ...]:
        return self.source.endpoints


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
    ) -> None:
        self.layout = layout
        self.device = device
        self.num_pages = staging_bytes // layout.page_bytes
        self.reads: Reads[_Job] = Reads(transports, landing_bytes, layout.slot_bytes, device, stall_s)
        self._transports = tuple(transports)
        pages = torch.empty(self.num_pages * layout.page_bytes, dtype=torch.uint8, device=device)
        self._values = pages.view(TORCH_DTYPE[layout.shape.dtype])
        self._recvs: dict[str, _Recv] = {}
        self._lock = Lock()
        # The agent's thread's: it alone verifies.
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
            source = recv.sources[piece.rank]
            theirs = recv.layouts[piece.rank]
            start, stop = chunk_span(piece.chunk, recv.request.num_tokens)
            per_head = recv.format.head_bytes(stop - start)
            for pick in recv.picks.get((piece.rank, piece.layer), ()):
                first = pick.first_kv_head - source.slice.first_kv_head
                self.reads.add(
                    _Job(
                        recv=recv,
                        pick=pick,
                        chunk=piece.chunk,
                        num_tokens=stop - start,
                        source=source,
                        remote_offset=source.page_offsets[piece.chunk]
                        + theirs.piece_offset(piece.layer)
                        + first * per_head,
                        num_bytes=pick.num_kv_heads * per_head,
                        digests=piece.digests[first : first + pick.num_kv_heads],
                    )
                )

    def turn(self) -> list[ToService]:
        """Post reads, verify what has landed, report what is complete or broken."""
        messages: list[ToService] = []
        for job, landed in self.reads.poll():
            messages += self._verify(job, landed)
        for job, why in self.reads.pump():
            messages += self._fail(job.recv, "lost", why)
        return messages

    def close(self, transfer_id: str) -> bool:
        """Give the transfer up. False while the engine is copying from it: ask again after ``unpin``."""
        with self._lock:
            recv = self._recvs.get(transfer_id)
            if recv is None:
                return True
            recv.open = False
            self.reads.drop(recv.claim)
            if recv.loading:
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
        at = (page * self.layout.page_bytes + self.layout.piece_offset(layer)) // self._values.element_size()
        row = num_tokens * head_dim
        # One call into torch: pieces are small enough for each to count.
        return self._values.as_strided((heads, 2, num_tokens, head_dim), (2 * row, row, head_dim, 1), at)

    def _verify(self, job: _Job, landed: torch.Tensor) -> list[ToService]:
        recv, pick = job.recv, job.pick
        began = perf_counter()
        first = pick.first_kv_head - self.layout.slice.first_kv_head
        target = self.piece(recv.request.pages[job.chunk], pick.layer, job.num_tokens)[
            first : first + pick.num_kv_heads
        ]
        encoded = landed.view(pick.num_kv_heads, -1)
        digests = to_wire(
            recv.format.read(target, encoded, layer=pick.layer, chunk=job.chunk, first_head=pick.first_kv_head)
        )
        recv.verify_s += perf_counter() - began
        if digests != job.digests:
            where = f"layer {pick.layer}, chunk {job.chunk}, rank {pick.rank}"
            return self._fail(recv, "corrupt", f"digest mismatch at {where}")
        recv.num_remaining -= 1
        recv.num_bytes += job.num_bytes
        recv.num_pieces += 1
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
