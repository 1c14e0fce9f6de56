"""Every state of a small cluster, symmetric ones once: the truth that searches are judged by.

Pools of one kind on machines that are alike are interchangeable; so are GPUs of a pool. States are taken in descending
order of their ceiling, and verified until no ceiling that is left exceeds the best verified flow.
"""

from collections.abc import Iterator
from itertools import permutations, product

from hexgen2.errors import ConfigError
from hexgen2.scheduler.columns import Limits, all_parts
from hexgen2.scheduler.fabric import Fabric, Parts
from hexgen2.scheduler.state import Group, Judge, State

#: More states than this are not looked at.
MOST_STATES = 1_000_000


def exhaustive(
    judge: Judge, limits: Limits, roles: tuple[str, ...], most_states: int = MOST_STATES
) -> tuple[State, float]:
    """The best state and its verified flow.

    Raises:
        ConfigError: the cluster has more than ``most_states`` states.
    """
    best, best_flow = State.of(judge.fabric, ()), 0.0
    ranked = sorted(
        ((judge.ceiling(state), state) for state in states(judge, limits, roles, most_states)),
        key=lambda each: (-each[0], each[1].groups),
    )
    for ceiling, state in ranked:
        if ceiling <= best_flow:
            break
        flow = judge.verified(state)
        if flow > best_flow:
            best, best_flow = state, flow
    return best, best_flow


def states(judge: Judge, limits: Limits, roles: tuple[str, ...], most_states: int) -> Iterator[State]:
    """Every set of groups that can have their roles, each once. GPUs may idle."""
    fabric = judge.fabric
    options = [
        group for parts in all_parts(fabric, limits) for role in roles if judge.rate(group := Group(role, parts)) > 0
    ]
    options.sort(key=lambda group: (group.parts, group.role))
    orders = _orders(fabric)
    seen: set[tuple[tuple[Parts, str], ...]] = set()
    # Groups in ascending order of options, so that each set appears once. Of symmetric sets all are gone on from, since
    # what may be added to one in that order differs, but only the first is answered.
    stack: list[tuple[int, tuple[Group, ...], tuple[int, ...]]] = [(0, (), tuple(pool.count for pool in fabric.pools))]
    while stack:
        first, groups, free = stack.pop()
        if groups:
            key = _canonical(groups, orders)
            if key not in seen:
                seen.add(key)
                if len(seen) > most_states:
                    raise ConfigError(
                        f"strategy exhaustive: more than {most_states:,} placements; it is for small clusters"
                    )
                yield State(tuple(sorted(groups, key=lambda group: (group.role, group.parts))), free)
        for index in range(first, len(options)):
            group = options[index]
            if all(free[pool] >= n for pool, n in group.parts):
                left = list(free)
                for pool, n in group.parts:
                    left[pool] -= n
                stack.append((index, (*groups, group), tuple(left)))


def _orders(fabric: Fabric) -> tuple[tuple[int, ...], ...]:
    """Renumberings of pools that change nothing: exchanges of machines that are alike in everything but their name."""
    if fabric.cluster.machine_links:
        return (tuple(range(len(fabric.pools))),)
    classes: dict[str, list[list[int]]] = {}
    for number, machine in enumerate(fabric.cluster.machines):
        pools = [i for i, pool in enumerate(fabric.pools) if pool.machine == number]
        classes.setdefault(str(machine.model_dump(exclude={"name"})), []).append(pools)
    orders = []
    for chosen in product(*(permutations(members) for members in classes.values())):
        order = list(range(len(fabric.pools)))
        for members, permuted in zip(classes.values(), chosen, strict=True):
            for old, new in zip(members, permuted, strict=True):
                for a, b in zip(old, new, strict=True):
                    order[a] = b
        orders.append(tuple(order))
    return tuple(orders)


def _canonical(groups: tuple[Group, ...], orders: tuple[tuple[int, ...], ...]) -> tuple[tuple[Parts, str], ...]:
    return min(
        tuple(sorted((tuple(sorted((order[pool], n) for pool, n in group.parts)), group.role) for group in groups))
        for order in orders
    )
