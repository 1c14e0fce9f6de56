"""From a state to a placement: names instead of numbers, routes, links, times, money and what binds."""

from collections.abc import Sequence, Set
from typing import Literal

from hexgen2.placement import (
    IdlePlan,
    LinkPlan,
    Placement,
    ReplicaPlan,
    RoutePlan,
    RunnerUp,
    StagePlan,
)
from hexgen2.scheduler.fabric import Fabric
from hexgen2.scheduler.groups import COLOCATED, DECODE, PREFILL, Choice
from hexgen2.scheduler.kv_network import KvNetwork, Replica, Routed, Wire
from hexgen2.scheduler.multi_start import Found
from hexgen2.scheduler.problem import MIXED, WHOLE, Problem
from hexgen2.scheduler.state import Group, State

#: Without a rate of the workload, times are told at this share of the throughput.
USUAL_LOAD = 0.75
#: Shares of capacity above which a replica or link is called full.
FULL = 0.999
#: A kind of plan that carries less than one part in so many is not compared by percentages.
HARDLY = 1000


def placement(problem: Problem, found: Found, strategy: str, seed: int, roles: tuple[str, ...] | None) -> Placement:
    """The plan of a search's answer."""
    judge = problem.paper_judge if found.literal else problem.judge
    groups = [group for group in _sorted(found.state) if judge.rate(group) > 0]
    state = State.of(problem.fabric, groups)
    replicas = [judge.replica(group) for group in groups]
    network = judge.network
    routed = network.route([replica for replica in replicas if replica is not None])
    names = _names([group.role for group in groups])
    choices = [judge.groups.choice(group.role, group.parts) for group in groups]
    flows = [0.0] * len(groups)
    for i, j, flow in routed.routes:
        for end in {i, j}:
            flows[end] += flow
    planned = tuple(
        _replica(problem, name, group.role, choice, flow)
        for name, group, choice, flow in zip(names, groups, choices, flows, strict=True)
        if choice is not None
    )
    routes = route_plans(network, names, replicas, routed)
    kind = kind_of({group.role for group in state.groups})
    bound, method = _bound(problem, found, state, roles)
    rps = routed.rps
    load = problem.workload.rate or USUAL_LOAD * rps
    price = problem.cluster.price_per_hour
    tokens_per_s = rps * problem.workload.mean_output_tokens
    return Placement(
        cluster=problem.cluster.name,
        model=problem.llm.name,
        workload=problem.workload.name,
        kind=kind,
        why=_why(problem, found, kind, rps),
        throughput_rps=rps,
        bottleneck=_bottleneck(problem, planned, routed),
        bound_rps=bound,
        bound_method=method,
        gap=max(0.0, 1.0 - rps / bound) if bound else None,
        ttft_s=mean_ttft_s(planned, rps, load),
        tpot_s=mean_tpot_s(planned),
        load_rps=load,
        output_tokens_per_s=tokens_per_s,
        price_per_hour=price,
        price_per_million_output_tokens=price / 3600 / tokens_per_s * 1e6 if price is not None and rps > 0 else None,
        strategy=strategy,
        seed=seed,
        evaluations=found.evaluations,
        replicas=planned,
        routes=routes,
        links=link_plans(problem.fabric, routed),
        idle=tuple(
            IdlePlan(
                machine=problem.fabric.cluster.machines[pool.machine].name,
                gpu=problem.fabric.kinds[pool.kind].gpu,
                count=count,
            )
            for pool, count in zip(problem.fabric.pools, state.free, strict=True)
            if count
        ),
        rdma=_rdma(problem, planned),
        runners_up=tuple(_runner_up(problem, name, state, flow) for name, state, flow in found.others[:3]),
    )


def _rdma(problem: Problem, planned: tuple[ReplicaPlan, ...]) -> tuple[str, ...]:
    """Machines of the plan whose network cards are RDMA."""
    used = {stage.machine for replica in planned for stage in replica.stages}
    return tuple(each.name for each in problem.fabric.cluster.machines if each.nic_rdma and each.name in used)


def _sorted(state: State) -> list[Group]:
    order = {PREFILL: 0, DECODE: 1, COLOCATED: 2}
    return sorted(state.groups, key=lambda group: (order[group.role], group.parts))


def _names(roles: list[str]) -> list[str]:
    counts: dict[str, int] = {}
    names = []
    for role in roles:
        names.append(f"{role}-{counts.get(role, 0)}")
        counts[role] = counts.get(role, 0) + 1
    return names


def _replica(problem: Problem, name: str, role: str, choice: Choice, flow: float) -> ReplicaPlan:
    fabric = problem.fabric
    return ReplicaPlan(
        id=name,
        role=role,
        stages=tuple(
            StagePlan(
                machine=fabric.cluster.machines[fabric.pools[stage.pool].machine].name,
                gpu=fabric.kinds[fabric.pools[stage.pool].kind].gpu,
                tensor_parallel_size=stage.tensor_parallel_size,
                first_layer=stage.first_layer,
                num_layers=stage.num_layers,
            )
            for stage in choice.stages
        ),
        capacity_rps=choice.rps,
        flow_rps=flow,
        utilisation=min(1.0, flow / choice.rps),
        prefill_s=choice.latency_s if role != DECODE else None,
        tpot_s=choice.tpot_s if role != PREFILL else None,
        batch=choice.batch if role != PREFILL else None,
    )


