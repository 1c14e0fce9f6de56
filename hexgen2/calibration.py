"""How far a plan's times are off, term by term and replica by replica, from what its replicas measure. Pure.

Workers tell samples, the plan tells what each should have taken (``Times``); the error so far is the median of their
ratios over a window, which a few odd samples do not move. Re-planning reads ``Calibration.off``.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise
from statistics import median

#: Samples of one replica and term that are remembered, and that are needed before anything is said of them.
WINDOW, ENOUGH = 64, 8
#: Measured over predicted beyond this, either way, is off; transfers may be sooner, because they hide behind prefill.
LIMIT = 1.5
#: A model that was off counts as mended only this far inside the limit: it does not flicker at the edge.
MENDED = 0.9


class Term(StrEnum):
    """What a plan foretells the time of."""

    #: Of prompts in the engine, whatever waits before it left out.
    PREFILL = "prefill"
    #: Of one decode step, by how many requests share it.
    DECODE = "decode"
    #: Of a prompt's KV, from when all of it is there to be read until all of it is verified.
    TRANSFER = "transfer"


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement of one replica, of so many ``seconds`` in all.

    ``tokens``: of each prompt that was done in that time (prefill), of the prompt (transfer), or how many steps
    (decode), which ``batch`` requests shared in the mean. ``peer``: address that KV came from.
    """

    term: Term
    seconds: float
    tokens: tuple[int, ...]
    batch: float = 0.0
    peer: str = ""


#: Seconds by size (prompt tokens, or requests in a batch), at a few sizes.
Curve = Mapping[int, float]


def at(curve: Curve, size: float) -> float:
    """Seconds at a size: straight lines between the points, and on beyond them.

    >>> at({100: 1.0, 200: 3.0}, 150)
    2.0
    """
    points = sorted(curve.items())
    if len(points) == 1:
        return points[0][1]
    (x0, y0), (x1, y1) = next((pair for pair in pairwise(points) if size <= pair[1][0]), (points[-2], points[-1]))
    return max(0.0, y0 + (y1 - y0) * (size - x0) / (x1 - x0))


@dataclass(frozen=True, slots=True)
class Times:
    """What a plan foretells of one replica; empty where it says nothing.

    ``prefill``: seconds by prompt tokens, alone; ``decode``: seconds of a step by requests in it; ``transfer``:
    seconds for each prompt token, by the address or id of the replica that it comes from.
    """

    prefill: Curve = field(default_factory=dict)
    decode: Curve = field(default_factory=dict)
    transfer: Mapping[str, float] = field(default_factory=dict)

    def predicted_s(self, sample: Sample) -> float:
        """Seconds that the sample should have taken; 0 when nothing is foretold."""
        match sample.term:
            case Term.PREFILL:
                return sum(at(self.prefill, tokens) for tokens in sample.tokens) if self.prefill else 0.0
            case Term.DECODE:
                return at(self.decode, sample.batch) * sum(sample.tokens) if self.decode else 0.0
            case Term.TRANSFER:
                return self.transfer.get(sample.peer, 0.0) * sum(sample.tokens)


@dataclass(frozen=True, slots=True)
class Ratio:
    """Measured over predicted: the median of ``num_samples``."""

    replica_id: str
    term: Term
    ratio: float
    num_samples: int

    @property
    def told(self) -> str:
        """For people."""
        slower = f"{self.ratio:.2f} times as long as planned"
        return f"{self.term} of {self.replica_id} takes {slower} (median of {self.num_samples})"


@dataclass(frozen=True, slots=True)
class Calibration:
    """The error so far. ``off``: some term is beyond the limit, and ``why`` says which."""

    ratios: tuple[Ratio, ...] = ()
    off: bool = False
    why: str = ""
    #: Which, as ``replica/term``.
    beyond: frozenset[str] = frozenset()

    def factor(self, replica_id: str, term: Term) -> float:
        """Measured over predicted; 1 where nothing is known."""
        return next((r.ratio for r in self.ratios if (r.replica_id, r.term) == (replica_id, term)), 1.0)


class Calibrator:
    """See the module. ``times`` by replica id; memory is bounded by replicas, terms and the window."""

    def __init__(self, times: Mapping[str, Times], limit: float = LIMIT, window: int = WINDOW) -> None:
        self._times = times
        self._limit = limit
        self._window = window
        self._ratios: dict[tuple[str, Term], deque[float]] = {}
        self._off: set[tuple[str, Term]] = set()

    def add(self, replica_id: str, samples: Iterable[Sample]) -> bool:
        """Take what a replica measured; true when any of it could be compared."""
        times = self._times.get(replica_id)
        if times is None:
            return False
        compared = False
        for sample in samples:
            predicted_s = times.predicted_s(sample)
            if predicted_s > 0 and sample.seconds > 0:
                ratios = self._ratios.setdefault((replica_id, sample.term), deque(maxlen=self._window))
                ratios.append(sample.seconds / predicted_s)
                compared = True
        return compared

    def calibration(self) -> Calibration:
        """The error now, of every replica and term with enough samples."""
        found = []
        for (replica_id, term), ratios in sorted(self._ratios.items()):
            if len(ratios) >= ENOUGH:
                found.append(Ratio(replica_id, term, median(ratios), len(ratios)))
        self._off = {(each.replica_id, each.term) for each in found if self._beyond(each)}
        why = "; ".join(each.told for each in found if (each.replica_id, each.term) in self._off)
        beyond = frozenset(f"{replica_id}/{term}" for replica_id, term in self._off)
        return Calibration(tuple(found), bool(self._off), why, beyond)

    def _beyond(self, ratio: Ratio) -> bool:
        limit = self._limit
        if (ratio.replica_id, ratio.term) in self._off:
            limit = 1 + (limit - 1) * MENDED
        return ratio.ratio > limit or (ratio.term is not Term.TRANSFER and ratio.ratio < 1 / limit)
