"""The memory that KV arrives in, on one rank. Reads land in registered slots; each piece is then copied once to private
staging and digested there, so that what was verified is what is loaded, whatever still happens to a slot.

A slot whose read is not known to be over is never reused, also when its transfer is closed: it is in quarantine.
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from threading import Lock
from time import perf_counter
from typing import Literal

import torch

from hexgen2.kv.codec import DigestKey, copy_and_digest, to_wire
from hexgen2.kv.layout import Pick, plan_picks
from hexgen2.kv.messages import Failed, Fetched, OpenRecv, Piece, Source, ToService
from hexgen2.kv.transport import Span, Transport, TransportError
from hexgen2.kv.wire import PageLayout, chunk_span, num_chunks

#: Reads are posted in bundles of at most so many pieces: few enough to overlap reading with verifying.
MAX_PIECES_PER_READ = 32

_TORCH_DTYPE = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(slots=True)
class _Recv:
    """One transfer's share of staging."""

    request: OpenRecv
    key: DigestKey
    sources: dict[int, Source]
    picks: dict[tuple[int, int], list[Pick]]
    num_remaining: int
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
    """One contiguous read: some heads of one (layer, chunk)."""

    recv: _Recv
    pick: Pick
    chunk: int
    num_tokens: int
    source: Source
    remote_offset: int
    num_bytes: int
    digests: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StagedKv:
    """Verified KV of one transfer, as this rank needs it."""

    num_tokens: int
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


