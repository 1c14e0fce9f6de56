"""Distributions in little memory: percentiles of millions of values, and how many things happened when."""

from dataclasses import dataclass, field
from math import ceil, inf, log

#: A value is told with at most half of this relative error.
BIN = 0.002
_SCALE = 1 / log(1 + BIN)
#: Below a nanosecond everything is nothing.
_LEAST = 1e-9

#: Bins of a timeline; when they do not reach far enough, two become one.
NUM_BINS = 2048


@dataclass(slots=True)
class Sketch:
    """Counts of values by their logarithm: memory grows with the range, not with the number, of values."""

    count: int = 0
    total: float = 0.0
    largest: float = 0.0
    _bins: dict[int, int] = field(default_factory=dict)

    def add(self, value: float) -> None:
        """Count a value >= 0."""
        self.count += 1
        self.total += value
        if value > self.largest:
            self.largest = value
        key = int(log(value if value > _LEAST else _LEAST) * _SCALE + 100_000)
        self._bins[key] = self._bins.get(key, 0) + 1

    @property
    def mean(self) -> float:
        """Exact; 0 of nothing."""
        return self.total / self.count if self.count else 0.0

    def quantile(self, share: float) -> float:
        """The value below which ``share`` of all are, within 0.1 %; 0 of nothing."""
        wanted, seen = max(1, ceil(share * self.count)), 0
        for key in sorted(self._bins):
            seen += self._bins[key]
            if seen >= wanted:
                middle = float((1 + BIN) ** (key - 100_000 + 0.5))
                return 0.0 if middle <= _LEAST * (1 + BIN) else min(middle, self.largest)
        return 0.0

    def share_below(self, limit: float) -> float:
        """What share of the values is at most ``limit`` (to the sketch's accuracy); 1 of nothing."""
        if not self.count:
            return 1.0
        if limit == inf:
            return 1.0
        key = int(log(max(limit, _LEAST)) * _SCALE + 100_000)
        return sum(number for bin, number in self._bins.items() if bin <= key) / self.count


@dataclass(slots=True)
class Timeline:
    """How much happened in each stretch of time, from 0 on; stretches double as time goes on."""

    width_s: float = 0.01
    _bins: list[float] = field(default_factory=lambda: [0.0] * NUM_BINS)

    def add(self, time_s: float, amount: float = 1.0) -> None:
        """Count ``amount`` at ``time_s``."""
        index = int(time_s / self.width_s)
        while index >= NUM_BINS:
            halved = [a + b for a, b in zip(self._bins[::2], self._bins[1::2], strict=True)]
            self._bins = halved + [0.0] * (NUM_BINS // 2)
            self.width_s *= 2
            index = int(time_s / self.width_s)
        self._bins[index] += amount

    def rate(self, first_s: float, last_s: float) -> float:
        """Amount per second between two times; bins at the edges count by the part that is inside."""
        if last_s <= first_s:
            return 0.0
        total = 0.0
        for index, amount in enumerate(self._bins):
            if amount:
                begin = index * self.width_s
                inside = min(last_s, begin + self.width_s) - max(first_s, begin)
                if inside > 0:
                    total += amount * inside / self.width_s
        return total / (last_s - first_s)
