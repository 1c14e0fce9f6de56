"""The plan, its replicas and what is measured, wire <-> domain. Bad values raise InvalidRequest naming the field."""

from collections.abc import Iterable, Mapping
from math import isfinite

from hexgen2.errors import InvalidRequest
from hexgen2.forecast import Forecast
from hexgen2.observed import NUM_CLASSES, ClassTally, Tally
from hexgen2.plan import (
    GatewayLoad,
    KvReceived,
    Load,
    Measured,
    Plan,
    PlanChange,
    Prediction,
    Replica,
    ReplicaPrediction,
    ReplicaState,
    ReplicaStatus,
    Role,
    Route,
    RouteLoad,
)
from hexgen2.rpc.convert import codec_from_proto
from hexgen2.v1 import types_pb2 as pb

_ROLES: Mapping[Role, "pb.Role.ValueType"] = {
    Role.PREFILL: pb.ROLE_PREFILL,
    Role.DECODE: pb.ROLE_DECODE,
    Role.COLOCATED: pb.ROLE_COLOCATED,
}
_STATES: Mapping[ReplicaState, "pb.ReplicaState.ValueType"] = {
    ReplicaState.STARTING: pb.REPLICA_STATE_STARTING,
    ReplicaState.READY: pb.REPLICA_STATE_READY,
    ReplicaState.DRAINING: pb.REPLICA_STATE_DRAINING,
    ReplicaState.LOST: pb.REPLICA_STATE_LOST,
    ReplicaState.STOPPED: pb.REPLICA_STATE_STOPPED,
}
_ROLES_BACK = {value: key for key, value in _ROLES.items()}
_STATES_BACK = {value: key for key, value in _STATES.items()}


def role_to_proto(role: Role) -> "pb.Role.ValueType":
    """The role on the wire."""
    return _ROLES[role]


def role_from_proto(value: "pb.Role.ValueType", field: str = "role") -> Role:
    """The role; InvalidRequest when unset or unknown."""
    if value not in _ROLES_BACK:
        raise InvalidRequest(field, f"must be a known role, is {value}")
    return _ROLES_BACK[value]


def state_to_proto(state: ReplicaState) -> "pb.ReplicaState.ValueType":
    """The state on the wire."""
    return _STATES[state]


def state_from_proto(value: "pb.ReplicaState.ValueType", field: str = "state") -> ReplicaState:
    """The state; InvalidRequest when unset or unknown."""
    if value not in _STATES_BACK:
        raise InvalidRequest(field, f"must be a known state, is {value}")
    return _STATES_BACK[value]


def replica_to_proto(replica: Replica) -> pb.Replica:
    """A replica as registered."""
    return pb.Replica(
        replica_id=replica.replica_id,
        role=_ROLES[replica.role],
        address=replica.address,
        model=replica.model,
        model_sha256=replica.model_sha256,
        incarnation=replica.incarnation,
        max_model_len=replica.max_model_len,
        transport=replica.transport,
        metrics_address=replica.metrics_address,
        flexible=replica.flexible,
        version=replica.version,
        tensor_parallel_size=replica.tensor_parallel_size,
        stage_layers=replica.stage_layers,
        device=replica.device,
        send_tokens=replica.send_tokens,
        staging_tokens=replica.staging_tokens,
    )


def replica_from_proto(message: pb.Replica, field: str = "replica") -> Replica:
    """A replica; ``field`` is its path in errors."""
    return Replica(
        replica_id=message.replica_id,
        role=role_from_proto(message.role, f"{field}.role"),
        address=message.address,
        model=message.model,
        model_sha256=message.model_sha256,
        incarnation=message.incarnation,
        max_model_len=message.max_model_len,
        transport=message.transport,
        metrics_address=message.metrics_address,
        flexible=message.flexible,
        version=message.version,
        tensor_parallel_size=message.tensor_parallel_size,
        stage_layers=tuple(message.stage_layers),
        device=message.device,
        send_tokens=message.send_tokens,
        staging_tokens=message.staging_tokens,
    )


