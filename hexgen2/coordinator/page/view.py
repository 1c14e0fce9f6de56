"""What the page shows of a fleet: the plan that runs, the one that was promised, and what is measured. Pure.

``View`` is what ``/state.json`` holds, field by field. Rates are requests per second; None means not known.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hexgen2.address import parse_address
from hexgen2.coordinator.gateway_loads import together
from hexgen2.errors import ConfigError
from hexgen2.placement import Placement, ReplicaPlan
from hexgen2.plan import (
    GatewayLoad,
    KvReceived,
    Load,
    Measured,
    Plan,
    PlanChange,
    Replica,
    ReplicaState,
    ReplicaStatus,
    Role,
)

#: Measured times up to so many times the promised ones count as kept.
NEAR = 1.2


@dataclass(frozen=True, slots=True)
class Fleet:
    """All that a view is made of, at ``unix_s``. ``placement`` is the plan.yaml in force, if there is one."""

    unix_s: float
    plan: Plan
    statuses: Mapping[str, ReplicaStatus]
    gateways: Sequence[GatewayLoad]
    placement: Placement | None = None
    changes: Sequence[PlanChange] = ()


@dataclass(frozen=True, slots=True)
class Compared:
    """A promise and what came of it. ``verdict``: kept, worse, or "" where there is nothing to compare."""

    name: str
    unit: str
    planned: float | None
    measured: float | None
    verdict: str


@dataclass(frozen=True, slots=True)
class KvView:
    """KV that came to a replica, or to all: over the last minute, but for what went wrong."""

    transfers: int
    bytes_per_s: float | None
    corrupt: int
    quarantine_bytes: int


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """One replica. ``label`` is short and its own, such as P0; ``gpus`` is for people."""

    id: str
    label: str
    role: str
    state: str
    gpus: str
    planned_rps: float | None
    capacity_rps: float | None
    measured_rps: float | None
    in_flight: int
    running: int
    waiting: int
    kv_used: float | None
    kv: KvView
    transport: str
    address: str


@dataclass(frozen=True, slots=True)
class RouteView:
    """A route; ``prefill == decode`` serves whole requests. ``utilisation`` is of its planned flow."""

    prefill: str
    decode: str
    codec: str
    planned_rps: float | None
    share: float
    measured_rps: float | None
    utilisation: float | None
    in_flight: int


@dataclass(frozen=True, slots=True)
class Cell:
    """One GPU, and who has it; "" for nobody."""

    replica: str


@dataclass(frozen=True, slots=True)
class Gpus:
    """The GPUs of one kind in a machine; ``kind`` is "" where no plan says what they are."""

    kind: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class MachineView:
    """One machine."""

    name: str
    gpus: tuple[Gpus, ...]


@dataclass(frozen=True, slots=True)
class View:
    """See the module."""

    unix_s: float
    model: str
    title: str
    epoch: int
    level: str
    troubles: tuple[str, ...]
    window_s: float
    arrivals_rps: float | None
    failed: int
    in_flight: int
    waiting: int
    compared: tuple[Compared, ...]
    kv: KvView
    machines: tuple[MachineView, ...]
    replicas: tuple[ReplicaView, ...]
    routes: tuple[RouteView, ...]
    gateways: tuple[str, ...]
    changes: tuple[PlanChange, ...]


def view(fleet: Fleet) -> View:
    """What is shown of it."""
    measured = together(fleet.gateways)
    replicas = _replicas(fleet)
    kv = _kv_of([fleet.statuses[key].load.kv_received for key in sorted(fleet.statuses)])
    compared = _compared(fleet.plan, measured)
    troubles = tuple(_troubles(fleet, replicas, kv, compared, measured))
    bad = not any(each.state is ReplicaState.READY for each in fleet.statuses.values())
    window_s = measured.window_s
    return View(
        unix_s=fleet.unix_s,
        model=next((each.model for each in fleet.plan.replicas if each.model), ""),
        title=_title(fleet),
        epoch=fleet.plan.epoch,
        level="bad" if bad else "warn" if troubles else "ok",
        troubles=troubles,
        window_s=window_s,
        arrivals_rps=measured.num_arrived / window_s if window_s else None,
        failed=measured.num_failed,
        in_flight=sum(route.num_requests for gateway in fleet.gateways for route in gateway.routes),
        waiting=sum(each.waiting for each in replicas),
        compared=compared,
        kv=kv,
        machines=_machines(fleet),
        replicas=replicas,
        routes=_routes(fleet, window_s),
        gateways=tuple(gateway.gateway_id for gateway in fleet.gateways),
        changes=tuple(sorted(fleet.changes, key=lambda each: -each.unix_s)),
    )


def _title(fleet: Fleet) -> str:
    if (planned := fleet.placement) is None:
        return "no plan: every prefill replica hands over to every decode replica"
    return f"{planned.model} on {planned.cluster} for {planned.workload}: {planned.kind} ({planned.why})"


def _compared(plan: Plan, measured: Measured) -> tuple[Compared, ...]:
    told = plan.prediction
    window_s = max(measured.window_s, 1e-9)
    ended = measured.num_finished > 0
    served = measured.num_finished / window_s if measured.window_s else None
    made = served * measured.mean_output_tokens if served is not None else None

    def time(name: str, planned: float | None, seen: float) -> Compared:
        seen_s = seen if ended and seen > 0 else None
        verdict = "" if planned is None or seen_s is None else "kept" if seen_s <= NEAR * planned else "worse"
        return Compared(name, "s", planned, seen_s, verdict)

    # A fleet that is asked for less than it can do makes less: no verdict on rates.
    return (
        time("Time to first token", told.ttft_s if told else None, measured.mean_ttft_s),
        time("Time per output token", told.tpot_s if told else None, measured.mean_tpot_s),
        Compared("Requests served", "/s", told.throughput_rps if told else None, served, ""),
        Compared("Output tokens", "/s", told.output_tokens_per_s if told else None, made, ""),
    )


def _troubles(
    fleet: Fleet, replicas: Sequence[ReplicaView], kv: KvView, compared: Sequence[Compared], measured: Measured
) -> list[str]:
    found = [f"{each.id} is {each.state}" for each in replicas if each.state != ReplicaState.READY]
    if not fleet.plan.replicas:
        found.append("no replica has registered")
    if not fleet.gateways:
        found.append("no gateway reports")
    if measured.num_failed:
        found.append(f"{measured.num_failed} requests failed in the last {measured.window_s:.0f} s")
    if kv.corrupt:
        found.append(f"{kv.corrupt} KV hand-offs did not match their digest")
    if kv.quarantine_bytes:
        found.append("KV memory is in quarantine: a read has not ended")
    found += [f"{each.name.lower()} is longer than planned" for each in compared if each.verdict == "worse"]
    return found


def _replicas(fleet: Fleet) -> tuple[ReplicaView, ...]:
    planned = {each.id: each for each in fleet.placement.replicas} if fleet.placement else {}
    promised = {each.replica_id: each for each in fleet.plan.prediction.replicas} if fleet.plan.prediction else {}
    labels = labels_of(fleet.plan.replicas)
    in_flight: Counter[str] = Counter()
    finished: Counter[str] = Counter()
    for gateway in fleet.gateways:
        for route in gateway.routes:
            for end in {route.prefill_replica_id, route.decode_replica_id}:
                in_flight[end] += route.num_requests
                finished[end] += route.num_finished
    window_s = together(fleet.gateways).window_s
    found = []
    for each in fleet.plan.replicas:
        key = each.replica_id
        status = fleet.statuses.get(key)
        load = status.load if status else Load()
        promise = promised.get(key)
        total = load.kv_pool_bytes_total
        found.append(
            ReplicaView(
                id=key,
                label=labels[key],
                role=each.role.value,
                state=(status.state if status else ReplicaState.LOST).value,
                gpus=_gpus(planned.get(key)),
                planned_rps=promise.flow_rps if promise else None,
                capacity_rps=promise.capacity_rps if promise else None,
                measured_rps=finished[key] / window_s if window_s else None,
                in_flight=in_flight[key],
                running=load.num_requests_running,
                waiting=load.num_requests_waiting,
                kv_used=load.kv_pool_bytes_used / total if total else None,
                kv=_kv_of([load.kv_received]),
                transport=each.transport,
                address=each.address,
            )
        )
    return tuple(found)


def labels_of(replicas: Sequence[Replica]) -> dict[str, str]:
    """P0, P1, D0, ...: the role's letter, numbered in the order of ids."""
    counts: Counter[Role] = Counter()
    found = {}
    for each in sorted(replicas, key=lambda each: each.replica_id):
        found[each.replica_id] = f"{each.role.value[0].upper()}{counts[each.role]}"
        counts[each.role] += 1
    return found


