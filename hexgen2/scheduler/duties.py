"""A start for large clusters with slow network cards: what each machine does by itself, chosen for all together.

A *duty* is a set of groups that stand on one machine. What its prefill makes beyond what its decode reads leaves by the
machine's card, so a duty's rates are what the card allows. How many machines that are alike have which duty is a small
integer program, because there are few duties that no other one beats.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import frexp

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from hexgen2.scheduler.bound import no_chatter
from hexgen2.scheduler.columns import Limits, all_parts
from hexgen2.scheduler.fabric import Fabric
from hexgen2.scheduler.groups import PREFILL
from hexgen2.scheduler.problem import SPLIT
from hexgen2.scheduler.state import Group, Judge, State

#: HiGHS ends by a count of nodes, or this near to its own bound: it is a start only.
NODE_LIMIT, GAP = 50, 1e-3


@dataclass(frozen=True, slots=True)
class Duty:
    """Groups of one machine and the requests per second that they make KV for, and read."""

    groups: tuple[Group, ...]
    prefill_rps: float
    decode_rps: float

    def within(self, card_rps: float) -> "Duty":
        """Its rates behind a network card."""
        prefill = min(self.prefill_rps, self.decode_rps + card_rps)
        return Duty(self.groups, prefill, min(self.decode_rps, self.prefill_rps + card_rps))


def duties_start(judge: Judge, limits: Limits, site_links: Mapping[tuple[str, str], float]) -> State | None:
    """The best plan whose groups all stand on one machine each; None when there is none.

    ``site_links``: requests per second whose KV goes from one site to another.
    """
    fabric = judge.fabric
    alike: dict[str, list[int]] = defaultdict(list)
    for number, machine in enumerate(fabric.cluster.machines):
        alike[str(machine.model_dump(exclude={"name"}))].append(number)
    offers = [
        (members, duty.within(judge.network.kv_rps(fabric.nic[members[0]])))
        for members in alike.values()
        for duty in duties(judge, limits, members[0])
    ]
    sites = {site: number for number, site in enumerate(fabric.sites)}
    pairs = list(product(sites, sites))
    if not offers:
        return None
    # A power of two, so that a change of the time unit changes no bit of the answer.
    unit = 2.0 ** frexp(max(max(duty.prefill_rps, duty.decode_rps) for _, duty in offers))[1]
    rows, cols, data = [], [], []
    kinds = {members[0]: row for row, members in enumerate(alike.values())}
    upper = [float(len(members)) for members, _ in offers]
    for column, (members, duty) in enumerate(offers):
        site = sites[fabric.site[members[0]]]
        at = (kinds[members[0]], len(kinds) + site, len(kinds) + len(sites) + site)
        for row, value in zip(at, (1.0, -duty.prefill_rps / unit, -duty.decode_rps / unit), strict=True):
            rows.append(row)
            cols.append(column)
            data.append(value)
    for column, (a, b) in enumerate(pairs, start=len(offers)):
        upper.append(np.inf if a == b else site_links.get((a, b), np.inf) / unit)
        rows += [len(kinds) + sites[a], len(kinds) + len(sites) + sites[b]]
        cols += [column, column]
        data += [1.0, 1.0]
    limit = np.array([*(float(len(members)) for members in alike.values()), *[0.0] * (2 * len(sites))])
    cost = np.array([*[0.0] * len(offers), *[-1.0] * len(pairs)])
    with no_chatter():
        found = milp(
            cost,
            constraints=LinearConstraint(csr_matrix((data, (rows, cols)), shape=(len(limit), len(cost))), ub=limit),
            integrality=np.array([*[1] * len(offers), *[0] * len(pairs)]),
            bounds=Bounds(0, upper),
            options={"node_limit": NODE_LIMIT, "mip_rel_gap": GAP},
        )
    if found.x is None:
        return None
    groups: list[Group] = []
    taken: dict[int, int] = defaultdict(int)
    for (members, duty), count in zip(offers, found.x, strict=False):
        for _ in range(round(float(count))):
            groups += _on(fabric, duty.groups, members[0], members[taken[members[0]]])
            taken[members[0]] += 1
    return State.of(fabric, groups)


def duties(judge: Judge, limits: Limits, machine: int) -> list[Duty]:
    """Of a machine: every set of groups that no other set beats in both roles."""
    fabric = judge.fabric
    pools = [i for i, pool in enumerate(fabric.pools) if pool.machine == machine]
    options = [
        (group, judge.rate(group))
        for parts in all_parts(fabric, limits, pools)
        for role in SPLIT
        if judge.rate(group := Group(role, parts)) > 0
    ]
    # By how many GPUs of each pool are used: the sets that are worth keeping.
    counts = [fabric.pools[pool].count for pool in pools]
    best: dict[tuple[int, ...], list[Duty]] = {(0,) * len(pools): [Duty((), 0.0, 0.0)]}
    for group, rate in sorted(options, key=lambda each: each[0]):
        takes = [dict(group.parts).get(pool, 0) for pool in pools]
        # In ascending order, so that a group can be taken more than once.
        for used in product(*(range(count + 1) for count in counts)):
            then = tuple(a + b for a, b in zip(used, takes, strict=True))
            if used not in best or any(n > most for n, most in zip(then, counts, strict=True)):
                continue
            for duty in best[used]:
                prefill = duty.prefill_rps + rate * (group.role == PREFILL)
                decode = duty.decode_rps + rate * (group.role != PREFILL)
                best[then] = _unbeaten([*best.get(then, ()), Duty((*duty.groups, group), prefill, decode)])
    return _unbeaten([duty for row in best.values() for duty in row])


def _unbeaten(found: Sequence[Duty]) -> list[Duty]:
    kept: list[Duty] = []
    for duty in sorted(found, key=lambda each: (-each.prefill_rps, -each.decode_rps, each.groups)):
        if not kept or duty.decode_rps > kept[-1].decode_rps:
            kept.append(duty)
    return kept


def _on(fabric: Fabric, groups: Sequence[Group], machine: int, other: int) -> list[Group]:
    """The groups of a machine on another one that is alike."""
    pools = ([i for i, pool in enumerate(fabric.pools) if pool.machine == each] for each in (machine, other))
    move = dict(zip(*pools, strict=True))
    return [Group(group.role, tuple((move[pool], count) for pool, count in group.parts)) for group in groups]
