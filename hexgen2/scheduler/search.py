"""Strategies by name: each turns a problem into a state. All stop by a count of evaluations, none by the clock."""

from collections.abc import Callable
from functools import partial

from hexgen2.errors import ConfigError
from hexgen2.scheduler.baselines import distserve, genetic, vllm_replicas
from hexgen2.scheduler.exhaustive import exhaustive
from hexgen2.scheduler.lp_start import lp_start
from hexgen2.scheduler.moves import Mover
from hexgen2.scheduler.multi_start import Effort, Found, hexgen2, within_limits
from hexgen2.scheduler.partition import first_phase, number_of_groups
from hexgen2.scheduler.problem import SPLIT, WHOLE, Problem
from hexgen2.scheduler.refine import Accept, able, annealing, climbing, refine
from hexgen2.scheduler.state import State


def paper(problem: Problem, effort: Effort) -> Found:
    """The paper's steps literally: one number of groups, its rule for strategies, swaps guided by the cut."""
    judge = problem.paper_judge
    start = able(judge, first_phase(judge.groups, max(2, number_of_groups(judge.groups))))
    mover = Mover(problem.fabric, problem.limits, SPLIT)
    found = refine(judge, mover, start, effort.evaluations, effort.seed, SPLIT, accept=climbing, guided=1.0)
    return Found(found.state, judge.verified(found.state), effort.evaluations, literal=True)


def no_refinement(problem: Problem, effort: Effort) -> Found:
    """The paper's first phase alone."""
    state = _phase_one(problem)
    return Found(state, problem.judge.verified(state), 0)


def lp_alone(problem: Problem, effort: Effort) -> Found:
    """The configuration program, rounded and put on machines, alone."""
    state = lp_start(problem.judge, problem.limits, problem.columns(SPLIT), problem.lp(SPLIT))
    return Found(state, problem.judge.verified(state), 0)


def _neighbours(problem: Problem, effort: Effort, accept: Accept, steps: tuple[str, ...] | None = None) -> Found:
    """From the first phase, blind steps."""
    judge = problem.judge
    mover = Mover(problem.fabric, problem.limits, SPLIT, steps)
    found = refine(judge, mover, _phase_one(problem), effort.evaluations, effort.seed, SPLIT, accept=accept, guided=0.0)
    return Found(found.state, judge.verified(found.state), effort.evaluations)


def genetic_search(problem: Problem, effort: Effort) -> Found:
    """HexGen's genetic search over disaggregated plans."""
    mover = Mover(problem.fabric, problem.limits, SPLIT, ("merge", "split", "swap", "give", "flip"))
    state = genetic(problem.judge, mover, _phase_one(problem), effort.evaluations, effort.seed, SPLIT)
    return Found(state, problem.judge.verified(state), effort.evaluations)


def hexgen(problem: Problem, effort: Effort) -> Found:
    """HexGen: colocated replicas over mixed GPUs, by its genetic search."""
    mover = Mover(problem.fabric, problem.limits, WHOLE)
    state = genetic(problem.judge, mover, vllm_replicas(problem), effort.evaluations, effort.seed, WHOLE)
    return Found(state, problem.judge.verified(state), effort.evaluations)


def colocated(problem: Problem, effort: Effort) -> Found:
    """vLLM replicas."""
    state = vllm_replicas(problem)
    return Found(state, problem.judge.verified(state), 0)


def all_states(problem: Problem, effort: Effort) -> Found:
    """The best there is, on small clusters."""
    state, flow = exhaustive(problem.judge, problem.limits, effort.roles or SPLIT)
    return Found(state, flow, 0)


def distserve_plan(problem: Problem, effort: Effort) -> Found:
    """DistServe's pair of configurations."""
    state = distserve(problem)
    return Found(state, problem.judge.verified(state), 0)


def _phase_one(problem: Problem) -> State:
    judge = problem.judge
    return within_limits(problem, judge, first_phase(judge.groups, max(2, number_of_groups(judge.groups))))


STRATEGIES: dict[str, Callable[[Problem, Effort], Found]] = {
    "hexgen2": hexgen2,
    "paper": paper,
    "no-refinement": no_refinement,
    "lp-start": lp_alone,
    "random-swap": partial(_neighbours, accept=climbing, steps=("swap",)),
    "genetic": genetic_search,
    "annealing": partial(_neighbours, accept=annealing),
    "hill-climb": partial(_neighbours, accept=climbing),
    "exhaustive": all_states,
    "distserve": distserve_plan,
    "hexgen": hexgen,
    "colocated": colocated,
}


def strategy(name: str) -> Callable[[Problem, Effort], Found]:
    """By name. Raises ConfigError."""
    if name not in STRATEGIES:
        raise ConfigError(f"strategy: no `{name}`; there are: {', '.join(STRATEGIES)}")
    return STRATEGIES[name]
