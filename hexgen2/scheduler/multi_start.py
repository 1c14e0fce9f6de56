"""The default strategy: many starts, short searches from each, long ones from the best, and the better kind of plan.

It keeps the paper's skeleton (groups, roles, flow, refinement) and mends it: several numbers of groups, the rounded
configuration program as one more start, annealing, and a look at plans that do not disaggregate. It stops by a count
of evaluations, never by the clock.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from joblib import Parallel, delayed

from hexgen2.scheduler.baselines import vllm_replicas
from hexgen2.scheduler.bound import Bound, whole_groups
from hexgen2.scheduler.groups import COLOCATED
from hexgen2.scheduler.lp_start import lp_start
from hexgen2.scheduler.moves import Mover
from hexgen2.scheduler.partition import first_phase, number_of_groups
from hexgen2.scheduler.problem import MIXED, SPLIT, WHOLE, Problem
from hexgen2.scheduler.refine import Accept, Refined, able, annealing, cooler, refine, warmer
from hexgen2.scheduler.state import Judge, State

#: On more GPUs than this the paper's first phase, O(n^3), is no start of the default strategy.
PHASE_ONE_GPUS = 96
#: Up to so many GPUs every start is looked at, even when the first cannot be improved.
SMALL = 32
#: The long searches that the best two starts get, each with a seed of its own.
LONG_SEARCHES = 3
#: A plan this near to the bound is not searched any further.
CLOSE = 1e-3
#: Another kind of plan must be better by this share of the flow to be chosen over a disaggregated one.
WORTH_CHANGING = 1e-3

Progress = Callable[[str, float, float], None]


@dataclass(frozen=True, slots=True)
class Found:
    """A strategy's answer. ``others``: runners-up as (what it is, state, flow); ``why``: why this kind of plan."""

    state: State
    flow: float
    evaluations: int
    others: tuple[tuple[str, State, float], ...] = ()
    history: tuple[tuple[int, float], ...] = ()
    literal: bool = False


@dataclass(frozen=True, slots=True)
class Effort:
    """How much to search. ``starts``: states to begin from beside the strategy's own. ``progress``: told now and then.

    ``jobs``: processes that share the long searches (-1: one per core). The answer does not depend on it.
    """

    evaluations: int
    seed: int = 0
    jobs: int = 1
    roles: tuple[str, ...] | None = None
    starts: tuple[State, ...] = ()
    progress: Progress | None = None

    def tell(self, what: str, share: float, flow: float) -> None:
        """To whoever listens."""
        if self.progress is not None:
            self.progress(what, share, flow)


