"""What a plan.yaml has each replica do, by its id, wherever it runs; and the routes among those there are. Pure."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import MappingProxyType

from hexgen2.devices import cpu_share, is_gpu
from hexgen2.kv.codecs import NONE
from hexgen2.placement import Placement, StagePlan
from hexgen2.plan import Prediction, Replica, ReplicaPrediction, Role, Route

#: Whether the KV of the one is KV of the other, and can reach it.
Fits = Callable[[Replica, Replica], bool]


@dataclass(frozen=True, slots=True)
class Shape:
    """How the plan has a replica's engine: GPUs of each stage, layers of each, the kinds of device."""

    tensor_parallel_sizes: tuple[int, ...]
    stage_layers: tuple[int, ...]
    devices: tuple[str, ...]

    def difference(self, replica: Replica) -> str:
        """What a replica has otherwise, in words; empty when nothing is known to differ."""
        found = []
        if replica.tensor_parallel_size and set(self.tensor_parallel_sizes) != {replica.tensor_parallel_size}:
            planned = ",".join(map(str, self.tensor_parallel_sizes))
            found.append(f"tensor_parallel_size {planned} in the plan, {replica.tensor_parallel_size} in the worker")
        if replica.stage_layers and self.stage_layers != replica.stage_layers:
            ours, theirs = (",".join(map(str, each)) for each in (self.stage_layers, replica.stage_layers))
            found.append(f"stages of {ours} layers in the plan, of {theirs} in the worker")
        if replica.device and not all(_same_device(each, replica.device) for each in self.devices):
            found.append(f"{', '.join(sorted(set(self.devices)))} in the plan, {replica.device} in the worker")
        return "; ".join(found)


def _same_device(planned: str, device: str) -> bool:
    if device == "cpu" or cpu_share(planned) is not None:
        return device == "cpu" and cpu_share(planned) is not None
    return is_gpu(planned, device)


@dataclass(frozen=True, slots=True)
class Assignment:
    """Roles by replica id, routes by their flow, and what the plan promises of them."""

    roles: "MappingProxyType[str, Role]"
    routes: tuple[Route, ...]
    prediction: Prediction
    colocate_max_prompt_tokens: int = 0
    flows: "MappingProxyType[str, float]" = field(default_factory=lambda: MappingProxyType({}))
    shapes: "MappingProxyType[str, Shape]" = field(default_factory=lambda: MappingProxyType({}))


def assignment_of(placement: Placement) -> Assignment:
    """The roles, routes and promises of a planned placement."""
    wholes = (Route(r.id, r.id, r.flow_rps) for r in placement.replicas if r.role == "colocated")
    routes = (Route(r.prefill, r.decode, r.flow_rps, r.codec) for r in placement.routes)
    return Assignment(
        roles=MappingProxyType({each.id: Role(each.role) for each in placement.replicas}),
        routes=(*routes, *wholes),
        prediction=Prediction(
            throughput_rps=placement.throughput_rps,
            output_tokens_per_s=placement.output_tokens_per_s,
            load_rps=placement.load_rps,
            ttft_s=placement.ttft_s,
            tpot_s=placement.tpot_s,
            replicas=tuple(ReplicaPrediction(r.id, r.capacity_rps, r.flow_rps) for r in placement.replicas),
        ),
        colocate_max_prompt_tokens=placement.colocate_max_prompt_tokens,
        flows=MappingProxyType({each.id: each.flow_rps for each in placement.replicas}),
        shapes=MappingProxyType({each.id: _shape(each.stages) for each in placement.replicas}),
    )


def _shape(stages: tuple[StagePlan, ...]) -> Shape:
    return Shape(
        tuple(stage.tensor_parallel_size for stage in stages),
        tuple(stage.num_layers for stage in stages),
        tuple(stage.gpu for stage in stages),
    )


def routes_among(assignment: Assignment, alive: Iterable[Replica], fits: Fits, codec: str = NONE) -> tuple[Route, ...]:
    """The plan's routes between replicas that are there; a prefill replica left without any goes to every decode one.

    So nothing that still could be served is refused until there is a plan without the missing replica. ``codec`` is
    that of routes that the plan has not.
    """
    replicas = {each.replica_id: each for each in alive}
    routes = [
        route
        for route in assignment.routes
        if (p := replicas.get(route.prefill_replica_id)) and (d := replicas.get(route.decode_replica_id))
        if p is d or fits(p, d)
    ]
    sending = {route.prefill_replica_id for route in routes}
    for prefill in replicas.values():
        if prefill.role is Role.PREFILL and prefill.replica_id not in sending:
            others = [each for each in replicas.values() if each.role is Role.DECODE and fits(prefill, each)]
            flow = assignment.flows.get(prefill.replica_id, 0.0) / max(1, len(others))
            routes += [Route(prefill.replica_id, each.replica_id, flow, codec) for each in others if flow > 0]
    return tuple(routes)


def all_routes(alive: Iterable[Replica], fits: Fits, codec: str = NONE) -> tuple[Route, ...]:
    """Without a plan: every prefill with every decode replica, and what serves whole requests by itself, evenly."""
    replicas = tuple(alive)
    decodes = [each for each in replicas if each.role is Role.DECODE]
    pairs = [
        Route(prefill.replica_id, decode.replica_id, 1.0, codec)
        for prefill in replicas
        if prefill.role is Role.PREFILL
        for decode in decodes
        if fits(prefill, decode)
    ]
    wholes = [Route(r.replica_id, r.replica_id, 1.0) for r in replicas if r.role is Role.COLOCATED and r.model_sha256]
    return (*pairs, *wholes)