def load_to_proto(load: Load) -> pb.Load:
    """What a replica is busy with."""
    return pb.Load(
        num_requests_running=load.num_requests_running,
        num_requests_waiting=load.num_requests_waiting,
        kv_pool_bytes_used=load.kv_pool_bytes_used,
        kv_pool_bytes_total=load.kv_pool_bytes_total,
        kv_received=pb.KvReceived(
            bytes=load.kv_received.num_bytes,
            seconds=load.kv_received.seconds,
            num_transfers=load.kv_received.num_transfers,
            num_corrupt=load.kv_received.num_corrupt,
            quarantine_bytes=load.kv_received.quarantine_bytes,
        ),
    )


def load_from_proto(message: pb.Load) -> Load:
    """What a replica is busy with."""
    kv = message.kv_received
    if not (isfinite(kv.seconds) and kv.seconds >= 0):
        raise InvalidRequest("load.kv_received.seconds", f"{kv.seconds} is not a number of at least 0")
    return Load(
        message.num_requests_running,
        message.num_requests_waiting,
        message.kv_pool_bytes_used,
        message.kv_pool_bytes_total,
        KvReceived(kv.bytes, kv.seconds, kv.num_transfers, kv.num_corrupt, kv.quarantine_bytes),
    )


def status_to_proto(status: ReplicaStatus) -> pb.ReplicaStatus:
    """A replica's state and load."""
    return pb.ReplicaStatus(replica_id=status.replica_id, state=_STATES[status.state], load=load_to_proto(status.load))


def status_from_proto(message: pb.ReplicaStatus, field: str = "status") -> ReplicaStatus:
    """A replica's state and load."""
    return ReplicaStatus(
        message.replica_id, state_from_proto(message.state, f"{field}.state"), load_from_proto(message.load)
    )


def statuses_from_proto(messages: Iterable[pb.ReplicaStatus]) -> dict[str, ReplicaStatus]:
    """Statuses by replica id."""
    statuses = (status_from_proto(message, f"statuses[{i}]") for i, message in enumerate(messages))
    return {status.replica_id: status for status in statuses}


def plan_to_proto(plan: Plan) -> pb.Plan:
    """A plan."""
    return pb.Plan(
        epoch=plan.epoch,
        replicas=[replica_to_proto(replica) for replica in plan.replicas],
        routes=[
            pb.Route(
                prefill_replica_id=r.prefill_replica_id,
                decode_replica_id=r.decode_replica_id,
                flow=r.flow,
                codec=r.codec,
            )
            for r in plan.routes
        ],
        traceparent=plan.traceparent,
        colocate_max_prompt_tokens=plan.colocate_max_prompt_tokens,
        prediction=None if plan.prediction is None else _prediction_to_proto(plan.prediction),
    )


def plan_from_proto(message: pb.Plan) -> Plan:
    """A plan; its routes name its own replicas in their roles and a known codec, and their flow is at least 0."""
    replicas = tuple(replica_from_proto(each, f"plan.replicas[{i}]") for i, each in enumerate(message.replicas))
    roles = {replica.replica_id: replica.role for replica in replicas}
    for i, route in enumerate(message.routes):
        whole = route.prefill_replica_id == route.decode_replica_id
        for field, role in (("prefill_replica_id", Role.PREFILL), ("decode_replica_id", Role.DECODE)):
            replica_id, wanted = getattr(route, field), Role.COLOCATED if whole else role
            if roles.get(replica_id) is not wanted:
                raise InvalidRequest(f"plan.routes[{i}].{field}", f"{replica_id!r} is no {wanted} replica of the plan")
        if not (isfinite(route.flow) and route.flow >= 0):
            raise InvalidRequest(f"plan.routes[{i}].flow", f"{route.flow} is not a number of at least 0")
    routes = tuple(
        Route(
            route.prefill_replica_id,
            route.decode_replica_id,
            route.flow,
            codec_from_proto(route.codec, f"plan.routes[{i}].codec"),
        )
        for i, route in enumerate(message.routes)
    )
    prediction = _prediction_from_proto(message.prediction) if message.HasField("prediction") else None
    return Plan(message.epoch, replicas, routes, message.traceparent, message.colocate_max_prompt_tokens, prediction)


