"""Other roles for the replicas that are there: their GPUs, stages and layers stay, so that nothing is loaded. Pure.

What flexible workers can do at once is to change phase. So under another workload, or with replicas gone, the plan anew
is the choice of roles with the largest flow, and its routes; a role that changes costs a little of the flow.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from math import inf

from hexgen2.kv.wire import CHUNK_TOKENS
from hexgen2.placement import Placement, ReplicaPlan
from hexgen2.scheduler.groups import COLOCATED, DECODE, PREFILL
from hexgen2.scheduler.kv_network import Replica, Routed
from hexgen2.scheduler.pools import SPARE_TOKENS
from hexgen2.scheduler.present import USUAL_LOAD, kind_of, link_plans, mean_tpot_s, mean_ttft_s, route_plans
from hexgen2.scheduler.problem import Problem
from hexgen2.simulator.planned import Planned
from hexgen2.simulator.settings import retold

ROLES = (PREFILL, DECODE, COLOCATED)

Roles = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Recast:
    """``placement`` has the roles that were found, ``current_rps`` is what the present ones carry of this workload."""

    placement: Placement
    flipped: tuple[str, ...]
    current_rps: float
    evaluations: int

    @property
    def rps(self) -> float:
        """What it carries."""
        return self.placement.throughput_rps


def recast(base: Placement, problem: Problem, roles: Roles, *, evaluations: int, flip_cost: float = 0.01) -> Recast:
    """The best roles within ``evaluations``, from the present ``roles`` (by id, of the replicas that are there).

    ``base`` says where each replica stands. ``flip_cost`` is what one changed role must gain, as a share of the flow.
    """
    there = base.model_copy(update={"replicas": tuple(each for each in base.replicas if each.id in roles)})
    planned = Planned(there, problem, problem.workload.longest_prompt_tokens)
    # Nothing that is taken now is given up for a change of roles; what is not is refused either way.
    taken = [_most(planned, each, roles[each.id]) for each in there.replicas]
    work = problem.workload.up_to(*map(min, zip((inf, inf), *taken, strict=True)))
    problem = replace(problem, workload=work)
    search = _Search(Planned(there, problem, work.longest_prompt_tokens), roles, flip_cost)
    found = search.climb(evaluations)
    placement = _placement(there, problem, found, search)
    flipped = tuple(name for name in roles if found[name] != roles[name])
    return Recast(placement, flipped, search.flow(roles), search.evaluations)


class _Search:
    """Climbs over roles; remembers the flow of each choice."""

    def __init__(self, planned: Planned, roles: Roles, flip_cost: float) -> None:
        self.planned = planned
        self.evaluations = 0
        self._present = roles
        self._replicas = {each.id: each for each in planned.placement.replicas}
        self._flip_cost = flip_cost
        self._nodes: dict[tuple[str, str], Replica] = {}
        self._flows: dict[tuple[str, ...], float] = {}

    def climb(self, evaluations: int) -> Roles:
        """Single changes and exchanges of two, the best of all each time, until none is better."""
        best, value = self._present, self._value(self._present)
        while True:
            found, better = best, value
            for roles in self._neighbours(best):
                if self.evaluations >= evaluations:
                    break
                if (seen := self._value(roles)) > better * (1 + 1e-9):
                    found, better = roles, seen
            if found is best:
                return best
            best, value = found, better

    def flow(self, roles: Roles) -> float:
        """Requests per second."""
        key = tuple(roles.values())
        if key not in self._flows:
            self.evaluations += 1
            self._flows[key] = self.routed(roles).rps
        return self._flows[key]

    def routed(self, roles: Roles) -> Routed:
        """The largest flow, by position in ``able``."""
        nodes = [self.node(name, roles[name]) for name in self.able(roles)]
        return self.planned.problem.judge.network.route(nodes) if nodes else Routed(0.0, (), ())

    def able(self, roles: Roles) -> tuple[str, ...]:
        """Those that can have their role at all."""
        return tuple(name for name, role in roles.items() if self.node(name, role).rps > 0)

    def node(self, name: str, role: str) -> Replica:
        """A replica in a role; its rate is 0 where its memory is too small for what is taken now, or the prompt alone
        takes longer than is allowed."""
        if (name, role) not in self._nodes:
            node = self.planned.node(name, role)
            cost, work = self.planned.problem.cost, self.planned.problem.workload
            prompt, total = _most(self.planned, self._replicas[name], role)
            small = prompt < work.longest_prompt_tokens or total < work.longest_tokens
            limit = work.ttft_s if role != DECODE else None
            if small or (limit and cost.prefill_latency_s(self.planned.stages(name)) > limit):
                node = Replica(node.role, 0.0, node.spans, node.gpus, node.hops, node.codec_s)
            self._nodes[name, role] = node
        return self._nodes[name, role]

    def _value(self, roles: Roles) -> float:
        flips = sum(role != self._present[name] for name, role in roles.items())
        return self.flow(roles) * max(0.0, 1.0 - flips * self._flip_cost)

    def _neighbours(self, roles: Roles) -> Iterator[Roles]:
        for name, role in roles.items():
            for other in ROLES:
                if other != role:
                    yield {**roles, name: other}
        for one, other in combinations(roles, 2):
            if roles[one] != roles[other]:
                yield {**roles, one: roles[other], other: roles[one]}


def _most(planned: Planned, replica: ReplicaPlan, role: str) -> tuple[float, float]:
    """Tokens of the longest prompt and the longest request that a replica takes in a role: the sizes of its pools and
    its KV cache were settled when it was started.
    """
    engine = replica.engine
    if engine is None:
        return inf, inf
    kv_tokens = engine.kv_cache_bytes / max(planned.token_bytes(planned.stages(replica.id)))
    context = max(1.0, kv_tokens - (SPARE_TOKENS - CHUNK_TOKENS))
    if role == PREFILL:
        return min(engine.send_tokens, context), inf
    return (engine.staging_tokens if role == DECODE else inf), context


def _placement(base: Placement, problem: Problem, roles: Roles, search: _Search) -> Placement:
    routed, names = search.routed(roles), search.able(roles)
    flows = dict.fromkeys(roles, 0.0)
    for i, j, flow in routed.routes:
        for end in {names[i], names[j]}:
            flows[end] += flow
    network = problem.judge.network
    nodes = [search.node(name, roles[name]) for name in names]
    replicas = tuple(_replica(each, roles[each.id], flows[each.id], search) for each in base.replicas)
    load = problem.workload.rate or USUAL_LOAD * routed.rps
    placement = base.model_copy(
        update={
            "workload": problem.workload.name,
            "kind": kind_of(set(roles.values())),
            "why": "roles of the replicas that are there, for what is asked of them",
            "throughput_rps": routed.rps,
            "bottleneck": "the replicas there are",
            "bound_rps": None,
            "bound_method": None,
            "gap": None,
            "ttft_s": mean_ttft_s(replicas, routed.rps, load) or None,
            "tpot_s": mean_tpot_s(replicas),
            "load_rps": load,
            "output_tokens_per_s": routed.rps * problem.workload.mean_output_tokens,
            "strategy": "recast",
            "evaluations": search.evaluations,
            "replicas": replicas,
            "routes": route_plans(network, names, nodes, routed),
            "links": link_plans(problem.fabric, routed),
            "runners_up": (),
        }
    )
    return retold(Planned(placement, problem, search.planned.longest_prompt))


def _replica(base: ReplicaPlan, role: str, flow: float, search: _Search) -> ReplicaPlan:
    cost, stages = search.planned.problem.cost, search.planned.stages(base.id)
    rate = {DECODE: cost.decode_rate, COLOCATED: cost.colocated_rate}.get(role)
    found = rate(stages) if rate is not None else None
    capacity = search.node(base.id, role).rps
    return base.model_copy(
        update={
            "role": role,
            "capacity_rps": capacity,
            "flow_rps": flow,
            "utilisation": min(1.0, flow / capacity) if capacity > 0 else 0.0,
            "prefill_s": cost.prefill_latency_s(stages) if role != DECODE else None,
            "tpot_s": found.tpot_s if found is not None else None,
            "batch": found.batch if found is not None else None,
        }
    )
