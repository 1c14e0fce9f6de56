"""From what was seen to what it means: counts by fault, violations, percentiles. Pure."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.chaos.asks import CANCELLED, Kind
from benchmarks.chaos.faults import Strike
from benchmarks.chaos.outcome import End, Outcome
from benchmarks.chaos.watch import Work

#: What a client may be told. Anything else is a fault of ours.
ALLOWED = frozenset({"OK", "CANCELLED", "UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"})
#: Faults that keep the word of a cancel from the workers, or the workers from hearing it.
_DEAF = ("stop", "link", "kill", "restart")
#: A request counts for faults that ended so shortly before it began.
_AFTER_NS = 500_000_000
NONE = "none"
#: What a client is told whose answer could not be continued.
BROKE_OFF = "broke off"
GATEWAY_KILLED = "kill -9: gateway"
#: Of an error's message.
MAX_TOLD_CHARS = 100
_DIGITS = re.compile(r"[0-9a-f]{8,}|[0-9.:]*[0-9]")


@dataclass(frozen=True, slots=True)
class Row:
    """Requests that were under way during faults of one kind. One that met several kinds counts for each."""

    fault: str
    strikes: int = 0
    requests: int = 0
    answered: int = 0
    retried: int = 0
    refused: int = 0
    broken_off: int = 0
    deadline: int = 0
    cancelled: int = 0


@dataclass(frozen=True, slots=True)
class Freed:
    """Seconds from a client's leaving until no worker did anything for it any more."""

    num: int
    p50_s: float
    p99_s: float
    max_s: float


@dataclass(frozen=True, slots=True)
class Violation:
    """What must not be. ``trace_id`` finds its spans in the run's folder."""

    what: str
    detail: str
    trace_id: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of one fleet's run."""

    rows: tuple[Row, ...]
    availability: float
    #: Of requests that met no outage of the (only) gateway.
    availability_with_gateway: float
    availability_in_peace: float
    freed: Freed
    #: Of cancels whose word could not reach a worker meanwhile.
    freed_under_fault: Freed
    states: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    #: What clients were told when they got no answer, numbers left out.
    told: Mapping[str, int] = field(default_factory=dict)
    violations: tuple[Violation, ...] = ()


def judge(
    outcomes: Sequence[Outcome],
    strikes: Sequence[Strike],
    work: Mapping[str, Sequence[Work]],
    retried: Collection[str],
    free_within_s: float,
) -> Verdict:
    """``work`` by trace, ``retried``: traces of requests that were tried a second time, ``free_within_s``: how soon
    after a client has left everything of its request must be free, in 99 of 100 cases.
    """
    met = {outcome.trace_id: _met(outcome, strikes) for outcome in outcomes}
    violations = [violation for outcome in outcomes for violation in _violations(outcome)]
    violations += [each for outcome in outcomes for each in _needlessly_broken(outcome, strikes)]
    fair: list[float] = []
    under_fault: list[float] = []
    for outcome in outcomes:
        if outcome.given_up_ns is None:
            continue
        spans = work.get(outcome.trace_id, ())
        over_ns = max((span.end_ns for span in spans), default=outcome.given_up_ns)
        seconds = max(0.0, (over_ns - outcome.given_up_ns) / 1e9)
        replicas = {span.replica for span in spans} | {"gateway"}
        deaf = any(
            strike.kind.startswith(_DEAF) and strike.target in replicas
            for strike in strikes
            if strike.began_ns <= over_ns and strike.ended_ns >= outcome.given_up_ns
        )
        (under_fault if deaf else fair).append(seconds)
        if not deaf and seconds >= free_within_s:
            # One in a hundred may.
            violations.append(Violation("slow to free", f"{seconds:.2f} s after its cancel", outcome.trace_id))
    freed = _freed(fair)
    if freed.p99_s < free_within_s:
        violations = [each for each in violations if each.what != "slow to free"]
    return Verdict(
        rows=tuple(_rows(outcomes, strikes, met, retried)),
        availability=_availability(outcomes),
        availability_with_gateway=_availability([o for o in outcomes if GATEWAY_KILLED not in met[o.trace_id]]),
        availability_in_peace=_availability([o for o in outcomes if not met[o.trace_id]]),
        freed=freed,
        freed_under_fault=_freed(under_fault),
        states=_states(strikes),
        told=_told(outcomes),
        violations=tuple(violations),
    )


