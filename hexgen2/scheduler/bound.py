"""An upper bound on any plan's flow: the configuration program, linear or with integers, solved by HiGHS.

A *column* is a composition of a group with the best rates that any strategy reaches on it over ideal links. How many
groups of each column to have, in each role, so that the flow is largest, is a small linear program: every plan whose
groups are among the columns is one of its integer points, so its optimum is never below the best plan. What it
leaves out (which machine a group stands on, KV links) only lowers a plan's flow.
"""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import frexp
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_matrix

from hexgen2.scheduler.fabric import Composition

#: HiGHS ends its branch and bound by a count, never by the clock; sooner where each node is slow.
NODE_LIMIT, QUICK_NODE_LIMIT = 400, 20
#: With more columns than this, integers take seconds.
MOST_COLUMNS = 400

#: Columns per site that whole groups are looked for among.
PROMISING = 20

#: Solvers' answers are right to about 1e-7 of the coefficients; a bound must not fall below the truth by that.
SLACK = 1.0 + 1e-6


@dataclass(frozen=True, slots=True)
class Column:
    """A group's composition in a site and its best rates in requests per second; zero where it cannot have the role."""

    site: str
    composition: Composition
    prefill_rps: float
    decode_rps: float
    colocated_rps: float = 0.0


@dataclass(frozen=True, slots=True)
class Bound:
    """``rps``: no plan's flow exceeds it. Per column, how many prefill, decode and colocated groups reach it."""

    rps: float
    method: str
    prefill: tuple[float, ...]
    decode: tuple[float, ...]
    colocated: tuple[float, ...]
    #: What one more GPU of a (site, kind) adds.
    gpu_worth: Mapping[tuple[str, int], float] = field(default_factory=dict)


#: GPUs of each (site, kind), and requests per second whose KV the link from one site to another carries.
Supply = Mapping[tuple[str, int], int]
SiteLinks = Mapping[tuple[str, str], float]


def lp_bound(columns: Sequence[Column], supply: Supply, site_links: SiteLinks | None = None) -> Bound:
    """The bound with fractions of groups allowed. Raises ValueError if HiGHS finds none."""
    program = Program(columns, supply, site_links or {})
    solved = program.relaxed()
    worth = [-float(each) for each in solved.ineqlin.marginals]
    return replace(
        program.bound(-float(solved.fun), solved.x, "LP"),
        gpu_worth={place: worth[i] * program.unit for i, place in enumerate(sorted(supply))},
    )


def milp_bound(
    columns: Sequence[Column], supply: Supply, site_links: SiteLinks | None = None, *, quick: bool = False
) -> Bound:
    """The bound with whole groups: tighter on small clusters. Valid also when HiGHS stops before its optimum.

    ``quick``: stop soon, and give the linear bound where integers would take long.

    A column whose reduced cost exceeds what the linear optimum has over whole groups that are known is in no better
    answer, so it is left out: the bound is the larger of those groups' flow and the program's without such columns.
    """
    program = Program(columns, supply, site_links or {})
    solved = program.relaxed()
    known = program.whole_near(solved)
    least = -float(known.fun) if known is not None else 0.0
    slack = -float(solved.fun) - least
    useless = solved.lower.marginals[: program.num_counts] > slack + 1e-6
    if quick and int((~useless).sum()) > MOST_COLUMNS:
        return lp_bound(columns, supply, site_links)
    found = program.in_whole_groups(useless, QUICK_NODE_LIMIT if quick else NODE_LIMIT, 3e-4)
    if found.mip_dual_bound is None or found.x is None:
        return lp_bound(columns, supply, site_links)
    better = known is None or found.fun < known.fun
    return program.bound(max(least, -float(found.mip_dual_bound)), found.x if better else known.x, "MILP")


def whole_groups(columns: Sequence[Column], supply: Supply, site_links: SiteLinks | None = None) -> Bound | None:
    """Whole groups that come near the linear bound: a start, no bound itself. None when there are none."""
    program = Program(columns, supply, site_links or {})
    found = program.whole_near(program.relaxed())
    return None if found is None else program.bound(-float(found.fun), found.x, "whole")


