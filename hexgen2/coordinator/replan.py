"""When to plan anew, whether what was found is worth it, and whether it kept its word. Pure; times are one clock's.

A change of roles is cheap but not free, and measurements are noisy. So a plan stays unless something drifted that it
was made for, a new one must be better by a margin that also pays for its moves, changes keep a distance of each other,
and one after which fewer answers are good is taken back.
"""

from dataclasses import dataclass
from math import log

from hexgen2.observed import Window, mean_lengths
from hexgen2.workload import LengthClass, Workload

#: After a change was taken back, the distance to the next is so many times as long.
PATIENCE_AFTER_ROLLBACK = 4.0


@dataclass(frozen=True, slots=True)
class Policy:
    """How eager to be; the fields' meaning is ``config.ReplanConfig``'s."""

    drift: float = 0.3
    busy: float = 0.85
    min_gain: float = 0.1
    min_requests: int = 20
    interval_s: float = 60.0
    window_s: float = 60.0
    watch_s: float = 60.0
    max_drop: float = 0.15
    flip_s: float = 5.0
    horizon_s: float = 300.0


@dataclass(frozen=True, slots=True)
class InForce:
    """The plan that runs: what it was made for, and since when. ``capacity_rps`` is of that workload."""

    workload: Workload
    capacity_rps: float
    since_s: float
    replicas: frozenset[str]
    #: Not to be changed before: after a change, and longer after one that was taken back.
    settled_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Situation:
    """What is seen now. ``forecast_rps`` is 0 when nobody forecasts; ``there`` are replicas that could serve."""

    now_s: float
    window: Window
    forecast_rps: float
    there: frozenset[str]
    #: How the plan's times are off, where no plan was looked for since they are so; else empty.
    off: str = ""

    @property
    def rps(self) -> float:
        """What must be carried: what comes now or will, whichever is more."""
        return max(self.window.rps, self.forecast_rps)


def why_search(policy: Policy, plan: InForce, seen: Situation) -> str:
    """Why a plan should be looked for; empty: the one in force stays without a look.

    Replicas that went or came are looked at whatever else is: they wait for nothing.
    """
    if gone := sorted(plan.replicas - seen.there):
        return f"{', '.join(gone)} {'is' if len(gone) == 1 else 'are'} gone"
    if seen.now_s < plan.settled_s:
        return ""
    if new := sorted(seen.there - plan.replicas):
        return f"{', '.join(new)} {'is' if len(new) == 1 else 'are'} there again"
    if seen.off:
        return f"the plan's times are off: {seen.off}"
    if seen.window.tally.num_ended < policy.min_requests:
        return ""
    drifts = []
    planned = (plan.workload.mean_prompt_tokens, plan.workload.mean_output_tokens)
    for what, before, now in zip(("prompts", "answers"), planned, mean_lengths(seen.window.lengths), strict=True):
        if now > 0 and abs(log(now / before)) > log(1 + policy.drift):
            drifts.append(f"{what} have {now:.0f} tokens, planned were {before:.0f}")
    if drifts:
        return "; ".join(drifts)
    if plan.capacity_rps > 0 and seen.rps > policy.busy * plan.capacity_rps:
        told = "come" if seen.rps == seen.window.rps else "are forecast"
        # It was made for this rate already, unless it grew since.
        if plan.workload.rate is None or seen.rps > plan.workload.rate * (1 + policy.drift):
            return f"{seen.rps:.3g} requests/s {told}, {plan.capacity_rps:.3g} is the most"
    return ""


def workload_now(plan: InForce, seen: Situation) -> Workload:
    """What to plan for: lengths as seen, limits as they were; the plan's own lengths while too little is seen."""
    lengths = tuple(
        LengthClass(prompt_tokens=max(1, round(prompt)), output_tokens=max(1, round(output)), weight=num)
        for prompt, output, num in seen.window.lengths
    )
    # Built, not copied: what a workload remembers of its lengths would be copied, too.
    return Workload(
        name="observed" if lengths else plan.workload.name,
        lengths=lengths or plan.workload.lengths,
        # What is seen are means.
        max_prompt_tokens=plan.workload.longest_prompt_tokens,
        max_total_tokens=plan.workload.longest_tokens,
        rate=seen.rps if seen.rps > 0 else plan.workload.rate,
        ttft_s=plan.workload.ttft_s,
        tpot_s=plan.workload.tpot_s,
    )


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether to change, and why (not)."""

    change: bool
    why: str


def judge(
    policy: Policy, reason: str, rps: float, current_rps: float, found_rps: float, flips: int, num_replicas: int
) -> Verdict:
    """``rps`` come; the present roles carry ``current_rps`` of them and those found ``found_rps``.

    What changes its role serves next to nothing for ``flip_s``: its share of the requests of that time is what it
    costs, and must be gained within the horizon.
    """
    told = f"{reason}: {found_rps:.3g} requests/s instead of {current_rps:.3g}, {flips} roles change"
    if not flips:
        return Verdict(False, f"{reason}: the roles are the best there are ({current_rps:.3g} requests/s)")
    if found_rps < current_rps * (1 + policy.min_gain):
        return Verdict(False, f"{told}: less than {policy.min_gain:.0%} better")
    if current_rps <= 0:
        return Verdict(True, told)
    wanted = rps if rps > policy.busy * current_rps else found_rps
    gained = (min(wanted, found_rps) - min(wanted, current_rps)) * policy.horizon_s
    cost = flips * policy.flip_s * current_rps / max(1, num_replicas)
    if gained <= cost:
        return Verdict(False, f"{told}: its moves cost more than it gains in {policy.horizon_s:.0f} s")
    return Verdict(True, told)


@dataclass(frozen=True, slots=True)
class Watch:
    """A change that is on trial: ``before`` is what was seen before it, and it began at ``since_s``."""

    before: Window
    since_s: float
    until_s: float


def why_back(policy: Policy, watch: Watch, after: Window) -> str:
    """Why a change that was watched is to be taken back; empty: it stays.

    Shares of good answers are compared, so that fewer requests alone are no fault of the plan.
    """
    over = after.tally.num_ended + after.tally.num_failed
    if over < policy.min_requests:
        return ""
    drop = watch.before.attainment - after.attainment
    if drop <= policy.max_drop:
        return ""
    return f"{after.attainment:.0%} of answers were good after it, {watch.before.attainment:.0%} before"
