"""Steps from one state to a neighbouring one: proposals guided by the minimum cut, and blind ones.

The paper's fifth step swaps edges between bottlenecks and slack; its rule is unpublished. Here the groups behind the
cut are *starved* and the others are donors: proposals flip a donor to the starved role, move GPUs from donors or idle
ones to the starved, swap, merge, split, or bring prefill and decode onto one machine where a network card is full.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

from hexgen2.scheduler.columns import Limits
from hexgen2.scheduler.fabric import Fabric
from hexgen2.scheduler.state import Group, Judge, State, parts_of

T = TypeVar("T")

#: Of proposals that follow the cut; the others are blind, so that a wrong hint does not lock the search.
GUIDED = 0.8


#: Steps by name, those that are drawn more often repeated.
STEPS = ("give", "give", "flip", "swap", "merge", "split", "found", "dissolve", "remake")


@dataclass(frozen=True, slots=True)
class Hint:
    """What a state lacks: see `Judge.starved`."""

    role: str
    starved: tuple[int, ...]
    donors: tuple[int, ...]
    machines: tuple[int, ...]


def blind(state: State, roles: Sequence[str], chance: Random) -> Hint:
    """A hint that knows nothing: every group is as good a donor as any."""
    every = tuple(range(len(state.groups)))
    return Hint(roles[chance.randrange(len(roles))], every, every, ())


def hint_of(judge: Judge, state: State) -> Hint:
    """What the state's minimum cut says."""
    role, starved, machines = judge.starved(state)
    donors = tuple(i for i in range(len(state.groups)) if i not in starved)
    every = tuple(range(len(state.groups)))
    return Hint(role, tuple(sorted(starved)) or every, donors or every, tuple(sorted(machines)))


Step = Callable[[State, Hint, Random], State | None]


