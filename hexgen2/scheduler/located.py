"""The configuration program on machines: on small clusters a bound that knows network cards, and a plan that meets it.

In `bound` a column is a composition; here it is a group on the machines that it stands on, with the strategy and the
rate it has over their real links, so that the layers on each machine are known. The matching of layers between
replicas is left out at first, and counted where plans turn out to carry less for it; hidden states on their way through
pipelines are left out.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import islice, pairwise
from math import frexp
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_matrix

from hexgen2.scheduler.bound import SLACK, no_chatter
from hexgen2.scheduler.columns import Limits, all_parts
from hexgen2.scheduler.fabric import Composition, Fabric
from hexgen2.scheduler.groups import COLOCATED, DECODE, PREFILL
from hexgen2.scheduler.state import Group, Judge, State

#: With more places for a group than this the program takes too long; so many are looked through for a few of them.
MOST_PARTS, MOST_LOOKED_AT = 2500, 10_000
#: HiGHS ends its branch and bound by a count of nodes, never by the clock, or this near to its own bound.
FEW_NODES, GAP = 50, 5e-4
#: Of a larger program (rows times columns) fewer nodes are looked at: each takes longer.
USUAL_SIZE = 250_000
#: First this share of the nodes is spent on a good plan, which rules out many columns for the others.
FIRST = 1 / 6
#: A program that is solved again counts as so many nodes at least.
LEAST_NODES = 50
#: With more columns than this that a better plan could have, HiGHS takes minutes for its first node.
MOST_COLUMNS = 3500
#: With more columns than this layers are not matched: it takes too long.
MOST_MATCHED = 1000
#: This near to the bound, a plan needs no more proof.
CLOSE = 1e-3
#: The known plan's flow is asked for less this share, so that rounding does not rule it out.
TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Column:
    """A group with its rate, the share of the model's layers on each machine, and which they are: (machine, first,
    end), in shares of the model.
    """

    group: Group
    rps: float
    shares: tuple[tuple[int, float], ...]
    spans: tuple[tuple[int, float, float], ...]


def located_bound(
    judge: Judge, limits: Limits, roles: Sequence[str], ceiling_rps: float, known_rps: float, nodes: int
) -> tuple[float, State | None]:
    """A bound on plans with these roles, at most ``ceiling_rps``, and a plan better than the known one, if found.

    ``ceiling_rps``: another bound. ``known_rps``: the flow of a known plan; columns that are in no better one are left
    out, so the closer it is to the ceiling, the quicker the answer. ``nodes``: the most that HiGHS may look at.

    maximise F + sum over colocated of rate x, with x whole numbers of groups, sum of GPUs x <= GPUs of each pool, and
    per machine m: P_m <= sum rate share_m x over prefill, D_m likewise over decode, F = sum P_m = sum D_m,
    P_m - D_m <= card out of m, D_m - P_m <= card into m, in requests per second whose KV the card carries.

    No plan exceeds it: let P_m (D_m) be the flow through prefill (decode) groups times the share of their layers on m.
    It keeps the first rows since no group's flow exceeds its rate, and sums to F since the shares of a group sum to
    one. Each layer's KV is made on one machine and read on one. On m it is made at P_m and read at D_m, so P_m - D_m
    at least leaves m, and D_m - P_m at least enters, and all of that passes m's card.

    A plan that carries less than the program says, for its layers do not match, is refuted: its true flow is known, and
    the program is asked for another one, as long as there are nodes left, with the rows above for each part of the
    layers that no group splits.
    """
    places = list(islice(all_parts(judge.fabric, limits), MOST_PARTS + 1))
    if len(places) > MOST_PARTS:
        return ceiling_rps, None
    columns = _columns(judge, (Group(role, parts) for parts in places for role in roles))
    program = _Program(judge, columns)
    relaxed = program.relaxed()
    reduced = relaxed.lower.marginals[: len(columns)] * program.unit
    best, refuted, matched = None, list[State](), False
    node_limit = max(1, int(nodes * FIRST))
    left = nodes + node_limit
    while left > 0:
        slack = -float(relaxed.fun) * program.unit - known_rps
        kept = [column for column, loss in zip(columns, reduced, strict=True) if loss <= slack + 1e-6 * known_rps]
        if len(kept) > MOST_COLUMNS:
            break
        smaller = _Program(judge, kept, refuted, matched=matched and len(kept) <= MOST_MATCHED)
        scale = max(1.0, smaller.size / USUAL_SIZE)
        found = smaller.whole(known_rps * (1 - TOLERANCE), ceiling_rps, max(1, int(node_limit / scale)))
        state = _state(judge, kept, found)
        if found.mip_dual_bound is not None:
            # Columns that were left out are in no plan better than the known one, nor is what was refuted.
            above = max(known_rps, -float(found.mip_dual_bound) * smaller.unit * SLACK)
            ceiling_rps = min(ceiling_rps, above)
        if state is None:
            break
        rps = judge.verified(state)
        less = rps < -float(found.fun) * smaller.unit * (1 - CLOSE)
        told_apart = _is_told_apart(state)
        if rps > known_rps:
            best, known_rps = state, rps
        elif not less or (matched and not told_apart):
            break
        if known_rps >= ceiling_rps * (1 - CLOSE):
            break
        if less and told_apart:
            refuted.append(state)
        matched = matched or less
        left -= max(LEAST_NODES, int(scale * (found.mip_node_count or 0)))
        node_limit = min(nodes, left)
    return ceiling_rps, best


def located_start(judge: Judge, limits: Limits, wanted: AbstractSet[tuple[str, Composition]]) -> State | None:
    """The best plan out of groups with these (role, composition), wherever they stand; None when there is none.

    Quick where the bound's own compositions are wanted: it puts them where network cards allow the most.
    """
    fabric = judge.fabric
    places = islice(all_parts(fabric, limits), MOST_LOOKED_AT)
    columns = _columns(
        judge,
        (
            Group(role, parts)
            for parts in places
            for role, composition in wanted
            if composition == fabric.composition(parts)
        ),
    )
    if not columns or len(columns) > MOST_PARTS:
        return None
    return _state(judge, columns, _Program(judge, columns).whole(0.0, np.inf))


def _columns(judge: Judge, groups: Iterable[Group]) -> list[Column]:
    num_layers = judge.groups.cost.llm.num_layers
    found = []
    for group in groups:
        replica = judge.replica(group)
        if replica is None or replica.rps <= 0:
            continue
        shares: dict[int, float] = defaultdict(float)
        for machine, first, end in replica.spans:
            shares[machine] += (end - first) / num_layers
        spans = tuple((machine, first / num_layers, end / num_layers) for machine, first, end in replica.spans)
        found.append(Column(group, replica.rps, tuple(sorted(shares.items())), spans))
    return found


def _prefill_gpus(columns: Sequence[Column], pool: int, less: int) -> dict[int, float]:
    """GPUs of a pool in prefill groups, less those of another pool, by column."""
    counts = [dict(column.group.parts) if column.group.role == PREFILL else {} for column in columns]
    rows = ((number, float(each.get(pool, 0) - each.get(less, 0))) for number, each in enumerate(counts))
    return {number: value for number, value in rows if value}


def alike(fabric: Fabric) -> list[tuple[int, int]]:
    """First pools of machines, each with that of the next machine that is like it in everything but its name."""
    if fabric.cluster.machine_links:
        return []
    last: dict[str, int] = {}
    pairs = []
    for pool, there in enumerate(fabric.pools):
        if pool and fabric.pools[pool - 1].machine == there.machine:
            continue
        nature = str(fabric.cluster.machines[there.machine].model_dump(exclude={"name"}))
        if nature in last:
            pairs.append((last[nature], pool))
        last[nature] = pool
    return pairs


def _state(judge: Judge, columns: Sequence[Column], found: Any) -> State | None:
    if found.x is None:
        return None
    counts = found.x[: len(columns)]
    return State.of(
        judge.fabric,
        [column.group for column, count in zip(columns, counts, strict=True) for _ in range(round(float(count)))],
    )


def _is_told_apart(state: State) -> bool:
    """Whether no other plan has the same groups: each of them is there once, and there is no room for one more."""
    once = len(set(state.groups)) == len(state.groups)
    return once and all(any(state.free[pool] < count for pool, count in group.parts) for group in state.groups)


class _Program:
    """Variables: how many groups of each column, then of each (role, composition), then whether there are any of a
    refuted plan's, then P_m, D_m, F and the objective, then (``matched``) the flow through each column and what leaves
    and enters each machine of each part of the layers.

    The second are sums of the first: HiGHS branches on them, which says more than one place of a group does. Rates are
    divided by a power of two near the largest, so that a change of the time unit changes no bit of the answer.
    ``refuted``: plans that are no answers.
    """

    def __init__(
        self, judge: Judge, columns: Sequence[Column], refuted: Sequence[State] = (), *, matched: bool = False
    ) -> None:
        fabric = judge.fabric
        largest = max((column.rps for column in columns), default=1.0)
        self.unit = 2.0 ** frexp(largest)[1]
        kinds: dict[tuple[str, object], list[int]] = defaultdict(list)
        for number, column in enumerate(columns):
            kinds[column.group.role, fabric.composition(column.group.parts)].append(number)
        machines = range(len(fabric.nic))
        of_refuted = {group for state in refuted for group in state.groups}
        marked = [number for number, column in enumerate(columns) if column.group in of_refuted]
        #: Whole numbers, and those of them that are 0 or 1.
        self._num_counts = len(columns) + len(kinds) + len(marked)
        self._marks = {number: mark for mark, number in enumerate(marked, len(columns) + len(kinds))}
        prefill, decode = self._num_counts, self._num_counts + len(machines)
        split = decode + len(machines)
        self._objective, self._size = split + 1, split + 2
        self._rows: list[dict[int, float]] = []
        self._least: list[float] = []
        self._most: list[float] = []
        used: list[dict[int, float]] = [{} for _ in fabric.pools]
        made: list[dict[int, float]] = [{prefill + m: 1.0} for m in machines]
        read: list[dict[int, float]] = [{decode + m: 1.0} for m in machines]
        objective = {split + 1: 1.0, split: -1.0}
        for number, column in enumerate(columns):
            rate = column.rps / self.unit
            for pool, count in column.group.parts:
                used[pool][number] = float(count)
            if column.group.role == COLOCATED:
                objective[number] = -rate
                continue
            for machine, share in column.shares:
                (made if column.group.role == PREFILL else read)[machine][number] = -rate * share
        for there, row in zip(fabric.pools, used, strict=True):
            self._add(row, most=float(there.count))
        for row in (*made, *read, objective):
            self._add(row, most=0.0)
        for first in (prefill, decode):
            self._add({split: 1.0, **{first + m: -1.0 for m in machines}}, least=0.0, most=0.0)
        for m in machines:
            card = self._card(judge, m)
            self._add({prefill + m: 1.0, decode + m: -1.0}, least=-card, most=card)
        if matched:
            self._match(judge, columns, {PREFILL: prefill, DECODE: decode})
        # Machines that are alike may change places, so those with more GPUs of a pool in prefill come first.
        for one, other in alike(fabric):
            self._add(_prefill_gpus(columns, other, one), most=0.0)
        for number, members in enumerate(kinds.values(), start=len(columns)):
            self._add({number: 1.0, **dict.fromkeys(members, -1.0)}, least=0.0, most=0.0)
        for number, mark in self._marks.items():
            # As many as there may be at most: of one GPU each.
            self._add({number: 1.0, mark: -float(fabric.num_gpus)}, most=0.0)
        for state in refuted:
            # Not all of its groups, or another one beside them.
            its, size = set(state.groups), float(len(state.groups))
            row = {n: -size for n, each in enumerate(columns) if each.group not in its}
            row |= {self._marks[n]: 1.0 for n, each in enumerate(columns) if each.group in its}
            self._add(row, most=size - 1)
        self._cost = np.zeros(self._size)
        self._cost[self._objective] = -1.0

    def _card(self, judge: Judge, machine: int) -> float:
        return judge.network.kv_rps(judge.fabric.nic[machine]) / self.unit

    def _match(self, judge: Judge, columns: Sequence[Column], flows: Mapping[str, int]) -> None:
        """Rows for each part of the layers that no group splits between machines: what is made there of it and not read
        there leaves, what is read and not made enters. ``flows``: where P_m and D_m begin.
        """
        apart = [(n, each) for n, each in enumerate(columns) if each.group.role in flows]
        flow_of = {n: self._size + k for k, (n, _) in enumerate(apart)}
        self._size += len(apart)
        ends = sorted({at for _, each in apart for _, first, end in each.spans for at in (first, end)})
        parts = list(pairwise(ends))
        for n, each in apart:
            self._add({flow_of[n]: 1.0, n: -each.rps / self.unit}, most=0.0)
        for m in range(len(judge.fabric.nic)):
            for role, first in flows.items():
                there = [(n, dict(each.shares).get(m, 0.0)) for n, each in apart if each.group.role == role]
                row = {first + m: -1.0} | {flow_of[n]: share for n, share in there if share}
                self._add(row, least=0.0, most=0.0)
            leaves, enters = self._size, self._size + len(parts)
            self._size += 2 * len(parts)
            for k, (begin, end) in enumerate(parts):
                made_less_read = {
                    flow_of[n]: 1.0 if each.group.role == PREFILL else -1.0
                    for n, each in apart
                    if any(m == on and start <= begin and end <= stop for on, start, stop in each.spans)
                }
                self._add(made_less_read | {leaves + k: -1.0}, most=0.0)
                self._add({n: -value for n, value in made_less_read.items()} | {enters + k: -1.0}, most=0.0)
            for first in (leaves, enters):
                self._add({first + k: end - begin for k, (begin, end) in enumerate(parts)}, most=self._card(judge, m))

    @property
    def size(self) -> int:
        """Rows times columns."""
        return len(self._rows) * self._size

    def relaxed(self) -> Any:
        """HiGHS' answer with fractions of groups. Raises ValueError."""
        matrix, least, most = self._matrix()
        equal = least == most
        above, below = np.isfinite(most) & ~equal, np.isfinite(least) & ~equal
        solved = linprog(
            self._cost,
            A_ub=csr_matrix(np.vstack([matrix[above].toarray(), -matrix[below].toarray()])),
            b_ub=np.concatenate([most[above], -least[below]]),
            A_eq=matrix[equal],
            b_eq=most[equal],
            method="highs-ds",
        )
        if solved.status != 0:
            raise ValueError(f"no bound: {solved.message}")
        return solved

    def whole(self, least_rps: float, most_rps: float, node_limit: int = FEW_NODES) -> Any:
        """HiGHS' answer in whole groups with a flow between these; ``x`` is None if it has none."""
        matrix, least, most = self._matrix()
        low, high = np.zeros(self._size), np.full(self._size, np.inf)
        low[self._objective], high[self._objective] = least_rps / self.unit, most_rps / self.unit
        high[list(self._marks.values())] = 1.0
        whole = np.zeros(self._size)
        whole[: self._num_counts] = 1
        with no_chatter():
            return milp(
                self._cost,
                constraints=LinearConstraint(matrix, least, most),
                integrality=whole,
                bounds=Bounds(low, high),
                options={"node_limit": node_limit, "mip_rel_gap": GAP},
            )

    def _add(self, row: dict[int, float], *, most: float, least: float = -np.inf) -> None:
        self._rows.append(row)
        self._least.append(least)
        self._most.append(most)

    def _matrix(self) -> tuple[Any, Any, Any]:
        at = [(number, column) for number, row in enumerate(self._rows) for column in row]
        values = [value for row in self._rows for value in row.values()]
        matrix = csr_matrix((values, tuple(zip(*at, strict=True))), shape=(len(self._rows), self._size))
        return matrix, np.array(self._least), np.array(self._most)
