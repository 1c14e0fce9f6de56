"""What clients ask of a fleet, counted: by each gateway since it began, by the coordinator in buckets of time. Pure.

A class is a range of prompt lengths and one of answer lengths, four of each: enough to tell a chat from a summary, and
few enough to count every second. Counters only grow, so a report that is lost or comes twice changes nothing.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

#: Upper ends of the classes; the last class of each is open.
PROMPT_EDGES = (256, 1024, 4096)
OUTPUT_EDGES = (32, 128, 512)
NUM_CLASSES = (len(PROMPT_EDGES) + 1) * (len(OUTPUT_EDGES) + 1)
#: A day of buckets of ten seconds.
MAX_BUCKETS = 8640
#: Gateways whose last count is remembered.
MAX_GATEWAYS = 256


def class_of(prompt_tokens: int, output_tokens: int) -> int:
    """The class's number, below ``NUM_CLASSES``.

    >>> class_of(100, 10), class_of(5000, 600)
    (0, 15)
    """
    return bisect_left(PROMPT_EDGES, prompt_tokens) * (len(OUTPUT_EDGES) + 1) + bisect_left(OUTPUT_EDGES, output_tokens)


@dataclass(frozen=True, slots=True)
class ClassTally:
    """Answers of one class that ended well, and their tokens in all."""

    number: int
    num: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Tally:
    """Requests since a gateway began. ``num_good``: ended well, within the limits of TTFT and TPOT."""

    num_arrived: int = 0
    num_ended: int = 0
    num_good: int = 0
    num_failed: int = 0
    classes: tuple[ClassTally, ...] = ()


NOTHING = Tally()


@dataclass(frozen=True, slots=True)
class Slo:
    """What counts as good; None: no limit."""

    ttft_s: float | None = None
    tpot_s: float | None = None

    def met(self, ttft_s: float, tpot_s: float) -> bool:
        """By an answer with these times."""
        return (self.ttft_s is None or ttft_s <= self.ttft_s) and (self.tpot_s is None or tpot_s <= self.tpot_s)


class Counter:
    """A gateway's own count. ``slo`` is what the coordinator told it last."""

    def __init__(self) -> None:
        self.slo = Slo()
        self._arrived = self._good = self._failed = 0
        self._classes: dict[int, ClassTally] = {}

    def arrived(self) -> None:
        """A request came in."""
        self._arrived += 1

    def failed(self) -> None:
        """One ended with an error that was not its own."""
        self._failed += 1

    def ended(self, prompt_tokens: int, output_tokens: int, ttft_s: float, tpot_s: float) -> None:
        """One ended well."""
        self._good += self.slo.met(ttft_s, tpot_s)
        number = class_of(prompt_tokens, output_tokens)
        old = self._classes.get(number, ClassTally(number))
        self._classes[number] = ClassTally(
            number, old.num + 1, old.prompt_tokens + prompt_tokens, old.output_tokens + output_tokens
        )

    @property
    def tally(self) -> Tally:
        """Now."""
        classes = tuple(self._classes[number] for number in sorted(self._classes))
        return Tally(self._arrived, sum(each.num for each in classes), self._good, self._failed, classes)


def since(new: Tally, old: Tally) -> Tally:
    """What came between two counts of one gateway; all of ``new`` when it began anew between them."""
    if new.num_arrived < old.num_arrived or new.num_ended < old.num_ended or new.num_failed < old.num_failed:
        return new
    before = {each.number: each for each in old.classes}
    classes = []
    for each in new.classes:
        was = before.get(each.number, ClassTally(each.number))
        if each.num > was.num:
            classes.append(
                ClassTally(
                    each.number,
                    each.num - was.num,
                    max(0, each.prompt_tokens - was.prompt_tokens),
                    max(0, each.output_tokens - was.output_tokens),
                )
            )
    return Tally(
        new.num_arrived - old.num_arrived,
        new.num_ended - old.num_ended,
        max(0, new.num_good - old.num_good),
        new.num_failed - old.num_failed,
        tuple(classes),
    )


