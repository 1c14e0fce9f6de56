"""One of several ways to read from one peer: whether it works, how fast it is, how much it may hold. Pure.

Routes pull: whichever has room takes the next pieces, so that they share the bytes by what each really carries. A route
takes no more than its share of what is left, and nothing that the others would have done by the time it is done.
"""

from collections.abc import Sequence
from dataclasses import dataclass

#: What a route may hold: so many seconds of what it carries, but never less than keeps a fast or a far peer busy.
WINDOW_S = 0.1
MIN_WINDOW_BYTES = 4 << 20
#: Of which a read is at most such a part, so that the next ones are asked for before one is over.
READS_OPEN = 4
#: A measurement counts for so long; then the route is tried with one piece, as if it were new.
RATE_LIFE_S = 10.0
#: The first failure is forgiven at once; then a route rests for so long, and twice as long each time.
MIN_REST_S = 0.5
MAX_REST_S = 30.0
_SMOOTHING = 0.3
_MIN_SAMPLE_S = 0.001
# Reading something twice must gain more than this.
_TAIL_S = 0.02


@dataclass(slots=True)
class Route:
    """From our ``transport`` (its place in the agent's list) to one ``endpoint`` of the peer."""

    transport: int
    endpoint: bytes
    bytes_per_s: float = 0.0
    open_bytes: int = 0
    #: Reads that were given up here but are not known to be over: until they are, nothing new is asked for.
    num_abandoned: int = 0
    #: Counts failures, so that the reads that one failure ends are not counted again.
    incident: int = 0
    failures: int = 0
    rests_until: float = 0.0
    progress_at: float = 0.0
    error: str = ""
    _measured_at: float = -RATE_LIFE_S
    _sample_bytes: int = 0
    _sample_began: float = 0.0

    def is_up(self, now: float) -> bool:
        """Whether it may be tried."""
        return now >= self.rests_until and not self.num_abandoned

    def is_broken(self, now: float) -> bool:
        """Whether nothing can be hoped of it soon: it rests, or reads that failed it are not over."""
        return now < self.rests_until or (self.failures > 0 and self.num_abandoned > 0)

    def rate(self, now: float) -> float:
        """Bytes per second as last measured; 0 where that is not known (any more)."""
        return self.bytes_per_s if now - self._measured_at < RATE_LIFE_S else 0.0

    def posted(self, num_bytes: int, now: float) -> None:
        """A read was posted."""
        if not self.open_bytes:
            self.progress_at = self._sample_began = now
            self._sample_bytes = 0
        self.open_bytes += num_bytes

    def landed(self, num_bytes: int, now: float) -> None:
        """A read is over and its bytes are here."""
        self.open_bytes -= num_bytes
        self.failures = 0
        self.rests_until = 0.0
        self.progress_at = now
        self._sample_bytes += num_bytes
        seconds = now - self._sample_began
        if seconds >= _MIN_SAMPLE_S or not self.rate(now):
            sample = self._sample_bytes / max(seconds, 1e-6)
            known = self.rate(now)
            self.bytes_per_s = sample if not known else known + _SMOOTHING * (sample - known)
            self._measured_at = self._sample_began = now
            self._sample_bytes = 0

    def failed(self, incident: int, error: str, now: float, *, forgive: bool = True) -> None:
        """A read that was posted at ``incident`` failed. ``forgive``: the first time try again at once."""
        if incident != self.incident:
            return
        self.incident += 1
        self.failures += 1 if forgive else 2
        self.error = error
        if self.failures > 1:
            self.rests_until = now + min(MAX_REST_S, MIN_REST_S * 2 ** (self.failures - 2))


def room_bytes(
    route: Route, routes: Sequence[Route], waiting_bytes: int, piece_bytes: int, limit_bytes: int, now: float
) -> int:
    """How much of ``waiting_bytes`` this route may take in one read now: at least ``piece_bytes``, or nothing.

    Args:
        route: one of ``routes``.
        routes: all that lead to the peer.
        waiting_bytes: of all pieces that no route has taken yet.
        piece_bytes: of the next piece.
        limit_bytes: what all of ``routes`` may hold together.
        now: in seconds.
    """
    if not route.is_up(now):
        return 0
    others = [r for r in routes if r is not route and r.is_up(now)]
    rate = route.rate(now)
    if route.failures or (others and not rate):
        return 0 if route.open_bytes else piece_bytes  # one piece will tell
    others_rate = sum(r.rate(now) for r in others)
    others_bytes = waiting_bytes + sum(r.open_bytes for r in others)
    # The others' probes need room, too.
    most = limit_bytes - piece_bytes * sum(not r.rate(now) for r in others)
    if others_rate:
        if (route.open_bytes + piece_bytes) / rate > others_bytes / others_rate:
            return 0
        most = int(min(most, others_bytes + route.open_bytes) * rate / (rate + others_rate))
    most = max(piece_bytes, min(most, max(MIN_WINDOW_BYTES, int(rate * WINDOW_S))))
    room = min(most - route.open_bytes, max(piece_bytes, most // READS_OPEN))
    return room if room >= piece_bytes else 0


def is_tail(route: Route, others: Sequence[Route], read_bytes: int, open_s: float, now: float) -> bool:
    """Whether the last read of ``route`` is better done again by one of ``others``, which have nothing left to do.

    Args:
        route: that the read is open on.
        others: the idle ones.
        read_bytes: of the read.
        open_s: for how long it has been open.
        now: in seconds.
    """
    best = max((r.rate(now) for r in others if r.is_up(now)), default=0.0)
    if not best:
        return False
    rate = route.rate(now)
    left_s = route.open_bytes / rate - (now - route.progress_at) if rate else open_s
    return left_s > 2 * read_bytes / best + _TAIL_S
