"""What to rent: machines out of a priced cluster, for the most throughput within a budget or a target at least cost.

The configuration program with one more choice, how many machines of each offer to take. Its answer is then planned
like any cluster; where the plan falls short of a target, the program is asked again for as much more.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix, hstack, vstack

from hexgen2.cluster import Cluster, Machine
from hexgen2.errors import ConfigError
from hexgen2.placement import Placement
from hexgen2.scheduler.bound import NODE_LIMIT, Program, no_chatter
from hexgen2.scheduler.problem import MILP_GPUS, MIXED, Problem
from hexgen2.scheduler.schedule import KINDS, solve

#: A rate is held when the throughput is so much more: queues grow without bound at utilisation 1.
UTILISATION = 0.75
#: Times that the program is asked again for more.
TRIES = 6
#: HiGHS keeps to limits within this.
TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class Offer:
    """Machines that are alike in everything but their name, and the price of one in $/h."""

    machines: tuple[Machine, ...]
    price_per_hour: float


def within_budget(problem: Problem, price_per_hour: float, *, kind: str = "auto", **search: object) -> Placement:
    """The plan of the machines that do most for at most so many $/h. Raises ConfigError when they do nothing."""
    chosen = _choose(problem, KINDS[kind] or MIXED, budget=price_per_hour)
    if chosen is None:
        raise ConfigError(
            f"--budget {price_per_hour:g}: no machines of cluster {problem.cluster.name} for so little can serve model "
            f"{problem.llm.name}"
        )
    return solve(replace(problem, cluster=chosen), kind=kind, **search)  # type: ignore[arg-type]


def cheapest(problem: Problem, rate: float, *, kind: str = "auto", **search: object) -> Placement:
    """The plan of the cheapest machines found that hold ``rate`` requests/s, and the workload's limits if it has any.

    Raises:
        ConfigError: the whole cluster does not hold it, or no plan did after `TRIES` choices of machines.
    """
    wanted = rate / UTILISATION
    asked = wanted
    loaded = replace(problem, workload=problem.workload.model_copy(update={"rate": rate}))
    for _ in range(TRIES):
        chosen = _choose(loaded, KINDS[kind] or MIXED, target=asked)
        if chosen is None:
            most = loaded.bound(KINDS[kind] or MIXED).rps
            raise ConfigError(
                f"{rate:g} requests/s need a throughput of {asked:.3g}/s; all of cluster {problem.cluster.name} has at "
                f"most {most:.3g}/s with model {problem.llm.name}"
            )
        found = solve(replace(loaded, cluster=chosen), kind=kind, **search)  # type: ignore[arg-type]
        slow = loaded.workload.ttft_s is not None and (found.ttft_s is None or found.ttft_s > loaded.workload.ttft_s)
        if found.throughput_rps >= wanted * (1 - TOLERANCE) and not slow:
            return found
        asked *= 1.1 if slow else max(1.01, wanted / max(found.throughput_rps, wanted / 2))
    raise ConfigError(f"{rate:g} requests/s: no choice of machines was found whose plan holds it; try more evaluations")


def offers(cluster: Cluster) -> tuple[Offer, ...]:
    """What a cluster offers. Raises ConfigError naming a machine without a price."""
    found: dict[str, list[Machine]] = {}
    for machine in cluster.machines:
        if cluster.machine_price_per_hour(machine) is None:
            raise ConfigError(f"cluster {cluster.name}: machine {machine.name} has no price: give its price_per_hour")
        found.setdefault(str(machine.model_dump(exclude={"name"})), []).append(machine)
    return tuple(
        Offer(tuple(machines), cluster.machine_price_per_hour(machines[0]) or 0.0) for machines in found.values()
    )


def _choose(
    problem: Problem, roles: tuple[str, ...], *, budget: float | None = None, target: float | None = None
) -> Cluster | None:
    """The machines to take, by the program; None when there are none."""
    offered = offers(problem.cluster)
    program = Program(problem.columns(roles), problem.supply, problem.site_links)
    num = program.cost.size
    places = {place: row for row, place in enumerate(sorted(problem.supply))}
    # Rows of supply: what groups use less what the machines taken bring, at most nothing.
    brings = np.zeros((program.rows.shape[0], len(offered)))
    for column, offer in enumerate(offered):
        for kind, count in _kinds(problem, offer.machines[0]).items():
            site = offer.machines[0].site if problem.limits.one_site else ""
            brings[places[site, kind], column] -= count
    limits = program.limits.copy()
    limits[: len(places)] = 0.0
    rows = hstack([program.rows, csr_matrix(brings)], format="csr")
    prices = np.array([offer.price_per_hour for offer in offered])
    flow = np.concatenate([program.cost, np.zeros(len(offered))])
    money = np.concatenate([np.zeros(num), prices])
    if budget is not None:
        rows, limits = vstack([rows, csr_matrix(money)], format="csr"), np.append(limits, budget)
        # Of equal flows the cheaper.
        cost = flow + money * 1e-7 / max(prices.max(), 1e-9)
    else:
        rows = vstack([rows, csr_matrix(flow)], format="csr")
        limits = np.append(limits, -(target or 0.0) / program.unit)
        cost = money
    whole = np.zeros(num + len(offered))
    whole[num:] = 1
    if problem.fabric.num_gpus <= MILP_GPUS:
        whole[: program.num_counts] = 1
    upper = [np.inf if most is None else most for _, most in program.bounds] + [len(o.machines) for o in offered]
    with no_chatter():
        solved = milp(
            cost,
            constraints=LinearConstraint(rows, ub=limits),
            integrality=whole,
            bounds=Bounds(0, np.array(upper)),
            options={"node_limit": NODE_LIMIT, "mip_rel_gap": 1e-4},
        )
    if solved.x is None:
        return None
    taken = {
        machine.name
        for offer, count in zip(offered, solved.x[num:], strict=True)
        for machine in offer.machines[: round(float(count))]
    }
    if not taken:
        return None
    return only(problem.cluster, taken)


def _kinds(problem: Problem, machine: Machine) -> Mapping[int, int]:
    numbers = {each.name: number for number, each in enumerate(problem.fabric.cluster.machines)}
    return {pool.kind: pool.count for pool in problem.fabric.pools if pool.machine == numbers[machine.name]}


def only(cluster: Cluster, names: set[str]) -> Cluster:
    """The cluster with these machines alone."""
    machines = tuple(machine for machine in cluster.machines if machine.name in names)
    types = {gpu for machine in machines for gpu, _ in machine.gpus}
    sites = {machine.site for machine in machines}
    return cluster.model_copy(
        update={
            "machines": machines,
            "gpu_types": tuple(gpu for gpu in cluster.gpu_types if gpu.name in types),
            "site_links": tuple(link for link in cluster.site_links if sites.issuperset(link.between)),
            "machine_links": tuple(link for link in cluster.machine_links if names.issuperset(link.between)),
        }
    )