@dataclass(slots=True)
class Staging:
    """``landing`` is registered with the transport; ``pages`` is not. The agent's thread calls everything but
    ``staged`` and ``unpin``, which belong to the engine's forward thread."""

    layout: PageLayout
    transport: Transport
    device: torch.device
    staging_bytes: int
    landing_bytes: int
    num_pages: int = field(init=False)
    landing: torch.Tensor = field(init=False)
    _pages: torch.Tensor = field(init=False)
    _slots: list[int] = field(init=False)
    _num_slots: int = field(init=False)
    _recvs: dict[str, _Recv] = field(default_factory=dict)
    #: By peer, first come first served; peers take turns.
    _jobs: OrderedDict[bytes, deque[_Job]] = field(default_factory=OrderedDict)
    _slots_of: Counter[bytes] = field(default_factory=Counter)
    _reads: dict[int, list[tuple[_Job, int]]] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    def __post_init__(self) -> None:
        self.num_pages = self.staging_bytes // self.layout.page_bytes
        self._pages = torch.empty(self.num_pages * self.layout.page_bytes, dtype=torch.uint8, device=self.device)
        self._num_slots = self.landing_bytes // self.layout.layer_stride
        self.landing = torch.empty(self._num_slots * self.layout.layer_stride, dtype=torch.uint8, device=self.device)
        self._slots = list(range(self._num_slots))

    @property
    def quarantine_bytes(self) -> int:
        """Landing memory that reads of closed transfers may still write."""
        jobs = (job for read in self._reads.values() for job, _ in read)
        return sum(self.layout.layer_stride for job in jobs if not job.recv.open)

    @property
    def num_reading(self) -> int:
        """Reads that are not over."""
        return len(self._reads)

    def open(self, request: OpenRecv) -> None:
        """Hold the pages of one transfer.

        Raises:
            TransferRefused: the sources do not cover what this rank holds.
        """
        picks: dict[tuple[int, int], list[Pick]] = {}
        for pick in plan_picks([s.slice for s in request.sources], self.layout.slice):
            picks.setdefault((pick.rank, pick.layer), []).append(pick)
        self._recvs[request.transfer_id] = _Recv(
            request=request,
            key=DigestKey.for_shape(request.token, self.layout.shape, self.device),
            sources={s.slice.rank: s for s in request.sources},
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
            theirs = PageLayout(self.layout.shape, source.slice)
            start, stop = chunk_span(piece.chunk, recv.request.num_tokens)
            per_head = theirs.head_bytes_per_token * (stop - start)
            for pick in recv.picks.get((piece.rank, piece.layer), ()):
                first = pick.first_kv_head - source.slice.first_kv_head
                self._jobs.setdefault(source.endpoint, deque()).append(
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

    def pump(self) -> list[ToService]:
        """Post what fits the free slots, bundled by peer, peers in turn; messages of what cannot be posted."""
        messages: list[ToService] = []
        for endpoint in list(self._jobs):
            bundle = self._bundle(endpoint)
            if not bundle:
                continue
            spans = [Span(job.remote_offset, slot * self.layout.layer_stride, job.num_bytes) for job, slot in bundle]
            try:
                self._reads[self.transport.read(endpoint, spans)] = bundle
            except TransportError as error:
                self._free(bundle)
                messages += self._fail((job.recv for job, _ in bundle), "lost", str(error))
        return messages

    def _bundle(self, endpoint: bytes) -> list[tuple[_Job, int]]:
        """The next pieces to read from one peer, each with its slot. The peer goes to the end of the line."""
        # A peer that is slow or stopped may hold half of the slots, never all: the others' transfers go on.
        share = max(1, self._num_slots // 2) - self._slots_of[endpoint]
        jobs = self._jobs.pop(endpoint)
        bundle: list[tuple[_Job, int]] = []
        while jobs and self._slots and len(bundle) < min(share, MAX_PIECES_PER_READ):
            job = jobs.popleft()
            if job.recv.open and not job.recv.failed:
                bundle.append((job, self._slots.pop()))
        self._slots_of[endpoint] += len(bundle)
        if jobs:
            self._jobs[endpoint] = jobs
        return bundle

    def _free(self, bundle: list[tuple[_Job, int]]) -> None:
        """Nothing writes these slots any more."""
        for job, slot in bundle:
            self._slots.append(slot)
            self._slots_of[job.source.endpoint] -= 1
            if not self._slots_of[job.source.endpoint]:
                del self._slots_of[job.source.endpoint]

    def over(self, handle: int, error: TransportError | None) -> list[ToService]:
        """A read is over: verify what came, free its slots, report what is complete or broken."""
        bundle = self._reads.pop(handle)
        try:
            if error is not None:
                return self._fail((job.recv for job, _ in bundle if job.recv.open), "lost", str(error))
            messages: list[ToService] = []
            for job, slot in bundle:
                if job.recv.open and not job.recv.failed:
                    messages += self._verify(job, slot)
            return messages
        finally:
            self._free(bundle)

    def close(self, transfer_id: str) -> bool:
        """Give the transfer up. False while the engine is copying from it: ask again after ``unpin``."""
        with self._lock:
            recv = self._recvs.get(transfer_id)
            if recv is None:
                return True
            recv.open = False
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
            return StagedKv(recv.request.num_tokens, self, recv.request.pages)

    def unpin(self, transfer_id: str) -> None:
        """The engine reads the pages no more."""
        with self._lock:
            recv = self._recvs.get(transfer_id)
            if recv is not None:
                recv.loading = False

    def piece(self, page: int, layer: int, num_tokens: int) -> torch.Tensor:
        """View of ``[kv_head, 2, token, head_dim]`` in a page."""
        at = page * self.layout.page_bytes + self.layout.piece_offset(layer)
        flat = self._pages[at : at + self.layout.piece_bytes(num_tokens)].view(_TORCH_DTYPE[self.layout.shape.dtype])
        return flat.view(self.layout.slice.num_kv_heads, 2, num_tokens, self.layout.shape.head_dim)

    def _verify(self, job: _Job, slot: int) -> Sequence[ToService]:
        recv, pick = job.recv, job.pick
        began = perf_counter()
        first = pick.first_kv_head - self.layout.slice.first_kv_head
        target = self.piece(recv.request.pages[job.chunk], pick.layer, job.num_tokens)[
            first : first + pick.num_kv_heads
        ]
        at = slot * self.layout.layer_stride
        landed = self.landing[at : at + job.num_bytes].view(target.dtype).view(target.shape)
        digests = to_wire(
            copy_and_digest(target, landed, recv.key, layer=pick.layer, chunk=job.chunk, first_head=pick.first_kv_head)
        )
        recv.verify_s += perf_counter() - began
        if digests != job.digests:
            where = f"layer {pick.layer}, chunk {job.chunk}, rank {pick.rank}"
            return self._fail((recv,), "corrupt", f"digest mismatch at {where}")
        recv.num_remaining -= 1
        recv.num_bytes += job.num_bytes
        recv.num_pieces += 1
        if recv.num_remaining:
            return ()
        return (
            Fetched(
                recv.request.transfer_id, recv.num_bytes, recv.num_pieces, recv.verify_s, self.transport.describe()
            ),
        )

    def _fail(self, recvs: Iterable[_Recv], reason: Literal["corrupt", "lost"], detail: str) -> list[ToService]:
        messages: list[ToService] = []
        for recv in recvs:
            if not recv.failed:
                recv.failed = True
                messages.append(Failed(recv.request.transfer_id, reason, detail))
        return messages