def added(tallies: Iterable[Tally]) -> Tally:
    """Several counts as one."""
    arrived = ended = good = failed = 0
    classes: dict[int, ClassTally] = {}
    for tally in tallies:
        arrived, ended = arrived + tally.num_arrived, ended + tally.num_ended
        good, failed = good + tally.num_good, failed + tally.num_failed
        for each in tally.classes:
            old = classes.get(each.number, ClassTally(each.number))
            classes[each.number] = ClassTally(
                each.number,
                old.num + each.num,
                old.prompt_tokens + each.prompt_tokens,
                old.output_tokens + each.output_tokens,
            )
    return Tally(arrived, ended, good, failed, tuple(classes[number] for number in sorted(classes)))


@dataclass(frozen=True, slots=True)
class Window:
    """What was seen in so many seconds."""

    seconds: float
    tally: Tally = field(default_factory=Tally)

    @property
    def rps(self) -> float:
        """Arrivals per second."""
        return self.tally.num_arrived / self.seconds if self.seconds > 0 else 0.0

    @property
    def goodput_rps(self) -> float:
        """Answers per second that were good."""
        return self.tally.num_good / self.seconds if self.seconds > 0 else 0.0

    @property
    def attainment(self) -> float:
        """Of the requests that are over, the share that was good; 1 where none is."""
        over = self.tally.num_ended + self.tally.num_failed
        return self.tally.num_good / over if over else 1.0

    @property
    def lengths(self) -> tuple[tuple[float, float, int], ...]:
        """Mean prompt and answer tokens of each class that was seen, and how many answers that is."""
        return tuple((c.prompt_tokens / c.num, c.output_tokens / c.num, c.num) for c in self.tally.classes if c.num)


class Series:
    """Buckets of ``bucket_s`` seconds of all gateways together, the newest last. Times are one clock's."""

    def __init__(self, bucket_s: float, max_buckets: int = MAX_BUCKETS) -> None:
        self.bucket_s = bucket_s
        self._last: dict[str, Tally] = {}
        self._buckets: deque[Tally] = deque(maxlen=max_buckets)
        self._open: list[Tally] = []
        #: When the open bucket began.
        self._opened_s: float | None = None

    def report(self, gateway_id: str, tally: Tally, now_s: float) -> None:
        """Take a gateway's count. The first of a gateway only says where it stands: it may have run for long."""
        self.advance(now_s)
        last = self._last.pop(gateway_id, None)
        self._last[gateway_id] = tally
        if len(self._last) > MAX_GATEWAYS:
            self._last.pop(next(iter(self._last)))
        if last is not None:
            self._open.append(since(tally, last))

    def advance(self, now_s: float) -> int:
        """Close the buckets whose time is over; how many that were."""
        if self._opened_s is None:
            self._opened_s = now_s
        closed = int((now_s - self._opened_s) / self.bucket_s)
        # A clock that stood still for days fills what there is room for, no more.
        for number in range(min(closed, self._buckets.maxlen or closed)):
            self._buckets.append(added(self._open) if not number else Tally())
            self._open.clear()
        self._opened_s += closed * self.bucket_s
        return closed

    @property
    def buckets(self) -> tuple[Tally, ...]:
        """Those that are closed."""
        return tuple(self._buckets)

    @property
    def rates(self) -> list[float]:
        """Arrivals per second in each closed bucket."""
        return [bucket.num_arrived / self.bucket_s for bucket in self._buckets]

    def window(self, seconds: float, now_s: float) -> Window:
        """The last so many seconds, in whole closed buckets and the open one; less where less is known."""
        self.advance(now_s)
        count = min(len(self._buckets), max(1, round(seconds / self.bucket_s)))
        newest = list(self._buckets)[len(self._buckets) - count :]
        open_s = now_s - (self._opened_s if self._opened_s is not None else now_s)
        return Window(count * self.bucket_s + open_s, added([*newest, *self._open]))


def mean_lengths(lengths: Iterable[tuple[float, float, float]]) -> tuple[float, float]:
    """Mean prompt and answer tokens of weighted lengths; zeros of none."""
    rows = list(lengths)
    total = sum(weight for *_, weight in rows)
    if not total:
        return 0.0, 0.0
    return sum(p * w for p, _, w in rows) / total, sum(o * w for _, o, w in rows) / total
