"""What the search moves through: groups with roles, GPUs that idle, and the flow that they can carry.

A state names no GPU: each group is how many GPUs it takes of each pool. Most states are judged by the smaller of the
summed prefill and the summed decode rates; a flow is solved only where network cards may bind.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hexgen2.kv.codecs import NONE
from hexgen2.scheduler.fabric import Fabric, Parts
from hexgen2.scheduler.groups import DECODE, PREFILL, Groups
from hexgen2.scheduler.kv_network import KvNetwork, Replica


@dataclass(frozen=True, slots=True, order=True)
class Group:
    """One replica: its role and its GPUs."""

    role: str
    parts: Parts

    @property
    def num_gpus(self) -> int:
        """In all pools."""
        return sum(count for _, count in self.parts)


@dataclass(frozen=True, slots=True)
class State:
    """Groups in any order. ``free``: by pool number, GPUs that idle."""

    groups: tuple[Group, ...]
    free: tuple[int, ...]

    @staticmethod
    def of(fabric: Fabric, groups: Iterable[Group]) -> "State":
        """The state with these groups. ValueError when they take more GPUs of a pool than it has."""
        kept = tuple(sorted(groups, key=lambda group: (group.role, group.parts)))
        free = [pool.count for pool in fabric.pools]
        for group in kept:
            for pool, count in group.parts:
                free[pool] -= count
        if min(free) < 0:
            raise ValueError(f"pool {free.index(min(free))} is taken {-min(free)} times too often")
        return State(kept, tuple(free))


def parts_of(counts: dict[int, int]) -> Parts:
    """Positive counts in ascending order of pools."""
    return tuple(sorted((pool, count) for pool, count in counts.items() if count > 0))


class Judge:
    """Flows of states, in requests per second."""

    def __init__(self, groups: Groups, codecs: Sequence[str] = (NONE,)) -> None:
        self.groups = groups
        self.fabric = groups.fabric
        self._replicas: dict[Group, Replica | None] = {}
        self._flows: dict[tuple[Group, ...], float] = {}
        self.network = KvNetwork(groups.fabric, groups.cost, codecs)

    def rate(self, group: Group) -> float:
        """Of one group in its role; 0 when it cannot have it."""
        return self.groups.rate(group.role, group.parts)

    def sums(self, groups: Iterable[Group]) -> tuple[float, float]:
        """Summed rates of prefill and of decode; colocated replicas count in both."""
        prefill = decode = 0.0
        for group in groups:
            rate = self.rate(group)
            if group.role != DECODE:
                prefill += rate
            if group.role != PREFILL:
                decode += rate
        return prefill, decode

    def ceiling(self, state: State) -> float:
        """The flow if KV moved at once: never below `flow`."""
        return min(self.sums(state.groups))

    def replica(self, group: Group) -> Replica | None:
        """The group as a node of the network; None when it cannot have its role."""
        if group not in self._replicas:
            choice = self.groups.choice(group.role, group.parts)
            self._replicas[group] = self.network.replica(group.role, choice) if choice else None
        return self._replicas[group]

    def replicas(self, state: State) -> tuple[Replica, ...]:
        """Of all groups that can have their role, in the state's order."""
        return tuple(replica for group in state.groups if (replica := self.replica(group)) is not None)

    def flow(self, state: State) -> float:
        """What the search maximises: exact unless a replica spans machines whose network cards bind."""
        replicas = self.replicas(state)
        if not self.network.may_bind(replicas):
            return self.ceiling(state)
        # Small clusters come back to the same states very often. The order of groups must not change a bit of the
        # answer: what is remembered would depend on which searches a process has made before.
        key = tuple(sorted(state.groups))
        known = self._flows.get(key)
        if known is None:
            ordered = [replica for group in key if (replica := self.replica(group)) is not None]
            known = self._flows[key] = self.network.flow(ordered)
        return known

    def verified(self, state: State) -> float:
        """The flow with every network card's traffic added up, by a linear program: the figure that is published."""
        replicas = self.replicas(state)
        if not self.network.may_bind(replicas):
            return self.ceiling(state)
        return self.network.verify(replicas).rps

    def starved(self, state: State) -> tuple[str, frozenset[int], frozenset[int]]:
        """The role to strengthen, groups (by position) behind the minimum cut, and machines whose cards are in it."""
        prefill, decode = self.sums(state.groups)
        role = PREFILL if prefill < decode else DECODE
        replicas = self.replicas(state)
        if not self.network.may_bind(replicas):
            needy = frozenset(i for i, group in enumerate(state.groups) if group.role == role)
            return role, needy, frozenset()
        positions = [i for i, group in enumerate(state.groups) if self.replica(group) is not None]
        cut, machines = self.network.cut(replicas)
        return role, frozenset(positions[i] for i in cut), machines
