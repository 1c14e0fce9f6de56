"""The registered memory that reads land in, and the reads: queued by peer, posted in bundles, each piece in a slot.

A slot is reused only once its read is known to be over, also when nobody wants what it reads any more: until then it
is in quarantine.
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch

from hexgen2.kv.transport import Span, Transport, TransportError

#: Reads are posted in bundles of at most so many pieces: few enough to overlap reading with verifying.
MAX_PIECES_PER_READ = 32


@dataclass(slots=True)
class Claim:
    """One transfer's share of the slots. No longer ``wanted`` after ``Reads.drop``."""

    wanted: bool = True
    num_slots: int = 0


class Readable(Protocol):
    """One contiguous read of at most a slot's size, for ``claim``."""

    @property
    def claim(self) -> Claim:
        """Whose it is."""

    @property
    def peer(self) -> bytes:
        """Endpoint of the rank it is read from."""

    @property
    def remote_offset(self) -> int:
        """Where it begins in the peer's send buffer."""

    @property
    def num_bytes(self) -> int:
        """Its length."""


J = TypeVar("J", bound=Readable)


class Reads(Generic[J]):
    """``landing`` is to be registered with the transport. One thread calls everything."""

    def __init__(self, transport: Transport, landing_bytes: int, slot_bytes: int, device: torch.device) -> None:
        self.landing = torch.empty(landing_bytes // slot_bytes * slot_bytes, dtype=torch.uint8, device=device)
        self._transport = transport
        self._slot_bytes = slot_bytes
        self._num_slots = landing_bytes // slot_bytes
        self._slots = list(range(self._num_slots))
        #: By peer, first come first served; peers take turns.
        self._jobs: OrderedDict[bytes, deque[J]] = OrderedDict()
        self._slots_of: Counter[bytes] = Counter()
        self._open: dict[int, list[tuple[J, int]]] = {}
        self._num_quarantined = 0

    @property
    def quarantine_bytes(self) -> int:
        """Landing memory that reads which nobody wants any more may still write."""
        return self._num_quarantined * self._slot_bytes

    @property
    def num_open(self) -> int:
        """Reads that are not over."""
        return len(self._open)

    def add(self, job: J) -> None:
        """Queue a read; ``pump`` posts it."""
        self._jobs.setdefault(job.peer, deque()).append(job)

    def drop(self, claim: Claim) -> None:
        """Nobody wants the reads of this claim any more. Idempotent."""
        if claim.wanted:
            claim.wanted = False
            self._num_quarantined += claim.num_slots

    def pump(self) -> list[tuple[J, TransportError]]:
        """Post what fits the free slots, bundled by peer, peers in turn. Returns what cannot be read."""
        failed: list[tuple[J, TransportError]] = []
        for peer in list(self._jobs):
            bundle = self._bundle(peer)
            if not bundle:
                continue
            spans = [Span(job.remote_offset, slot * self._slot_bytes, job.num_bytes) for job, slot in bundle]
            try:
                self._open[self._transport.read(peer, spans)] = bundle
            except TransportError as error:
                for job, slot in bundle:
                    self._free(job, slot)
                    failed.append((job, error))
        return failed

    def poll(self) -> Iterator[tuple[J, torch.Tensor | TransportError]]:
        """Pieces still wanted whose reads are over: the landed bytes (valid until the next) or the error."""
        for handle, error in self._transport.poll():
            for job, slot in self._open.pop(handle):
                try:
                    if job.claim.wanted:
                        at = slot * self._slot_bytes
                        yield job, self.landing[at : at + job.num_bytes] if error is None else error
                finally:
                    self._free(job, slot)

    def _bundle(self, peer: bytes) -> list[tuple[J, int]]:
        """The next pieces to read from one peer, each with its slot. The peer goes to the end of the line."""
        # A peer that is slow or stopped may hold half of the slots, never all: the others' transfers go on.
        share = max(1, self._num_slots // 2) - self._slots_of[peer]
        jobs = self._jobs.pop(peer)
        bundle: list[tuple[J, int]] = []
        while jobs and self._slots and len(bundle) < min(share, MAX_PIECES_PER_READ):
            job = jobs.popleft()
            if job.claim.wanted:
                job.claim.num_slots += 1
                bundle.append((job, self._slots.pop()))
        self._slots_of[peer] += len(bundle)
        if jobs:
            self._jobs[peer] = jobs
        return bundle

    def _free(self, job: J, slot: int) -> None:
        """Nothing writes this slot any more."""
        job.claim.num_slots -= 1
        if not job.claim.wanted:
            self._num_quarantined -= 1
        self._slots.append(slot)
        self._slots_of[job.peer] -= 1
        if not self._slots_of[job.peer]:
            del self._slots_of[job.peer]