def route_plans(
    network: KvNetwork, names: Sequence[str], replicas: Sequence[Replica | None], routed: Routed
) -> tuple[RoutePlan, ...]:
    """Of the flow between replicas; what stays within one has no route."""
    return tuple(
        RoutePlan(
            prefill=names[i],
            decode=names[j],
            flow_rps=flow,
            transfer_s=network.transfer_s(sender, receiver, codec),
            codec=codec,
        )
        for (i, j, flow), codec in zip(routed.routes, routed.codecs, strict=True)
        if i != j and (sender := replicas[i]) is not None and (receiver := replicas[j]) is not None
    )


def link_plans(fabric: Fabric, routed: Routed) -> tuple[LinkPlan, ...]:
    """What each link carries."""
    return tuple(
        LinkPlan(name=wire_name(fabric, wire), bytes_per_s=used, bandwidth_bytes_per_s=limit, utilisation=used / limit)
        for wire, used, limit in routed.wires
    )


def kind_of(roles: Set[str]) -> Literal["disaggregated", "colocated", "mixed"]:
    """Of a plan with replicas in these roles."""
    if roles == {COLOCATED}:
        return "colocated"
    return "mixed" if COLOCATED in roles else "disaggregated"


def _bound(
    problem: Problem, found: Found, state: State, roles: tuple[str, ...] | None
) -> tuple[float | None, str | None]:
    """Of all plans that were allowed; none where a group is outside the limits that the bound has columns for."""
    if not all(problem.limits.allow(problem.fabric, group.parts) for group in state.groups):
        return None, None
    bound = problem.bound(roles or MIXED)
    return min(bound.rps, found.bound_rps), bound.method


def _why(problem: Problem, found: Found, kind: str, rps: float) -> str:
    best = {name: flow for name, _, flow in reversed(found.others) if name != "runner-up"}
    if kind == "disaggregated":
        if "colocated" not in best:
            return "prefill and decode apart, as asked for"
        whole = problem.lp(WHOLE).rps
        if whole >= rps:
            whole = problem.bound(WHOLE).rps
        if whole < rps:
            return f"prefill and decode apart carry {_more(rps, whole)} than colocated replicas could at best"
        return f"prefill and decode apart carry {_more(rps, best['colocated'])} than the best colocated replicas found"
    if "disaggregated" in best and best["disaggregated"] < rps / HARDLY:
        return "not disaggregated: links between prefill and decode apart would carry next to nothing"
    if "disaggregated" in best:
        return f"not all disaggregated: this carries {_more(rps, best['disaggregated'])} than prefill and decode apart"
    if reason := problem.why_not_apart():
        return f"not disaggregated: {reason}"
    return f"{kind} replicas, as asked for"


def _more(rps: float, other: float) -> str:
    return f"{(rps / other - 1) * 100:.1f} % more"


def _bottleneck(problem: Problem, replicas: tuple[ReplicaPlan, ...], routed: Routed) -> str:
    full = [wire_name(problem.fabric, wire) for wire, used, limit in routed.wires if used >= FULL * limit]
    sums: dict[str, list[float]] = {}
    for each in replicas:
        total = sums.setdefault(each.role, [0.0, 0.0])
        total[0] += each.flow_rps
        total[1] += each.capacity_rps
    busy = [role for role, (flow, capacity) in sums.items() if flow >= FULL * capacity]
    if full:
        return "links: " + ", ".join(full[:4]) + (f" and {len(full) - 4} more" if len(full) > 4 else "")
    return " and ".join(busy) or "none"


def mean_ttft_s(replicas: Sequence[ReplicaPlan], rps: float, load: float) -> float | None:
    """Prefill of a mean prompt, and the wait of an M/D/1 queue at each replica's load; None if too much."""
    terms = []
    for each in replicas:
        if each.prefill_s is not None and each.flow_rps > 0 and rps > 0:
            busy = load * each.flow_rps / rps / each.capacity_rps
            if busy >= 1:
                return None
            terms.append((each.flow_rps, each.prefill_s + busy / (2 * (1 - busy)) / each.capacity_rps))
    return _mean(terms)


def mean_tpot_s(replicas: Sequence[ReplicaPlan]) -> float:
    """Weighted by the answers that each gives."""
    return _mean([(each.flow_rps, each.tpot_s) for each in replicas if each.tpot_s is not None])


def _mean(weighted: list[tuple[float, float]]) -> float:
    total = sum(weight for weight, _ in weighted)
    return sum(weight * value for weight, value in weighted) / total if total else 0.0


def wire_name(fabric: Fabric, wire: Wire) -> str:
    """``h100 out``, ``a to b``, ``site one to two``."""
    machines = fabric.cluster.machines
    if wire[0] in ("out", "in"):
        return f"{machines[int(wire[1])].name} {wire[0]}"
    if wire[0] == "link":
        return f"{machines[int(wire[1])].name} to {machines[int(wire[2])].name}"  # type: ignore[misc]
    return f"site {wire[1]} to {wire[2]}"  # type: ignore[misc]


def _runner_up(problem: Problem, name: str, state: State, flow: float) -> RunnerUp:
    kinds = problem.fabric.kinds
    counts: dict[str, int] = {}
    for group in sorted(state.groups, key=lambda group: (group.role != PREFILL, group.role, group.parts)):
        parts = problem.fabric.composition(group.parts)
        text = f"{group.role}: " + " + ".join(f"{count} {kinds[kind].gpu}" for kind, count in parts)
        counts[text] = counts.get(text, 0) + 1
    named = kind_of({group.role for group in state.groups}) if name == "runner-up" else name
    return RunnerUp(
        kind=named,
        throughput_rps=flow,
        replicas=tuple(text if count == 1 else f"{count} x {text}" for text, count in counts.items()),
    )
