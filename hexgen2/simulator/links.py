"""KV on its way: transfers share network cards and links fairly, each as fast as the slowest thing that it passes.

Fairness is max-min, as of TCP flows or RDMA with fair queues: all transfers speed up together until a wire is full;
those that pass it keep their rate, the others go on.
"""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any

from hexgen2.simulator.clock import Clock

#: Bytes that count as none: what rounding leaves over.
NOTHING = 1e-3


@dataclass(frozen=True, slots=True)
class Path:
    """What a transfer passes: (wire, share of its bytes) for each; its own limit in bytes/s; seconds of the way."""

    wires: tuple[tuple[Hashable, float], ...] = ()
    most_bytes_per_s: float = inf
    latency_s: float = 0.0


@dataclass(eq=False, slots=True)
class Transfer:
    """Bytes to send over a path, which come little by little. ``drained`` is called when all that came are sent."""

    path: Path
    drained: Callable[[], None]
    #: Bytes that are there and not sent.
    left_bytes: float = 0.0
    #: Until what is being made is made, no more than this is sent.
    made_bytes_per_s: float = inf
    rate: float = field(default=0.0, init=False)


class Links:
    """Wires and their bandwidths in bytes/s; what is on them now."""

    def __init__(self, clock: Clock, bandwidths: Mapping[Any, float]) -> None:
        self.bandwidths = dict(bandwidths)
        self.carried_bytes: dict[Hashable, float] = dict.fromkeys(self.bandwidths, 0.0)
        self._clock = clock
        self._open: dict[Transfer, None] = {}
        self._since_s = 0.0
        self._version = 0

    @property
    def num_open(self) -> int:
        """Transfers that have something to send."""
        return len(self._open)

    def put(self, transfer: Transfer, num_bytes: float, made_bytes_per_s: float = inf) -> None:
        """Give a transfer more to send, or (with 0) another limit."""
        transfer.made_bytes_per_s = made_bytes_per_s
        if num_bytes == 0 and transfer not in self._open:
            return
        self._advance()
        transfer.left_bytes += num_bytes
        if transfer.left_bytes > NOTHING:
            self._open[transfer] = None
        self._share()

    def drop(self, transfer: Transfer) -> None:
        """End it; nobody hears of it."""
        if transfer in self._open:
            self._advance()
            del self._open[transfer]
            self._share()
        transfer.left_bytes = 0.0

    def _advance(self) -> None:
        """Send what was sent since the last time."""
        now = self._clock.now
        seconds = now - self._since_s
        self._since_s = now
        if seconds <= 0:
            return
        for transfer in self._open:
            sent = min(transfer.left_bytes, transfer.rate * seconds)
            transfer.left_bytes -= sent
            for wire, share in transfer.path.wires:
                self.carried_bytes[wire] += sent * share

    def _share(self) -> None:
        """New rates, and a look at when the first transfer has nothing left."""
        fair_rates(self._open, self.bandwidths)
        self._version += 1
        ends = [transfer.left_bytes / transfer.rate for transfer in self._open if transfer.rate > 0]
        if ends:
            self._clock.at(self._clock.now + max(0.0, min(ends)), self._look, self._version)

    def _look(self, version: int) -> None:
        if version != self._version:
            return
        self._advance()
        # What is left for less than a nanosecond is rounding: it would plan an event at this very time for ever.
        over = [each for each in self._open if each.left_bytes <= max(NOTHING, each.rate * 1e-9)]
        for transfer in over:
            transfer.left_bytes = 0.0
            del self._open[transfer]
        self._share()
        for transfer in over:
            transfer.drained()


def fair_rates(transfers: Mapping[Transfer, None], bandwidths: Mapping[Any, float]) -> None:
    """Set ``rate`` of each: max-min fair within the bandwidths and each one's own limits."""
    if not _own_limits(transfers, bandwidths):
        _fill(transfers, bandwidths)


def _own_limits(transfers: Mapping[Transfer, None], bandwidths: Mapping[Any, float]) -> bool:
    """Whether all can go as fast as they are made: the usual case, and quickly found."""
    load: dict[Hashable, float] = {}
    for transfer in transfers:
        limit = transfer.rate = min(transfer.path.most_bytes_per_s, transfer.made_bytes_per_s)
        if limit == inf:
            return False
        for wire, share in transfer.path.wires:
            total = load[wire] = load.get(wire, 0.0) + limit * share
            if total > bandwidths[wire]:
                return False
    return True


def _fill(transfers: Mapping[Transfer, None], bandwidths: Mapping[Any, float]) -> None:
    rising: list[Transfer] = []
    for transfer in transfers:
        transfer.rate = 0.0
        rising.append(transfer)
    left: dict[Hashable, float] = {}
    while rising:
        load: dict[Hashable, float] = {}
        step = inf
        for transfer in rising:
            limit = min(transfer.path.most_bytes_per_s, transfer.made_bytes_per_s)
            step = min(step, limit - transfer.rate)
            for wire, share in transfer.path.wires:
                load[wire] = load.get(wire, 0.0) + share
        for wire, share in load.items():
            step = min(step, left.setdefault(wire, bandwidths[wire]) / share)
        if step == inf:
            # Nothing limits these: they take no time.
            for transfer in rising:
                transfer.rate = 1e18
            return
        full = set()
        for wire, share in load.items():
            left[wire] = max(0.0, left[wire] - step * share)
            if left[wire] <= 1e-9 * bandwidths[wire]:
                full.add(wire)
        going = []
        for transfer in rising:
            transfer.rate += step
            limit = min(transfer.path.most_bytes_per_s, transfer.made_bytes_per_s)
            if transfer.rate < limit * (1 - 1e-12) and not any(wire in full for wire, _ in transfer.path.wires):
                going.append(transfer)
        if len(going) == len(rising):
            return
        rising = going
