"""The paper's fifth step: from a state to better ones, by proposals, until a count of evaluations is used up.

One loop serves every search that goes from neighbour to neighbour; what differs is passed in: which proposals, and
which of them to accept. Accepting like annealing matters: a purely guided climb lost up to 35 % on small clusters.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import exp
from random import Random

from hexgen2.scheduler.moves import GUIDED, Hint, Mover, blind, hint_of
from hexgen2.scheduler.state import Group, Judge, State

#: Temperature at the start, in shares of what `SEVERAL` groups carry; it falls to nothing.
WARMTH = 0.05
#: A step changes one or two groups: among many, a temperature in shares of the whole flow would take every step.
SEVERAL = 3

#: Judges a worse neighbour: (how much worse, what several groups carry, share of the effort that is used) ->
#: probability of taking it.
Accept = Callable[[float, float, float], float]


@dataclass(frozen=True, slots=True)
class Refined:
    """The best state met and its flow (``Judge.flow``)."""

    state: State
    flow: float


def annealing(worse: float, several: float, used: float) -> float:
    """Metropolis, with a temperature that falls from `WARMTH` of what several groups carry to zero."""
    temperature = WARMTH * several * (1.0 - used)
    return exp(-worse / temperature) if temperature > 0 else 0.0


def cooler(worse: float, several: float, used: float) -> float:
    """Annealing from a quarter of the temperature: better where effort is short."""
    return annealing(worse, several / 4, used)


def warmer(worse: float, several: float, used: float) -> float:
    """Annealing from four times the temperature: where full network cards make the ground between good states rough."""
    return annealing(worse, 4 * several, used)


def climbing(worse: float, several: float, used: float) -> float:
    """Only upwards."""
    return 0.0


def refine(
    judge: Judge,
    mover: Mover,
    start: State,
    evaluations: int,
    seed: int,
    roles: tuple[str, ...],
    *,
    accept: Accept = annealing,
    guided: float = GUIDED,
    progress: Callable[[int, float], None] | None = None,
) -> Refined:
    """Search from ``start`` for ``evaluations`` proposals. The same arguments give the same answer."""
    chance = Random(seed)
    state = start
    flow = judge.flow(state)
    score = _score(judge, state, flow)
    best, best_flow, best_score = state, flow, score
    hint: Hint | None = None
    for number in range(evaluations):
        if progress is not None and number % 200 == 0:
            progress(number, best_flow)
        if chance.random() < guided:
            hint = hint or hint_of(judge, state)
            proposed = mover.propose(state, hint, chance)
        else:
            proposed = mover.propose(state, blind(state, roles, chance), chance)
        if proposed is None:
            continue
        proposed = able(judge, proposed)
        # The ceiling first: it costs a sum. What it rules out needs no flow.
        used, drawn = number / evaluations, chance.random()
        ceiling = judge.ceiling(proposed)
        ceiling_score = _score(judge, proposed, ceiling)
        several = score * min(1.0, SEVERAL / max(1, len(state.groups)))
        if ceiling_score < score and drawn >= accept(score - ceiling_score, several, used):
            continue
        then = judge.flow(proposed)
        then_score = _score(judge, proposed, then)
        if then_score < score and drawn >= accept(score - then_score, several, used):
            continue
        state, flow, score, hint = proposed, then, then_score, None
        if score > best_score:
            best, best_flow, best_score = state, max(flow, best_flow), score
    return Refined(best, judge.flow(best))


def able(judge: Judge, state: State) -> State:
    """The state without groups that cannot have their role: their GPUs idle."""
    lame = [group for group in state.groups if judge.rate(group) <= 0]
    if not lame:
        return state
    free = list(state.free)
    kept: list[Group] = []
    for group in state.groups:
        if judge.rate(group) > 0:
            kept.append(group)
        else:
            for pool, count in group.parts:
                free[pool] += count
    return State(tuple(kept), tuple(free))


def _score(judge: Judge, state: State, flow: float) -> float:
    """The flow, and a little for what the larger role could do more: steps that raise it lead somewhere, too."""
    prefill, decode = judge.sums(state.groups)
    return flow + 0.01 * min(max(prefill, decode), 1.5 * flow)