def hexgen2(problem: Problem, effort: Effort) -> Found:
    """The default. Without ``effort.roles`` it chooses between disaggregated, colocated and mixed plans."""
    if effort.roles is not None:
        return _multi_start(problem, effort, effort.roles, effort.evaluations)
    main = effort.evaluations * 7 // 10
    kinds: list[tuple[str, tuple[str, ...], int]] = [
        ("disaggregated", SPLIT, main),
        ("colocated", WHOLE, (effort.evaluations - main) // 2),
        ("mixed", MIXED, (effort.evaluations - main) // 2),
    ]
    found: list[tuple[str, Found]] = []
    for name, roles, evaluations in kinds:
        if not problem.columns(roles):
            continue
        best_flow = max((each.flow for _, each in found), default=0.0)
        enough = best_flow * (1 + WORTH_CHANGING)
        # The linear bound is cheaper, and often says it already.
        if problem.lp(roles).rps <= enough or problem.bound(roles).rps <= enough:
            # It cannot win. Colocated replicas are still placed, to say what they would carry.
            if roles == MIXED:
                continue
            evaluations = 0
        extra = tuple(each.state for _, each in found) if roles == MIXED else ()
        one = _multi_start(problem, replace(effort, starts=effort.starts + extra), roles, evaluations)
        if one.flow > 0:
            found.append((name, one))
    best = max(found, key=lambda each: each[1].flow * (1 + WORTH_CHANGING * (each[0] == "disaggregated")))
    others = tuple((name, each.state, each.flow) for name, each in found if each is not best[1])
    return replace(
        best[1],
        evaluations=sum(each.evaluations for _, each in found),
        others=tuple(sorted((*others, *best[1].others), key=lambda each: -each[2])),
    )


def _multi_start(problem: Problem, effort: Effort, roles: tuple[str, ...], evaluations: int) -> Found:
    judge = problem.judge
    bound = problem.bound(roles) if evaluations else problem.lp(roles)
    states = list(effort.starts)
    for state in _starts(problem, roles, bound):
        states.append(state)
        # On small clusters the others take no time, and make runners-up.
        if problem.fabric.num_gpus > SMALL and judge.flow(state) >= bound.rps * (1 - CLOSE):
            break
    starts = _distinct(judge, states)
    tried = [Refined(state, judge.flow(state), 0, ((0, judge.flow(state)),)) for state in starts]
    used = 0
    effort.tell("starts", 0.0, max(each.flow for each in tried))
    if evaluations and max(each.flow for each in tried) < bound.rps * (1 - CLOSE):
        short = max(1, evaluations // (5 * len(starts)))
        tasks = [(state, short, effort.seed * 1_000_003 + i) for i, state in enumerate(starts)]
        tried = _run(problem, effort, roles, tasks, "short searches")
        used += short * len(starts)
    ranked = sorted(tried, key=lambda each: -each.flow)
    if evaluations and ranked[0].flow < bound.rps * (1 - CLOSE):
        long = max(1, (evaluations - used) // LONG_SEARCHES)
        tasks = [
            # The best with two temperatures, the second with another.
            (ranked[i // 2 % min(2, len(ranked))].state, long, effort.seed * 1_000_003 + 1000 + i)
            for i in range(LONG_SEARCHES)
        ]
        tried = [*ranked, *_run(problem, effort, roles, tasks, "long searches")]
        used += long * LONG_SEARCHES
    # What is published is the verified flow, so that is what the best are compared by.
    ranked = sorted(tried, key=lambda each: -each.flow)[: LONG_SEARCHES + 2]
    verified = sorted(
        ((judge.verified(each.state), -i, each) for i, each in enumerate(ranked)),
        key=lambda each: each[:2],
        reverse=True,
    )
    flow, _, best = verified[0]
    others = [("runner-up", each.state, value) for value, _, each in verified[1:]]
    seen = {_key(best.state)}
    distinct = []
    for name, state, value in others:
        if (key := _key(state)) not in seen:
            seen.add(key)
            distinct.append((name, state, value))
    return Found(best.state, flow, used, tuple(distinct[:3]), best.history)


def _starts(problem: Problem, roles: tuple[str, ...], bound: Bound) -> Iterable[State]:
    """The configuration program, whole and rounded, and the paper's first phase with several numbers of groups."""
    judge, columns = problem.judge, problem.columns(roles)
    lp = problem.lp(roles)
    if bound.method == lp.method:
        whole = whole_groups(columns, problem.supply, problem.site_links)
        if whole is not None:
            yield lp_start(judge, problem.limits, columns, replace(whole, gpu_worth=lp.gpu_worth))
    else:
        yield lp_start(judge, problem.limits, columns, replace(bound, gpu_worth=lp.gpu_worth))
    yield lp_start(judge, problem.limits, columns, lp)
    if COLOCATED in roles:
        yield vllm_replicas(problem)
    if roles != WHOLE and problem.fabric.num_gpus <= PHASE_ONE_GPUS:
        most = number_of_groups(judge.groups)
        of_lp = round(sum(lp.prefill) + sum(lp.decode))
        for count in sorted({most, most * 3 // 4, most // 2, of_lp - 1, of_lp, of_lp + 1}):
            if 2 <= count <= problem.fabric.num_gpus:
                yield within_limits(problem, judge, first_phase(judge.groups, count))


def within_limits(problem: Problem, judge: Judge, state: State) -> State:
    """Without groups that break the limits or cannot serve; their GPUs idle."""
    kept = [group for group in state.groups if problem.limits.allow(problem.fabric, group.parts)]
    return able(judge, State.of(problem.fabric, kept))


def _distinct(judge: Judge, states: Iterable[State]) -> list[State]:
    kept = {_key(state): state for state in states}
    return sorted(kept.values(), key=lambda state: -judge.flow(state))[:8]


def _key(state: State) -> tuple[Any, ...]:
    return tuple(sorted((group.role, group.parts) for group in state.groups))


def _run(
    problem: Problem, effort: Effort, roles: tuple[str, ...], tasks: Sequence[tuple[State, int, int]], what: str
) -> list[Refined]:
    """Searches from several states, in processes if wanted; answers come in the order of tasks."""
    if effort.jobs == 1:
        found: list[Refined] = []
        for number, (state, evaluations, seed) in enumerate(tasks):

            def tell(done: int, flow: float, number: int = number, evaluations: int = evaluations) -> None:
                best = max([flow, *(each.flow for each in found)])
                effort.tell(what, (number + done / evaluations) / len(tasks), best)

            mover = Mover(problem.fabric, problem.limits, roles)
            found.append(
                refine(problem.judge, mover, state, evaluations, seed, roles, accept=_accept(seed), progress=tell)
            )
        return found
    effort.tell(what, 0.0, 0.0)
    return list(Parallel(n_jobs=effort.jobs)(delayed(_search)(problem, roles, *task) for task in tasks))


def _search(problem: Problem, roles: tuple[str, ...], state: State, evaluations: int, seed: int) -> Refined:
    mover = Mover(problem.fabric, problem.limits, roles)
    return refine(problem.judge, mover, state, evaluations, seed, roles, accept=_accept(seed))


def _accept(seed: int) -> Accept:
    return (annealing, cooler, warmer)[seed % 3]
