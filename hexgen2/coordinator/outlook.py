"""What a coordinator sees beside its members: what clients ask and are expected to, and what became of the plan."""

from collections import deque
from collections.abc import Iterable

from hexgen2.forecast import Contest
from hexgen2.observed import Series, Slo
from hexgen2.plan import PlanChange

#: Changes that are told to whoever asks; the file keeps more.
TOLD = 20


class Outlook:
    """See the module. ``slo`` is what gateways are to count as good."""

    def __init__(self, bucket_s: float = 10.0, horizon_s: float = 300.0, changes: Iterable[PlanChange] = ()) -> None:
        self.series = Series(bucket_s)
        self.contest = Contest(horizon_s)
        self.slo = Slo()
        self._changes = deque(changes, maxlen=TOLD)

    @property
    def changes(self) -> tuple[PlanChange, ...]:
        """The last, newest first."""
        return tuple(reversed(self._changes))

    def changed(self, change: PlanChange) -> None:
        """One more."""
        self._changes.append(change)