def _strikes_met(outcome: Outcome, strikes: Sequence[Strike]) -> list[Strike]:
    return [
        strike
        for strike in strikes
        if strike.began_ns <= outcome.ended_ns and strike.ended_ns + _AFTER_NS >= outcome.began_ns
    ]


def _met(outcome: Outcome, strikes: Sequence[Strike]) -> frozenset[str]:
    return frozenset(strike.kind for strike in _strikes_met(outcome, strikes))


def _needlessly_broken(outcome: Outcome, strikes: Sequence[Strike]) -> Iterable[Violation]:
    """An answer that broke off though it was to be continued: one fault costs a client time, and no tokens.

    Several faults at a time may take every replica that an answer goes on at, and full queues have no room for it.
    """
    if outcome.end is not End.BROKEN_OFF or outcome.kind is Kind.HISTORY or BROKE_OFF not in outcome.detail:
        return
    if "full" not in outcome.detail and len(_strikes_met(outcome, strikes)) <= 1:
        yield Violation("not continued", f"request {outcome.number}: {outcome.detail}", outcome.trace_id)


def _violations(outcome: Outcome) -> Iterable[Violation]:
    def found(what: str, detail: str) -> Violation:
        api = f"request {outcome.number} ({outcome.kind}, {outcome.api}, {outcome.num_tokens} tokens)"
        return Violation(what, f"{api}: {detail}", outcome.trace_id)

    if outcome.wrong:
        short = outcome.end is End.ANSWERED and "tokens, not" in outcome.wrong
        yield found("short answer" if short else "wrong tokens", outcome.wrong)
    if outcome.end is End.SILENT:
        waited_s = (outcome.ended_ns - outcome.began_ns) / 1e9
        yield found("no answer by its deadline", f"waited {waited_s:.1f} s, grace included")
    elif outcome.status not in ALLOWED and not (
        outcome.kind is Kind.OVERSIZE and outcome.status in ("FAILED_PRECONDITION", "INVALID_ARGUMENT")
    ):
        yield found("unexpected status", f"{outcome.status}: {outcome.detail}")


def _availability(outcomes: Iterable[Outcome]) -> float:
    """Of the requests whose clients waited for as long as it takes, how many were answered."""
    waited = [o for o in outcomes if o.kind not in (*CANCELLED, Kind.HASTY, Kind.OVERSIZE)]
    answered = sum(1 for outcome in waited if outcome.end is End.ANSWERED)
    return answered / len(waited) if waited else 1.0


def _rows(
    outcomes: Sequence[Outcome],
    strikes: Sequence[Strike],
    met: Mapping[str, frozenset[str]],
    retried: Collection[str],
) -> Iterable[Row]:
    num_strikes = Counter(strike.kind for strike in strikes)
    for kind in (*sorted(num_strikes), NONE):
        those = [o for o in outcomes if (kind in met[o.trace_id] if kind != NONE else not met[o.trace_id])]
        ends = Counter(outcome.end for outcome in those)
        yield Row(
            fault=kind,
            strikes=num_strikes[kind],
            requests=len(those),
            answered=ends[End.ANSWERED],
            retried=sum(1 for o in those if o.end is End.ANSWERED and o.trace_id in retried),
            refused=ends[End.REFUSED],
            broken_off=ends[End.BROKEN_OFF],
            deadline=ends[End.DEADLINE],
            cancelled=ends[End.CANCELLED],
        )


def _states(strikes: Sequence[Strike]) -> dict[str, dict[str, int]]:
    """By fault, how often at least one transfer was in each state."""
    counts: dict[str, Counter[str]] = {}
    for strike in strikes:
        counts.setdefault(strike.kind, Counter()).update(strike.states.keys())
    return {kind: dict(sorted(states.items())) for kind, states in sorted(counts.items()) if states}


def _told(outcomes: Iterable[Outcome]) -> dict[str, int]:
    told = Counter(
        f"{outcome.status}: {_DIGITS.sub('#', outcome.detail)[:MAX_TOLD_CHARS]}"
        for outcome in outcomes
        if outcome.end in (End.REFUSED, End.BROKEN_OFF, End.DEADLINE)
    )
    return dict(told.most_common())


def _freed(seconds: Sequence[float]) -> Freed:
    ordered = sorted(seconds) or [0.0]
    return Freed(len(seconds), _percentile(ordered, 0.5), _percentile(ordered, 0.99), ordered[-1])


def _percentile(ordered: Sequence[float], fraction: float) -> float:
    return ordered[min(len(ordered) - 1, int(len(ordered) * fraction))]