def gateway_to_proto(gateway: GatewayLoad) -> pb.GatewayLoad:
    """What a gateway sees."""
    measured = gateway.measured
    return pb.GatewayLoad(
        gateway_id=gateway.gateway_id,
        routes=[
            pb.RouteLoad(
                prefill_replica_id=each.prefill_replica_id,
                decode_replica_id=each.decode_replica_id,
                num_requests=each.num_requests,
                num_finished=each.num_finished,
            )
            for each in gateway.routes
        ],
        measured=pb.Measured(
            window_s=measured.window_s,
            num_arrived=measured.num_arrived,
            num_finished=measured.num_finished,
            num_failed=measured.num_failed,
            mean_prompt_tokens=measured.mean_prompt_tokens,
            mean_output_tokens=measured.mean_output_tokens,
            mean_ttft_s=measured.mean_ttft_s,
            mean_tpot_s=measured.mean_tpot_s,
        ),
        tally=_tally_to_proto(gateway.tally),
    )


def gateway_from_proto(message: pb.GatewayLoad, field: str = "gateway") -> GatewayLoad:
    """What a gateway sees."""
    if not message.gateway_id:
        raise InvalidRequest(f"{field}.gateway_id", "is empty")
    routes = tuple(
        RouteLoad(r.prefill_replica_id, r.decode_replica_id, r.num_requests, r.num_finished) for r in message.routes
    )
    m = message.measured
    for name in ("window_s", "mean_prompt_tokens", "mean_output_tokens", "mean_ttft_s", "mean_tpot_s"):
        value = getattr(m, name)
        if not (isfinite(value) and value >= 0):
            raise InvalidRequest(f"{field}.measured.{name}", f"{value} is not a number of at least 0")
    measured = Measured(
        m.window_s,
        m.num_arrived,
        m.num_finished,
        m.num_failed,
        m.mean_prompt_tokens,
        m.mean_output_tokens,
        m.mean_ttft_s,
        m.mean_tpot_s,
    )
    return GatewayLoad(message.gateway_id, routes, measured, _tally_from_proto(message.tally, f"{field}.tally"))


def _tally_to_proto(tally: Tally) -> pb.Tally:
    return pb.Tally(
        num_arrived=tally.num_arrived,
        num_ended=tally.num_ended,
        num_good=tally.num_good,
        num_failed=tally.num_failed,
        classes=[
            pb.ClassTally(
                number=each.number, num=each.num, prompt_tokens=each.prompt_tokens, output_tokens=each.output_tokens
            )
            for each in tally.classes
        ],
    )


def _tally_from_proto(message: pb.Tally, field: str) -> Tally:
    if len(message.classes) > NUM_CLASSES or any(each.number >= NUM_CLASSES for each in message.classes):
        raise InvalidRequest(f"{field}.classes", f"there are {NUM_CLASSES} classes")
    classes = tuple(ClassTally(c.number, c.num, c.prompt_tokens, c.output_tokens) for c in message.classes)
    return Tally(message.num_arrived, message.num_ended, message.num_good, message.num_failed, classes)


def change_to_proto(change: PlanChange) -> pb.PlanChange:
    """One entry of the plan's history."""
    return pb.PlanChange(unix_time_s=change.unix_s, plan_epoch=change.epoch, what=change.what, why=change.why)


def change_from_proto(message: pb.PlanChange) -> PlanChange:
    """One entry of the plan's history."""
    return PlanChange(message.unix_time_s, message.plan_epoch, message.what, message.why)


def _prediction_to_proto(prediction: Prediction) -> pb.Prediction:
    return pb.Prediction(
        throughput_rps=prediction.throughput_rps,
        output_tokens_per_s=prediction.output_tokens_per_s,
        load_rps=prediction.load_rps,
        ttft_s=prediction.ttft_s,
        tpot_s=prediction.tpot_s,
        replicas=[
            pb.ReplicaPrediction(replica_id=each.replica_id, capacity_rps=each.capacity_rps, flow_rps=each.flow_rps)
            for each in prediction.replicas
        ],
    )


def _prediction_from_proto(message: pb.Prediction) -> Prediction:
    return Prediction(
        message.throughput_rps,
        message.output_tokens_per_s,
        message.load_rps,
        message.ttft_s if message.HasField("ttft_s") else None,
        message.tpot_s,
        tuple(ReplicaPrediction(each.replica_id, each.capacity_rps, each.flow_rps) for each in message.replicas),
    )


def forecasts_to_proto(forecasts: Mapping[str, Forecast], best: str) -> list[pb.Forecast]:
    """Every forecaster's word; ``best`` is whose is used."""
    return [
        pb.Forecast(name=who, requests_per_s=each.rps, error=each.error, used=who == best)
        for who, each in forecasts.items()
    ]
