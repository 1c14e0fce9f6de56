"""The registered memory that reads land in, and the reads: queued by peer, taken by routes in bundles. A route that
breaks or stalls leaves its pieces to the others; only without any are they lost.

A piece lands in a slot, or, where its route is direct, where it is to stay.

A slot is reused only once its read is known to be over, also when nobody wants what it reads any more: until then it
is in quarantine. A route whose given-up reads are not over gets no new ones, so a peer's quarantine does not grow.
Direct reads are revoked when they are given up. Where they cannot be, no peer can delay them: whoever owns the place
waits until they are over (``Claim.num_direct``), and they are never asked for twice.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import inf
from time import monotonic, time_ns
from typing import Generic, NamedTuple, Protocol, Self, TypeVar

import torch

from hexgen2.kv.host_memory import buffer
from hexgen2.kv.route import Route, is_tail, room_bytes
from hexgen2.kv.transport import Span, Transport, TransportError

#: Reads are posted in bundles of at most so many pieces and about so many bytes: few enough to overlap reading with
#: verifying, enough to pay for a read (UCX: 0.1 ms and more for each).
MAX_PIECES_PER_READ = 64
MAX_READ_BYTES = 1 << 22
#: While reads are open or wait, ``pump`` must be called at least so often.
CHECK_S = 0.25
#: Where the parts of a job are; none where they stay where they land.
Slots = tuple[int, ...]
_NO_LIMIT = 1 << 62
# Peers that have nothing to do are forgotten beyond this many, oldest first: restarted ones leave endpoints behind.
_MAX_PEERS = 256


@dataclass(slots=True)
class RouteUse:
    """What a route did for one transfer. Nanoseconds since 1970."""

    num_bytes: int
    began_ns: int
    ended_ns: int


@dataclass(slots=True)
class Claim:
    """One transfer's share of the slots. No longer ``wanted`` after ``Reads.drop``. ``routes``: by name.

    ``num_direct``: its pieces that reads may still write where they are to stay.
    """

    wanted: bool = True
    num_slots: int = 0
    num_direct: int = 0
    routes: dict[str, RouteUse] = field(default_factory=dict)


class Part(NamedTuple):
    """One contiguous piece of at most a slot's size."""

    #: Where it begins in the peer's send buffer.
    remote_offset: int
    num_bytes: int
    #: Where in ``Reads.landing`` it is to stay as it comes; None where it must be copied from a slot anyway.
    stays_at: int | None


class Readable(Protocol):
    """Pieces to be read, for ``claim``."""

    @property
    def claim(self) -> Claim:
        """Whose it is."""

    @property
    def peer(self) -> tuple[bytes, ...]:
        """Endpoints of the rank it is read from, one for each of its transports."""

    @property
    def parts(self) -> Sequence[Part]:
        """One or more; all of them with ``stays_at``, or none."""

    @property
    def num_bytes(self) -> int:
        """Of all of them."""

    def split(self, count: int) -> tuple[Self, Self]:
        """The first ``count`` parts, and the others."""


J = TypeVar("J", bound=Readable)


@dataclass(slots=True)
class _Peer(Generic[J]):
    routes: tuple[Route, ...]
    jobs: deque[J] = field(default_factory=deque)
    waiting_bytes: int = 0
    num_slots: int = 0
    reads: "dict[int, _Read[J]]" = field(default_factory=dict)


@dataclass(slots=True)
class _Read(Generic[J]):
    handle: int
    peer: _Peer[J]
    route: Route
    bundle: list[tuple[J, Slots]]
    num_bytes: int
    incident: int
    posted_at: float
    posted_ns: int
    landed_bytes: int = 0
    abandoned: bool = False
    direct: bool = False
    revoked: bool = False


@dataclass(slots=True)
class Bundle(Generic[J]):
    """What has landed of one read and is still wanted: nothing writes it any more until ``Reads.free``."""

    read: _Read[J]
    pieces: list[tuple[J, Slots]]