@contextmanager
def no_chatter() -> Iterator[None]:
    """HiGHS now and then writes a line of its own to standard output, past Python; it would stand in the JSON there."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


class Program:
    """maximise the requests f(a, b) from site a's prefill to site b's decode, and what colocated groups do.

    sum_b f(a, b) <= prefill of a; sum_a f(a, b) <= decode of b; f(a, b) <= link; GPUs used <= supply. Variables: x
    (prefill), y (decode), z (colocated) of those columns that can have the role, then f. Rates are divided by a
    power of two near the largest, so that a change of the time unit changes no bit of the answer.
    """

    def __init__(self, columns: Sequence[Column], supply: Supply, site_links: SiteLinks) -> None:
        self._columns = columns
        roles = (
            [column.prefill_rps for column in columns],
            [column.decode_rps for column in columns],
            [column.colocated_rps for column in columns],
        )
        self._used = [(role, i) for role, rates in enumerate(roles) for i, rate in enumerate(rates) if rate > 0]
        self.num_counts = len(self._used)
        largest = max((roles[role][i] for role, i in self._used), default=1.0)
        self.unit = 2.0 ** frexp(largest)[1]
        places = {place: row for row, place in enumerate(sorted(supply))}
        sites = {site: number for number, site in enumerate(sorted({site for site, _ in supply}))}
        pairs = [(a, b) for a in sites for b in sites]
        self.num_sites = len(sites)
        sends, receives = len(places), len(places) + len(sites)
        data, rows, cols = [], [], []

        def put(row: int, col: int, value: float) -> None:
            rows.append(row)
            cols.append(col)
            data.append(value)

        self.cost = np.zeros(self.num_counts + len(pairs))
        for variable, (role, i) in enumerate(self._used):
            rate, site = roles[role][i] / self.unit, sites[columns[i].site]
            if role == 2:
                self.cost[variable] = -rate
            else:
                put((sends, receives)[role] + site, variable, -rate)
            for kind, count in columns[i].composition:
                put(places[columns[i].site, kind], variable, count)
        self.bounds: list[tuple[float, float | None]] = [(0.0, None)] * self.num_counts
        for variable, (a, b) in enumerate(pairs, start=self.num_counts):
            self.cost[variable] = -1.0
            put(sends + sites[a], variable, 1.0)
            put(receives + sites[b], variable, 1.0)
            link = site_links.get((a, b))
            self.bounds.append((0.0, None if link is None or a == b else link / self.unit))
        #: 1 for variables that count groups.
        self.whole = np.array([1] * self.num_counts + [0] * len(pairs))
        self.rows = csr_matrix((data, (rows, cols)), shape=(receives + len(sites), self.cost.size))
        self.limits = np.array([*(float(supply[place]) for place in sorted(supply)), *[0.0] * (2 * len(sites))])

    def relaxed(self) -> Any:
        """HiGHS' answer with fractions of groups. Raises ValueError."""
        solved = linprog(self.cost, A_ub=self.rows, b_ub=self.limits, bounds=self.bounds, method="highs-ds")
        if solved.status != 0:
            raise ValueError(f"no bound: {solved.message}")
        return solved

    def in_whole_groups(self, without: Any, node_limit: int, gap: float) -> Any:
        """HiGHS' answer in whole groups of the columns that ``without`` does not mask; ``x`` is None if it has none."""
        upper = np.array([np.inf if most is None else most for _, most in self.bounds])
        upper[: self.num_counts][without] = 0.0
        with no_chatter():
            return milp(
                self.cost,
                constraints=LinearConstraint(self.rows, ub=self.limits),
                integrality=self.whole,
                bounds=Bounds(0, upper),
                options={"node_limit": node_limit, "mip_rel_gap": gap},
            )

    def whole_near(self, relaxed: Any) -> Any:
        """Whole groups out of the columns that the relaxed answer finds most promising: quick, and near it."""
        ranks = np.argsort(np.argsort(relaxed.lower.marginals[: self.num_counts], kind="stable"), kind="stable")
        found = self.in_whole_groups(ranks >= PROMISING * self.num_sites, NODE_LIMIT, 2e-3)
        return None if found.x is None else found

    def bound(self, flow: float, x: "np.ndarray[tuple[int], np.dtype[np.float64]]", method: str) -> Bound:
        """Counts by column and role out of the variables."""
        counts = [[0.0] * len(self._columns) for _ in range(3)]
        for variable, (role, i) in enumerate(self._used):
            counts[role][i] = float(x[variable])
        return Bound(flow * self.unit * SLACK, method, tuple(counts[0]), tuple(counts[1]), tuple(counts[2]))