class Mover:
    """Proposes neighbours within limits. ``roles``: those that a group may have; ``steps``: of `STEPS`, default all."""

    def __init__(
        self, fabric: Fabric, limits: Limits, roles: Sequence[str], steps: Sequence[str] | None = None
    ) -> None:
        self._fabric = fabric
        self._limits = limits
        self._roles = tuple(roles)
        self._all = steps is None
        self._steps: list[Step] = [getattr(self, f"_{name}") for name in steps or STEPS]

    def propose(self, state: State, hint: Hint, chance: Random) -> State | None:
        """A neighbour, or None when the step that was drawn cannot be made."""
        if not state.groups:
            return self._found(state, hint, chance)
        steps = self._steps
        if hint.machines and self._all:
            steps = [*steps, self._bring_together, self._bring_together, self._remake, self._remake]
        step: Step = steps[chance.randrange(len(steps))]
        return step(state, hint, chance)

    def _flip(self, state: State, hint: Hint, chance: Random) -> State | None:
        """A donor takes the starved role."""
        chosen = _pick(hint.donors, chance)
        group = state.groups[chosen]
        if group.role == hint.role:
            others = [role for role in self._roles if role != group.role]
            if not others:
                return None
            return self._with(state, {chosen}, [Group(_pick(others, chance), group.parts)])
        return self._with(state, {chosen}, [Group(hint.role, group.parts)])

    def _give(self, state: State, hint: Hint, chance: Random) -> State | None:
        """One, two, four or all of a pool's GPUs go from a donor, or from those that idle, to a starved group."""
        to = _pick(hint.starved, chance)
        idle = [pool for pool, count in enumerate(state.free) if count]
        if idle and chance.random() < 0.5:
            pool = _pick(idle, chance)
            count = _some(state.free[pool], chance)
            grown = _add(state.groups[to], pool, count)
            return self._with(state, {to}, [grown])
        donor = _pick(hint.donors, chance)
        if donor == to:
            return None
        pool, there = _pick(state.groups[donor].parts, chance)
        count = _some(there, chance)
        shrunk, grown = _add(state.groups[donor], pool, -count), _add(state.groups[to], pool, count)
        return self._with(state, {donor, to}, [shrunk, grown])

    def _swap(self, state: State, hint: Hint, chance: Random) -> State | None:
        """GPUs of a starved group for GPUs of a donor."""
        a, b = _pick(hint.starved, chance), _pick(hint.donors, chance)
        if a == b:
            return None
        (pool_a, there_a), (pool_b, there_b) = (
            _pick(state.groups[a].parts, chance),
            _pick(state.groups[b].parts, chance),
        )
        if pool_a == pool_b:
            return None
        count_a, count_b = _some(there_a, chance), _some(there_b, chance)
        one = _add(_add(state.groups[a], pool_a, -count_a), pool_b, count_b)
        other = _add(_add(state.groups[b], pool_b, -count_b), pool_a, count_a)
        return self._with(state, {a, b}, [one, other])

    def _merge(self, state: State, hint: Hint, chance: Random) -> State | None:
        """Two groups become one, in the role of the starved."""
        a, b = _pick(hint.starved, chance), _pick(range(len(state.groups)), chance)
        if a == b:
            return None
        merged = state.groups[a]
        for pool, count in state.groups[b].parts:
            merged = _add(merged, pool, count)
        return self._with(state, {a, b}, [merged])

    def _split(self, state: State, hint: Hint, chance: Random) -> State | None:
        """A group becomes two: half of each pool, or some pools each; one of them in the starved role."""
        chosen = _pick(range(len(state.groups)), chance)
        group = state.groups[chosen]
        if group.num_gpus < 2:
            return None
        one: dict[int, int] = {}
        if len(group.parts) > 1 and chance.random() < 0.5:
            for pool, count in group.parts:
                if chance.random() < 0.5:
                    one[pool] = count
        else:
            for pool, count in group.parts:
                one[pool] = count // 2 if chance.random() < 0.7 else chance.randint(0, count)
        other = {pool: count - one.get(pool, 0) for pool, count in group.parts}
        first, second = Group(hint.role, parts_of(one)), Group(group.role, parts_of(other))
        return self._with(state, {chosen}, [first, second]) if first.parts and second.parts else None

    def _found(self, state: State, hint: Hint, chance: Random) -> State | None:
        """Idle GPUs become a group."""
        idle = [pool for pool, count in enumerate(state.free) if count]
        if not idle:
            return None
        pool = _pick(idle, chance)
        counts = {pool: chance.randint(1, min(state.free[pool], self._limits.max_gpus))}
        if len(idle) > 1 and chance.random() < 0.5:
            other = _pick(idle, chance)
            counts.setdefault(other, chance.randint(1, min(state.free[other], self._limits.max_gpus)))
        return self._with(state, set(), [Group(hint.role, parts_of(counts))])

    def _dissolve(self, state: State, hint: Hint, chance: Random) -> State | None:
        """A donor ends; its GPUs join a starved group as far as they may, the others idle."""
        donor = _pick(hint.donors, chance)
        to = _pick(hint.starved, chance)
        if donor == to:
            return None
        grown = state.groups[to]
        for pool, count in state.groups[donor].parts:
            wider = _add(grown, pool, count)
            grown = wider if self._limits.allow(self._fabric, wider.parts) else grown
        return self._with(state, {donor, to}, [grown])

    def _remake(self, state: State, hint: Hint, chance: Random) -> State | None:
        """All groups on one or two machines become two or three new ones that are spread over both.

        Prefill and decode over the same machines keep each layer's KV inside a machine, where cards are slow; single
        steps lead there only through worse states.
        """
        pools = self._fabric.pools
        machines = set()
        for chosen in (_pick(range(len(state.groups)), chance), _pick(range(len(state.groups)), chance)):
            machines.add(pools[_pick(state.groups[chosen].parts, chance)[0]].machine)
        within = {
            i for i, group in enumerate(state.groups) if all(pools[pool].machine in machines for pool, _ in group.parts)
        }
        left = {pool: n for pool, n in enumerate(state.free) if n and pools[pool].machine in machines}
        for i in within:
            for pool, count in state.groups[i].parts:
                left[pool] = left.get(pool, 0) + count
        made: list[Group] = []
        roles = list(self._roles)
        chance.shuffle(roles)
        for number in range(chance.choice((2, 2, 3))):
            counts = {}
            for pool in sorted(left):
                half = left[pool] // 2 if chance.random() < 0.3 else chance.randint(0, left[pool])
                counts[pool] = half
                left[pool] -= half
            made.append(Group(roles[number % len(roles)], parts_of(counts)))
        # What is left joins the last that was made.
        last = dict(made[-1].parts)
        made[-1] = Group(made[-1].role, parts_of({pool: last.get(pool, 0) + n for pool, n in left.items()}))
        return self._with(state, within, made)

    def _bring_together(self, state: State, hint: Hint, chance: Random) -> State | None:
        """A group on a machine whose card is full and one elsewhere exchange GPUs of one kind, or change roles."""
        machine = _pick(hint.machines, chance)
        pools = self._fabric.pools
        here = [
            (i, pool, count)
            for i, group in enumerate(state.groups)
            for pool, count in group.parts
            if pools[pool].machine == machine
        ]
        if not here:
            return None
        i, pool, count = _pick(here, chance)
        if chance.random() < 0.3:
            return self._with(state, {i}, [Group(_pick(self._roles, chance), state.groups[i].parts)])
        there = [
            (j, other, n)
            for j, group in enumerate(state.groups)
            for other, n in group.parts
            if j != i and pools[other].kind == pools[pool].kind and pools[other].machine != machine
        ]
        if not there:
            return None
        j, other, n = _pick(there, chance)
        moved = min(count, n)
        one = _add(_add(state.groups[i], pool, -moved), other, moved)
        two = _add(_add(state.groups[j], other, -moved), pool, moved)
        return self._with(state, {i, j}, [one, two])

    def _with(self, state: State, without: set[int], groups: Sequence[Group]) -> State | None:
        """The state with some groups replaced; None when one breaks the limits. Groups without GPUs vanish."""
        free = list(state.free)
        for i in without:
            for pool, count in state.groups[i].parts:
                free[pool] += count
        kept = [group for i, group in enumerate(state.groups) if i not in without]
        for group in groups:
            if group.parts:
                if not self._limits.allow(self._fabric, group.parts):
                    return None
                for pool, count in group.parts:
                    free[pool] -= count
                kept.append(group)
        return State(tuple(kept), tuple(free))


def _pick(options: Sequence[T], chance: Random) -> T:
    return options[chance.randrange(len(options))]


def _some(most: int, chance: Random) -> int:
    return min(most, (1, 2, 4, most)[chance.randrange(4)])


def _add(group: Group, pool: int, count: int) -> Group:
    counts = dict(group.parts)
    counts[pool] = counts.get(pool, 0) + count
    return Group(group.role, parts_of(counts))