class Reads(Generic[J]):
    """``reachable`` is to be registered with every transport. One thread calls everything.

    Args:
        transports: ours, in order; see ``add``.
        landing_bytes: of the slots.
        slot_bytes: the longest piece.
        device: of ``landing``.
        stall_s: a route on which no byte has come for so long, though reads are open, is given up.
        clock: seconds.
        stay_bytes: of memory behind the slots, for pieces that are to stay where they land.
    """

    def __init__(
        self,
        transports: Sequence[Transport],
        landing_bytes: int,
        slot_bytes: int,
        device: torch.device,
        stall_s: float,
        clock: Callable[[], float] = monotonic,
        stay_bytes: int = 0,
    ) -> None:
        self.stays_from = landing_bytes // slot_bytes * slot_bytes
        self.landing = buffer(self.stays_from + stay_bytes, device)
        self._transports = tuple(transports)
        self._slot_bytes = slot_bytes
        self._stall_s = stall_s
        self.moved = False
        self._num_slots = landing_bytes // slot_bytes
        self._slots = list(range(self._num_slots - 1, -1, -1))
        #: Oldest use first.
        self._peers: OrderedDict[tuple[bytes, ...], _Peer[J]] = OrderedDict()
        #: Those with pieces to read: they take turns.
        self._waiting: OrderedDict[tuple[bytes, ...], _Peer[J]] = OrderedDict()
        self._open: dict[tuple[int, int], _Read[J]] = {}
        self._num_quarantined = 0
        self._clock, self._clocked, self._now = clock, clock(), 0.0
        self._checked_at = 0.0
        self._full_since: float | None = None

    def reachable(self, transport: Transport) -> torch.Tensor:
        """What of ``landing`` to register with it: memory that is to stay only where reads may go there."""
        direct = transport.direct_read_bytes > 0 and self.landing.device.type == "cpu"
        return self.landing if direct else self.landing[: self.stays_from]

    @property
    def quarantine_bytes(self) -> int:
        """Landing memory that reads which nobody wants any more may still write."""
        return self._num_quarantined * self._slot_bytes

    @property
    def num_open(self) -> int:
        """Reads that are not over."""
        return len(self._open)

    @property
    def busy(self) -> bool:
        """Whether anything is open or waits, so that ``pump`` must be called every ``CHECK_S``."""
        return bool(self._open or self._waiting)

    def add(self, job: J) -> None:
        """Queue a read; ``pump`` posts it. The k-th of our transports reads from the k-th of the peer's endpoints;
        where one side has fewer, its own serve again."""
        peer = self._peers.get(job.peer)
        if peer is None:
            self._forget_idle()
            ours, theirs = len(self._transports), len(job.peer)
            pairs = ((k % ours, job.peer[k % theirs]) for k in range(max(ours, theirs)))
            peer = self._peers[job.peer] = _Peer(tuple(Route(transport, endpoint) for transport, endpoint in pairs))
        peer.jobs.append(job)
        peer.waiting_bytes += job.num_bytes
        self._waiting.setdefault(job.peer, peer)

    def drop(self, claim: Claim) -> None:
        """Nobody wants the reads of this claim any more. Idempotent."""
        if not claim.wanted:
            return
        claim.wanted = False
        self._num_quarantined += claim.num_slots
        if claim.num_direct:
            for read in self._open.values():
                if read.direct and read.bundle[0][0].claim is claim:
                    self._revoke(read)

    def poll(self) -> list[Bundle[J]]:
        """What has landed; each is to be given back with ``free``, at the latest when its claim is dropped."""
        landed: list[Bundle[J]] = []
        for number, transport in enumerate(self._transports):
            for handle, error in transport.poll():
                read = self._open.pop((number, handle))
                del read.peer.reads[id(read)]
                bundle = self._over(read, error)
                if bundle.pieces:
                    landed.append(bundle)
        return landed

    def free(self, bundle: Bundle[J]) -> None:
        """Nobody looks at its slots any more."""
        # The last first: what is taken next is in order then, and in the cache.
        for job, slots in reversed(bundle.pieces):
            self._free(bundle.read, job, slots)

    def offsets(self, job: J, slots: Slots) -> list[int]:
        """Where its parts are in ``landing``."""
        if slots:
            return [slot * self._slot_bytes for slot in slots]
        return [part.stays_at for part in job.parts if part.stays_at is not None]

    def pump(self) -> list[tuple[J, str]]:
        """Let each route take one read, if it has room, peers in turn. Returns what cannot be read, and why.

        Call it again soon if it ``moved`` anything.
        """
        now = self._attend()
        lost: list[tuple[J, str]] = []
        if now - self._checked_at >= CHECK_S:
            self._checked_at = now
            self._check(now)
        if self._open and not self._waiting:
            self._hurry(now)
        self.moved = False
        for key, peer in list(self._waiting.items()):
            for route in peer.routes:
                self.moved |= self._take(peer, route, now)
            if not peer.jobs:
                del self._waiting[key]
            elif all(route.is_broken(now) for route in peer.routes):
                lost += self._lose(key, "; ".join(dict.fromkeys(route.error for route in peer.routes)))
            else:
                self._waiting.move_to_end(key)
        return lost + self._check_room(now)

    def _over(self, read: _Read[J], error: TransportError | None) -> Bundle[J]:
        """A read is over: what of it has landed and is wanted. The other slots are free."""
        now, route = self._attend(), read.route
        if read.abandoned:
            route.num_abandoned -= 1
        if error is None:
            # Also of a read that was given up: it tells how fast the route is.
            route.landed(read.num_bytes, now)
        else:
            route.open_bytes -= read.num_bytes
            route.failed(read.incident, str(error), now)
        if error is not None and not read.abandoned:
            self._requeue(read)
        good = error is None and not read.abandoned
        if read.direct:
            self._let_go(read)
        bundle = Bundle(read, [(job, slots) for job, slots in read.bundle if good and job.claim.wanted])
        if len(bundle.pieces) < len(read.bundle):
            for job, slots in read.bundle:
                if not (good and job.claim.wanted):
                    self._free(read, job, slots)
        for job, _ in bundle.pieces:
            self._note(job, read)
        return bundle

    def _take(self, peer: _Peer[J], route: Route, now: float) -> bool:
        """Post one read of the next pieces on this route, if it has room. Whether it did anything."""
        while peer.jobs and not peer.jobs[0].claim.wanted:
            peer.waiting_bytes -= peer.jobs.popleft().num_bytes
        if not peer.jobs:
            return False
        # A peer that is slow or stopped may hold half of the slots, never all: the others' transfers go on.
        share = max(1, (self._num_slots - self._num_quarantined) // 2) - peer.num_slots
        first, transport = peer.jobs[0], self._transports[route.transport]
        piece_bytes, stays_at = first.parts[0].num_bytes, first.parts[0].stays_at
        direct = stays_at is not None and transport.is_direct(route.endpoint)
        most = MAX_PIECES_PER_READ if direct else min(share, MAX_PIECES_PER_READ, len(self._slots))
        limit_bytes = sum(each.open_bytes for each in peer.routes) + (_NO_LIMIT if direct else share * piece_bytes)
        room = room_bytes(route, peer.routes, peer.waiting_bytes, piece_bytes, limit_bytes, now)
        room = min(room, transport.direct_read_bytes if direct else MAX_READ_BYTES)
        # A direct read is of one transfer, so that it can be revoked with that.
        jobs = self._pop(peer, room, most, first.claim if direct else None) if room > 0 else []
        if not jobs:
            return False
        bundle = [(job, () if direct else tuple(self._slots.pop() for _ in job.parts)) for job in jobs]
        num_bytes = sum(job.num_bytes for job in jobs)
        read = _Read(0, peer, route, bundle, num_bytes, route.incident, now, time_ns(), direct=direct)
        if direct:
            first.claim.num_direct += len(jobs)
        for job, slots in bundle:
            peer.num_slots += len(slots)
            job.claim.num_slots += len(slots)
        spans = [
            Span(part.remote_offset, at, part.num_bytes)
            for job, slots in bundle
            for part, at in zip(job.parts, self.offsets(job, slots), strict=True)
        ]
        route.posted(num_bytes, now)
        try:
            read.handle = transport.read(route.endpoint, spans)
        except TransportError as error:
            route.open_bytes -= num_bytes
            route.failed(read.incident, str(error), now)
            self._requeue(read)
            if direct:
                self._let_go(read)
            for job, slots in bundle:
                self._free(read, job, slots)
            return True
        self._open[route.transport, read.handle] = read
        peer.reads[id(read)] = read
        return True

    def _pop(self, peer: _Peer[J], room: int, most: int, only: Claim | None) -> list[J]:
        """The next jobs, of ``only`` where it is given: at most so many parts and bytes, but at least one part."""
        jobs: list[J] = []
        while peer.jobs and most > 0 and (only is None or peer.jobs[0].claim is only):
            job = peer.jobs.popleft()
            peer.waiting_bytes -= job.num_bytes
            if not job.claim.wanted:
                continue
            if job.num_bytes > room or len(job.parts) > most:
                ends = accumulate(part.num_bytes for part in job.parts)
                fits = max(min(most, sum(end <= room for end in ends)), 0 if jobs else 1)
                if fits < len(job.parts):
                    taken, left = job.split(fits) if fits else (None, job)
                    peer.jobs.appendleft(left)
                    peer.waiting_bytes += left.num_bytes
                    return jobs if taken is None else [*jobs, taken]
            jobs.append(job)
            most -= len(job.parts)
            room -= job.num_bytes
        return jobs

    def _check(self, now: float) -> None:
        """Give up routes that have stalled."""
        for peer in {id(read.peer): read.peer for read in self._open.values()}.values():
            for read in peer.reads.values():
                landed = self._transports[read.route.transport].landed_bytes(read.handle)
                if landed > read.landed_bytes:
                    read.landed_bytes = landed
                    read.route.progress_at = now
            for route in peer.routes:
                if route.open_bytes and not route.num_abandoned and now - route.progress_at > self._stall_s:
                    route.failed(route.incident, f"no byte for {self._stall_s:g} s", now, forgive=False)
                    for read in peer.reads.values():
                        if read.route is route:
                            self._abandon(read)
                    self._transports[route.transport].cut(route.endpoint)

    def _hurry(self, now: float) -> None:
        """Everything is asked for and a route has nothing to do: let it do again what a slow one is far from."""
        for peer in {id(read.peer): read.peer for read in self._open.values()}.values():
            idle = [route for route in peer.routes if not route.open_bytes]
            if idle:
                for read in reversed(peer.reads.values()):
                    open_s = now - read.posted_at
                    if not read.abandoned and is_tail(read.route, idle, read.num_bytes, open_s, now):
                        self._abandon(read)
                        break

    def _abandon(self, read: _Read[J]) -> None:
        """Leave the read's pieces to other routes; its slots wait until it is over."""
        if read.abandoned or (read.direct and not self._revoke(read)):
            return
        read.abandoned = True
        read.route.num_abandoned += 1
        self._requeue(read)
        for job, slots in read.bundle:
            if job.claim.wanted:
                self._num_quarantined += len(slots)
            job.claim.num_slots -= len(slots)

    def _revoke(self, read: _Read[J]) -> bool:
        """Whether a direct read writes nothing any more."""
        if not read.revoked and self._transports[read.route.transport].revoke(read.handle):
            self._let_go(read)
        return read.revoked

    def _let_go(self, read: _Read[J]) -> None:
        """A direct read writes nothing any more."""
        if not read.revoked:
            read.revoked = True
            read.bundle[0][0].claim.num_direct -= len(read.bundle)

    def _requeue(self, read: _Read[J]) -> None:
        """The read's pieces are next."""
        jobs = [job for job, _ in read.bundle if job.claim.wanted]
        if jobs:
            peer = read.peer
            peer.jobs.extendleft(reversed(jobs))
            peer.waiting_bytes += sum(job.num_bytes for job in jobs)
            self._waiting.setdefault(jobs[0].peer, peer)

    def _free(self, read: _Read[J], job: J, slots: Slots) -> None:
        """Nothing writes these slots any more."""
        if read.abandoned:
            self._num_quarantined -= len(slots)
        else:
            job.claim.num_slots -= len(slots)
            if not job.claim.wanted:
                self._num_quarantined -= len(slots)
        self._slots += reversed(slots)
        read.peer.num_slots -= len(slots)

    def _lose(self, key: tuple[bytes, ...], why: str) -> list[tuple[J, str]]:
        peer = self._waiting.pop(key)
        lost = [(job, why) for job in peer.jobs if job.claim.wanted]
        peer.jobs.clear()
        peer.waiting_bytes = 0
        return lost

    def _check_room(self, now: float) -> list[tuple[J, str]]:
        """Where quarantine has held every slot for too long, whoever waits is sent elsewhere."""
        if not self._waiting or self._num_quarantined < self._num_slots:
            self._full_since = None
        elif self._full_since is None:
            self._full_since = now
        elif now - self._full_since > self._stall_s:
            why = f"all {self._num_slots * self._slot_bytes} bytes of landing memory are in quarantine"
            return [each for key in list(self._waiting) for each in self._lose(key, why)]
        return []

    def _note(self, job: J, read: _Read[J]) -> None:
        transport = self._transports[read.route.transport]
        use = job.claim.routes.setdefault(f"{transport.name}/{transport.local}", RouteUse(0, read.posted_ns, 0))
        use.num_bytes += job.num_bytes
        use.ended_ns = time_ns()

    def _attend(self) -> float:
        """Seconds that this thread has attended to its reads. While it is stopped, peers cannot be late."""
        clocked = self._clock()
        self._now += min(clocked - self._clocked, 4 * CHECK_S if self._open else inf)
        self._clocked = clocked
        return self._now

    def _forget_idle(self) -> None:
        excess = len(self._peers) - _MAX_PEERS + 1
        idle = [key for key, peer in self._peers.items() if not peer.reads and not peer.jobs]
        for key in idle[: max(0, excess)]:
            del self._peers[key]