def _gpus(planned: ReplicaPlan | None) -> str:
    if planned is None:
        return ""
    return ", ".join(f"{count} {gpu} on {machine}" for (machine, gpu), count in planned.gpus.items())


def _kv_of(parts: Sequence[KvReceived]) -> KvView:
    seconds = sum(part.seconds for part in parts)
    return KvView(
        transfers=sum(part.num_transfers for part in parts),
        bytes_per_s=sum(part.num_bytes for part in parts) / seconds if seconds > 0 else None,
        corrupt=sum(part.num_corrupt for part in parts),
        quarantine_bytes=sum(part.quarantine_bytes for part in parts),
    )


def _routes(fleet: Fleet, window_s: float) -> tuple[RouteView, ...]:
    in_flight: Counter[tuple[str, str]] = Counter()
    finished: Counter[tuple[str, str]] = Counter()
    for gateway in fleet.gateways:
        for route in gateway.routes:
            key = (route.prefill_replica_id, route.decode_replica_id)
            in_flight[key] += route.num_requests
            finished[key] += route.num_finished
    # Only proportions count of a route that nobody planned.
    promised = fleet.plan.prediction is not None
    total = sum(route.flow for route in fleet.plan.routes)
    found = []
    for each in fleet.plan.routes:
        key = (each.prefill_replica_id, each.decode_replica_id)
        measured = finished[key] / window_s if window_s else None
        planned = each.flow if promised else None
        found.append(
            RouteView(
                prefill=key[0],
                decode=key[1],
                codec=each.codec,
                planned_rps=planned,
                share=each.flow / total if total else 0.0,
                measured_rps=measured,
                utilisation=measured / planned if planned and measured is not None else None,
                in_flight=in_flight[key],
            )
        )
    return tuple(sorted(found, key=lambda each: -each.share))


def _machines(fleet: Fleet) -> tuple[MachineView, ...]:
    """As planned; replicas that no plan has stand on the machine of their address."""
    cells: dict[str, dict[str, list[Cell]]] = {}
    placed: set[str] = set()
    here = {each.replica_id for each in fleet.plan.replicas}
    if fleet.placement is not None:
        for planned in fleet.placement.replicas:
            for (machine, gpu), count in planned.gpus.items():
                owner = Cell(planned.id if planned.id in here else "")
                cells.setdefault(machine, {}).setdefault(gpu, []).extend([owner] * count)
            placed.add(planned.id)
        for idle in fleet.placement.idle:
            cells.setdefault(idle.machine, {}).setdefault(idle.gpu, []).extend([Cell("")] * idle.count)
    for replica in fleet.plan.replicas:
        if replica.replica_id not in placed:
            cells.setdefault(_host(replica.address), {}).setdefault("", []).append(Cell(replica.replica_id))
    return tuple(
        MachineView(name, tuple(Gpus(kind, tuple(found)) for kind, found in sorted(kinds.items())))
        for name, kinds in sorted(cells.items())
    )


def _host(address: str) -> str:
    try:
        return parse_address(address, what="address")[0]
    except ConfigError:
        return address
