"""What arrival rate to expect: a seasonal baseline, and who of several forecasters was better lately. Pure.

Forecasters are compared by what they said before it came: each forecast is kept until its time is over, and its error
is then the difference to what was seen, over what was seen in the mean.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

#: Errors of each forecaster that are remembered.
REMEMBERED = 30
#: How much faster or slower than a season ago things may count as being.
MOST_CHANGE = 3.0

SEASONAL, LSTM = "seasonal", "lstm"


def seasonal(rates: Sequence[float], horizon: int, season: int) -> float:
    """The mean rate of the next ``horizon`` buckets: as a season ago, scaled by how now compares to then.

    ``season`` is in buckets. With less than a season of ``rates``, it goes on as it was in the last ``horizon``.

    >>> seasonal([1, 1, 4, 4, 2, 2], horizon=2, season=4)
    8.0
    """
    if not rates:
        return 0.0
    now = _mean(rates[-horizon:])
    if len(rates) < season + horizon or season < horizon:
        return now
    then = _mean(rates[-season - horizon : -season])
    after = _mean(rates[-season : len(rates) - season + horizon])
    if then <= 0:
        return now
    return after * min(max(now / then, 1 / MOST_CHANGE), MOST_CHANGE)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


@dataclass(frozen=True, slots=True)
class Forecast:
    """One forecaster's newest word, and its error lately (None: not known yet)."""

    rps: float
    error: float | None


class Contest:
    """See the module. Times are one clock's; ``horizon_s`` is how far ahead everybody looks."""

    def __init__(self, horizon_s: float) -> None:
        self.horizon_s = horizon_s
        self._said: dict[str, float] = {}
        self._open: deque[tuple[float, str, float]] = deque()
        self._errors: dict[str, deque[float]] = {}
        self._seen: deque[float] = deque(maxlen=REMEMBERED)

    def say(self, who: str, rps: float, now_s: float) -> None:
        """A forecast of the mean rate from now to the horizon."""
        self._said[who] = rps
        self._open.append((now_s + self.horizon_s, who, rps))

    def due(self, now_s: float) -> bool:
        """Whether a forecast's time is over, so that ``settle`` should be told what was."""
        return bool(self._open) and self._open[0][0] <= now_s

    def settle(self, seen_rps: float, now_s: float) -> None:
        """What the mean rate was over the last horizon: for all forecasts whose time is over."""
        while self._open and self._open[0][0] <= now_s:
            _, who, rps = self._open.popleft()
            self._seen.append(seen_rps)
            self._errors.setdefault(who, deque(maxlen=REMEMBERED)).append(abs(rps - seen_rps))

    @property
    def forecasts(self) -> Mapping[str, Forecast]:
        """By forecaster. Errors are shares of the mean rate."""
        scale = max(_mean(list(self._seen)), 1e-9)
        return {
            who: Forecast(rps, _mean(list(errors)) / scale if (errors := self._errors.get(who)) else None)
            for who, rps in self._said.items()
        }

    @property
    def best(self) -> str:
        """Who was better on the recent past; the baseline until others have shown that they are. "": nobody spoke."""
        found = self.forecasts
        known = {who: each.error for who, each in found.items() if each.error is not None}
        if not known:
            return SEASONAL if SEASONAL in found else next(iter(found), "")
        # Equals: the simpler one.
        return min(known, key=lambda who: (known[who], who != SEASONAL))
