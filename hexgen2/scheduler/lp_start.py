"""The configuration program's answer made whole and put on machines: a start that is near the bound on large clusters.

Whole groups first, largest first onto the machine they fill best; then, while GPUs are left, the group that is worth
most for the GPUs it takes, by the program's own prices.
"""

from collections.abc import Sequence
from math import floor

from hexgen2.scheduler.bound import Bound, Column
from hexgen2.scheduler.columns import Limits
from hexgen2.scheduler.fabric import Composition, Fabric, Parts
from hexgen2.scheduler.groups import COLOCATED, DECODE, PREFILL
from hexgen2.scheduler.state import Group, Judge, State, parts_of


def lp_start(judge: Judge, limits: Limits, columns: Sequence[Column], bound: Bound) -> State:
    """A state from a bound's counts. Works with the LP's (rounded down) and the MILP's (whole already)."""
    fabric = judge.fabric
    free = [pool.count for pool in fabric.pools]
    wanted = [
        (role, column)
        for role, counts in ((PREFILL, bound.prefill), (DECODE, bound.decode), (COLOCATED, bound.colocated))
        for column, count in zip(columns, counts, strict=True)
        for _ in range(floor(count + 1e-6))
    ]
    wanted.sort(key=lambda each: (-sum(count for _, count in each[1].composition), each[1].composition, each[0]))
    groups: list[Group] = []
    for role, column in wanted:
        _put(judge, limits, free, groups, role, column)
    # Fractions that were rounded down, and what they leave.
    while True:
        prefill, decode = judge.sums(groups)
        order = [(PREFILL, prefill), (DECODE, decode)] if bound.colocated == () or any(bound.prefill) else []
        order.sort(key=lambda each: each[1])
        roles = [role for role, _ in order] or [COLOCATED]
        if not any(_fill(judge, limits, free, groups, role, columns, bound) for role in roles):
            break
    return State.of(fabric, groups)


def place(fabric: Fabric, free: Sequence[int], site: str, composition: Composition, size: int = 1) -> Parts | None:
    """GPUs for a composition: per kind the machine that it fills best, else the emptiest ones, ``size`` at a time."""
    counts: dict[int, int] = {}
    used: set[int] = set()
    for kind, count in composition:
        pools = [
            i
            for i, pool in enumerate(fabric.pools)
            if pool.kind == kind and free[i] and site in ("", fabric.site[pool.machine])
        ]
        whole = [i for i in pools if free[i] >= count]
        if whole:
            chosen = min(whole, key=lambda i: (fabric.pools[i].machine not in used, free[i], i))
            counts[chosen] = count
            used.add(fabric.pools[chosen].machine)
            continue
        for step in (size, 1):
            missing = count - sum(n for i, n in counts.items() if fabric.pools[i].kind == kind)
            for i in sorted(pools, key=lambda i: (-free[i], i)):
                take = min(free[i] - counts.get(i, 0), missing) // step * step
                if take > 0:
                    counts[i] = counts.get(i, 0) + take
                    used.add(fabric.pools[i].machine)
                    missing -= take
            if missing == 0:
                break
        else:
            return None
    return parts_of(counts)


def _put(judge: Judge, limits: Limits, free: list[int], groups: list[Group], role: str, column: Column) -> bool:
    candidates = judge.groups.strategies.of(column.composition)
    ranked = {PREFILL: candidates.prefill, DECODE: candidates.decode, COLOCATED: candidates.colocated}[role]
    size = max((shape[1] for shape in ranked[0].shapes), default=1) if ranked else 1
    parts = place(judge.fabric, free, column.site, column.composition, size)
    if parts is None or not limits.allow(judge.fabric, parts):
        return False
    group = Group(role, parts)
    if judge.rate(group) <= 0:
        return False
    groups.append(group)
    for pool, count in parts:
        free[pool] -= count
    return True


def _fill(
    judge: Judge,
    limits: Limits,
    free: list[int],
    groups: list[Group],
    role: str,
    columns: Sequence[Column],
    bound: Bound,
) -> bool:
    left: dict[tuple[str, int], int] = {}
    for pool, count in zip(judge.fabric.pools, free, strict=True):
        site = judge.fabric.site[pool.machine] if limits.one_site else ""
        left[site, pool.kind] = left.get((site, pool.kind), 0) + count
    fitting = [
        column
        for column in columns
        if _rate(column, role) > 0 and all(left[column.site, kind] >= count for kind, count in column.composition)
    ]

    def worth(column: Column) -> tuple[float, float, Composition]:
        cost = sum(
            count * (bound.gpu_worth.get((column.site, kind), 0.0) or 1e-9) for kind, count in column.composition
        )
        return _rate(column, role) / cost, -cost, column.composition

    for column in sorted(fitting, key=worth, reverse=True)[:8]:
        if _put(judge, limits, free, groups, role, column):
            return True
    return False


def _rate(column: Column, role: str) -> float:
    return {PREFILL: column.prefill_rps, DECODE: column.decode_rps, COLOCATED: column.colocated_rps}[role]
