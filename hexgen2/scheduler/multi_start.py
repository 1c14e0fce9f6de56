"""The default strategy: many starts, short searches from each, long ones from the best, and the better kind of plan.

It keeps the paper's skeleton (groups, roles, flow, refinement) and mends it: several numbers of groups, the rounded
configuration program as one more start, annealing, and a look at plans that do not disaggregate. It stops by a count
of evaluations, never by the clock.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any, NamedTuple

from joblib import Parallel, delayed

from hexgen2.scheduler.baselines import vllm_replicas
from hexgen2.scheduler.bound import Bound, whole_groups
from hexgen2.scheduler.duties import duties_start
from hexgen2.scheduler.groups import COLOCATED, DECODE, PREFILL
from hexgen2.scheduler.located import located_bound, located_start
from hexgen2.scheduler.lp_start import lp_start
from hexgen2.scheduler.moves import Mover
from hexgen2.scheduler.partition import first_phase, number_of_groups
from hexgen2.scheduler.problem import MIXED, SPLIT, WHOLE, Problem
from hexgen2.scheduler.refine import Accept, Refined, able, annealing, climbing, cooler, refine, warmer
from hexgen2.scheduler.state import Judge, State

#: On more GPUs than this the paper's first phase, O(n^3), is no start of the default strategy.
PHASE_ONE_GPUS = 96
#: Up to so many GPUs every start is looked at, even when the first cannot be improved.
SMALL = 32
#: Long searches from the best plan of the short ones, each with a seed of its own, and their share of what those left:
#: the rest goes to one climb on from the best plan of all.
LONG_SEARCHES, LONG_SHARE = 2, 0.6
#: Evaluations that a node of the exact program's search counts as, for its limit.
NODE_EVALUATIONS = 6
#: Plans whose flow is verified in the end: the best of them is taken, and some are runners-up.
PROMISING = 5
#: A plan this near to the bound is not searched any further.
CLOSE = 1e-3
#: Another kind of plan must be better by this share of the flow to be chosen over a disaggregated one.
WORTH_CHANGING = 1e-3

Progress = Callable[[str, float, float], None]


@dataclass(frozen=True, slots=True)
class Found:
    """A strategy's answer. ``others``: runners-up as (what it is, state, flow).

    ``literal``: by the paper's own rule for strategies. ``bound_rps``: no plan of the kinds that were allowed exceeds
    it, where the search found a tighter bound than the problem's own.
    """

    state: State
    flow: float
    evaluations: int
    others: tuple[tuple[str, State, float], ...] = ()
    literal: bool = False
    bound_rps: float = inf


@dataclass(frozen=True, slots=True)
class Effort:
    """How much to search. ``starts``: states to begin from beside the strategy's own. ``progress``: told now and then.

    ``jobs``: processes that share the long searches (-1: one per core). The answer does not depend on it. ``exact``:
    look for the bound on machines, too, where the cluster is small and nothing else is near the bound: seconds.
    """

    evaluations: int
    seed: int = 0
    jobs: int = 1
    roles: tuple[str, ...] | None = None
    starts: tuple[State, ...] = ()
    exact: bool = True
    progress: Progress | None = None

    def tell(self, what: str, share: float, flow: float) -> None:
        """To whoever listens."""
        if self.progress is not None:
            self.progress(what, share, flow)


class Task(NamedTuple):
    """One search."""

    start: State
    evaluations: int
    seed: int
    accept: Accept


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
    bound_rps = inf
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
        if roles == MIXED:
            bound_rps = one.bound_rps
    best = max(found, key=lambda each: each[1].flow * (1 + WORTH_CHANGING * (each[0] == "disaggregated")))
    others = [(name, each.state, each.flow) for name, each in found if each is not best[1]]
    # A search that began from another kind's plan may have it among its own runners-up.
    told = {_key(state) for _, state, _ in others}
    others += [each for each in best[1].others if _key(each[1]) not in told]
    return replace(
        best[1],
        bound_rps=bound_rps,
        evaluations=sum(each.evaluations for _, each in found),
        others=tuple(sorted(others, key=lambda each: -each[2])),
    )


def _multi_start(problem: Problem, effort: Effort, roles: tuple[str, ...], evaluations: int) -> Found:
    judge = problem.judge
    bound = problem.bound(roles) if evaluations else problem.lp(roles)
    tried = [Refined(state, judge.flow(state)) for state in _distinct(judge, _first(problem, effort, roles, bound))]
    effort.tell("starts", 0.0, _most(tried))
    if not evaluations:
        return _answer(judge, tried, bound, 0)
    used = 0
    if not _near(tried, bound):
        short = max(1, evaluations // (5 * len(tried)))
        # Which temperature suits the problem is not known yet.
        seeds = [effort.seed * 1_000_003 + i for i in range(len(tried))]
        tasks = [
            Task(each.state, short, seed, (annealing, cooler, warmer)[seed % 3])
            for each, seed in zip(tried, seeds, strict=True)
        ]
        used += short * len(tasks)
        tried = _ranked(_run(problem, effort, roles, tasks, "short searches"))
    if not _near(tried, bound) and effort.exact and problem.fabric.num_gpus <= SMALL:
        effort.tell("exact program", 0.0, _most(tried))
        known = max(judge.verified(each.state) for each in tried[:2])
        rps, state = located_bound(judge, problem.limits, roles, bound.rps, known, evaluations // NODE_EVALUATIONS)
        bound = replace(bound, rps=rps)
        if state is not None:
            tried = _ranked([*tried, Refined(state, judge.flow(state))])
    if not _near(tried, bound):
        long = max(1, int((evaluations - used) * LONG_SHARE) // LONG_SEARCHES)
        seeds = [effort.seed * 1_000_003 + 1000 + i for i in range(LONG_SEARCHES)]
        tasks = [Task(tried[0].state, long, seed, cooler) for seed in seeds]
        used += long * LONG_SEARCHES
        tried = _ranked([*tried, *_run(problem, effort, roles, tasks, "long searches")])
    if not _near(tried, bound) and used < evaluations:
        task = Task(tried[0].state, evaluations - used, effort.seed * 1_000_003 + 2000, climbing)
        used = evaluations
        tried = _ranked([*tried, *_run(problem, effort, roles, [task], "last climb")])
    return _answer(judge, tried, bound, used)


def _ranked(tried: Iterable[Refined]) -> list[Refined]:
    return sorted(tried, key=lambda each: -each.flow)


def _most(tried: Sequence[Refined]) -> float:
    return max(each.flow for each in tried)


def _near(tried: Sequence[Refined], bound: Bound) -> bool:
    return _most(tried) >= bound.rps * (1 - CLOSE)


def _answer(judge: Judge, tried: Sequence[Refined], bound: Bound, used: int) -> Found:
    """What is published is the verified flow, so that is what the most promising are compared by."""
    promising = _ranked(tried)[:PROMISING]
    verified = sorted(((judge.verified(each.state), each) for each in promising), key=lambda each: -each[0])
    flow, best = verified[0]
    others: dict[tuple[Any, ...], tuple[str, State, float]] = {}
    for value, each in verified[1:]:
        if (key := _key(each.state)) != _key(best.state):
            others.setdefault(key, ("runner-up", each.state, value))
    return Found(best.state, flow, used, tuple(others.values())[:3], bound_rps=bound.rps)


def _first(problem: Problem, effort: Effort, roles: tuple[str, ...], bound: Bound) -> Iterable[State]:
    """States to begin from: those that were given, and our own until one is as good as the bound.

    On small clusters the others take no time, and make runners-up.
    """
    yield from effort.starts
    for state in _starts(problem, roles, bound):
        yield state
        if problem.fabric.num_gpus > SMALL and problem.judge.flow(state) >= bound.rps * (1 - CLOSE):
            return


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
        if problem.fabric.num_gpus <= SMALL:
            counts = ((PREFILL, bound.prefill), (DECODE, bound.decode), (COLOCATED, bound.colocated))
            wanted = {
                (role, columns[i].composition) for role, row in counts for i, count in enumerate(row) if count > 0.5
            }
            placed = located_start(judge, problem.limits, wanted)
            if placed is not None:
                yield placed
    yield lp_start(judge, problem.limits, columns, lp)
    if roles != WHOLE:
        by_machine = duties_start(judge, problem.limits, problem.site_links)
        if by_machine is not None:
            yield by_machine
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


def _run(problem: Problem, effort: Effort, roles: tuple[str, ...], tasks: Sequence[Task], what: str) -> list[Refined]:
    """Searches from several states, in processes if wanted; answers come in the order of tasks."""
    if effort.jobs != 1 and len(tasks) > 1:
        effort.tell(what, 0.0, 0.0)
        return list(Parallel(n_jobs=effort.jobs)(delayed(_search)(problem, roles, task) for task in tasks))
    found: list[Refined] = []
    for number, task in enumerate(tasks):

        def tell(done: int, flow: float, number: int = number, task: Task = task) -> None:
            best = max([flow, *(each.flow for each in found)])
            effort.tell(what, (number + done / task.evaluations) / len(tasks), best)

        found.append(_search(problem, roles, task, tell))
    return found


def _search(
    problem: Problem, roles: tuple[str, ...], task: Task, progress: Callable[[int, float], None] | None = None
) -> Refined:
    mover = Mover(problem.fabric, problem.limits, roles)
    return refine(
        problem.judge, mover, task.start, task.evaluations, task.seed, roles, accept=task.accept, progress=progress
    )
