"""``hexgen2 status``: the plan, what every replica is doing, and what was promised against what is measured."""

import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from google.protobuf.json_format import MessageToDict
from rich.console import Console, Group, RenderableType
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from hexgen2.calibration import Calibration, Term
from hexgen2.cli.client import Access, get_plan
from hexgen2.coordinator.gateway_loads import together
from hexgen2.plan import GatewayLoad, Measured, Plan, Prediction, ReplicaState, ReplicaStatus
from hexgen2.routing import RouteKey
from hexgen2.rpc.calibration_convert import calibration_from_proto
from hexgen2.rpc.plan_convert import gateway_from_proto, plan_from_proto, status_from_proto
from hexgen2.v1 import coordinator_pb2

#: More are not read by people.
MAX_ROUTES = 40

#: Of the plan's history, the newest.
MAX_CHANGES = 5

_STYLES = {ReplicaState.READY: "green", ReplicaState.LOST: "red"}


async def show_status(address: str, timeout_s: float, access: Access, console: Console, *, as_json: bool) -> None:
    """The command. Raises HexgenError."""
    answer = await get_plan(address, timeout_s, access)
    if as_json:
        print(json.dumps(as_dict(answer), indent=2))
    else:
        console.print(overview(answer), highlight=False)


def as_dict(answer: coordinator_pb2.GetPlanResponse) -> dict[str, Any]:
    """All of it, for programs."""
    return MessageToDict(answer, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def overview(answer: coordinator_pb2.GetPlanResponse) -> Group:
    """All of it, for people."""
    plan = plan_from_proto(answer.plan)
    statuses = {status.replica_id: status for status in map(status_from_proto, answer.statuses)}
    gateways = [gateway_from_proto(gateway) for gateway in answer.gateways]
    calibration = calibration_from_proto(answer.calibration)
    parts: list[RenderableType] = [
        f"plan epoch {plan.epoch}, {len(plan.replicas)} replicas, {len(plan.routes)} routes",
        _replicas(plan, statuses, gateways),
        "",
        _promises(plan.prediction, together(gateways)),
        "",
    ]
    if calibration.ratios:
        parts += [
            _errors(calibration),
            f"[red]the plan is off: {escape(calibration.why)}[/]\n" if calibration.off else "",
        ]
    parts += map(_whole_line, _history(answer))
    parts += [_whole_line(f"{each.replica_id}: KV by {each.transport}") for each in plan.replicas]
    if plan.routes:
        parts += ["", _routes(plan, gateways)]
    if len(plan.routes) > MAX_ROUTES:
        parts.append(f"and {len(plan.routes) - MAX_ROUTES} routes more: --json lists them")
    return Group(*parts)


def _whole_line(text: str) -> Text:
    """As it is: nobody's brackets are markup, and no terminal's width cuts it."""
    return Text(text, overflow="fold")


def _replicas(plan: Plan, statuses: Mapping[str, ReplicaStatus], gateways: Iterable[GatewayLoad]) -> Table:
    in_flight: Counter[str] = Counter()
    for gateway in gateways:
        for route in gateway.routes:
            for end in {route.prefill_replica_id, route.decode_replica_id}:
                in_flight[end] += route.num_requests
    planned = {each.replica_id: each for each in plan.prediction.replicas} if plan.prediction else {}
    columns = ["replica", "role", "state", "in flight", "running", "waiting", "KV memory used", "model", "address"]
    if planned:
        columns.insert(3, "planned")
    table = Table(*columns, box=None, padding=(0, 2, 0, 0))
    for replica in plan.replicas:
        status = statuses.get(replica.replica_id)
        if status is None:
            continue
        load = status.load
        cells = [
            escape(replica.replica_id),
            replica.role.value,
            f"[{_STYLES.get(status.state, 'yellow')}]{status.state}",
            str(in_flight[replica.replica_id]),
            str(load.num_requests_running),
            str(load.num_requests_waiting),
            f"{decimal(load.kv_pool_bytes_used)} of {decimal(load.kv_pool_bytes_total)}",
            escape(replica.model),
            escape(replica.address),
        ]
        if planned:
            promised = planned.get(replica.replica_id)
            cells.insert(3, f"{promised.flow_rps:.3g} of {promised.capacity_rps:.3g}/s" if promised else "")
        table.add_row(*cells)
    return table


def _promises(prediction: Prediction | None, measured: Measured) -> Table:
    """What the plan promises beside what gateways measured of the last minute."""
    window_s = max(measured.window_s, 1e-9)
    told: tuple[float | None, ...] = (None,) * 5
    if (plan := prediction) is not None:
        told = (plan.load_rps, plan.throughput_rps, plan.output_tokens_per_s, plan.ttft_s, plan.tpot_s)
    load, most, tokens, ttft_s, tpot_s = told
    ended = measured.num_finished > 0
    made = measured.num_finished * measured.mean_output_tokens / window_s
    table = Table("", "predicted", f"measured, last {measured.window_s:.0f} s", box=None, padding=(0, 2, 0, 0))
    table.add_row("arrivals", _of(load, "/s"), _of(measured.num_arrived / window_s, "/s"))
    table.add_row("finished", _of(most, "/s at most"), _rate(measured))
    table.add_row("output tokens", _of(tokens, "/s at most"), _of(made, "/s"))
    table.add_row("TTFT", _of(ttft_s, " s"), _of(measured.mean_ttft_s if ended else None, " s"))
    table.add_row("TPOT", _of(tpot_s, " s"), _of(measured.mean_tpot_s if ended else None, " s"))
    return table


def _errors(calibration: Calibration) -> Table:
    """Measured over planned times of each replica, where enough was measured."""
    table = Table("measured / planned", *Term, box=None, padding=(0, 2, 0, 0))
    ratios = {(each.replica_id, each.term): each for each in calibration.ratios}
    for replica_id in dict.fromkeys(each.replica_id for each in calibration.ratios):
        found = (ratios.get((replica_id, term)) for term in Term)
        table.add_row(replica_id, *(f"{each.ratio:.2f} ({each.num_samples})" if each else "-" for each in found))
    return table


def _history(answer: coordinator_pb2.GetPlanResponse) -> Iterable[str]:
    """What is expected, and what became of the plan and why."""
    for each in answer.forecasts:
        error = f"{each.error:.0%} off lately" if each.HasField("error") else "not proven yet"
        used = ", used" if each.used else ""
        yield f"expected by {each.name}: {each.requests_per_s:.3g} requests/s, {error}{used}"
    for change in answer.changes[:MAX_CHANGES]:
        when = time.strftime("%H:%M:%S", time.localtime(change.unix_time_s))
        yield f"{when} epoch {change.plan_epoch} {change.what}: {change.why}"
    if answer.changes or answer.forecasts:
        yield ""


def _rate(measured: Measured) -> str:
    told = _of(measured.num_finished / max(measured.window_s, 1e-9), "/s")
    return f"{told}, {measured.num_failed} failed" if measured.num_failed else told


def _of(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:.3g}{unit}"


def _routes(plan: Plan, gateways: Sequence[GatewayLoad]) -> Table:
    """The plan's flow of each route beside what is measured of it."""
    window_s = together(gateways).window_s
    finished: Counter[RouteKey] = Counter()
    in_flight: Counter[RouteKey] = Counter()
    for gateway in gateways:
        for each in gateway.routes:
            key = (each.prefill_replica_id, each.decode_replica_id)
            finished[key] += each.num_finished
            in_flight[key] += each.num_requests
    table = Table("route", "flow", "measured", "in flight", "KV as", box=None, padding=(0, 2, 0, 0))
    for route in plan.routes[:MAX_ROUTES]:
        prefill, decode = key = (route.prefill_replica_id, route.decode_replica_id)
        name = f"{prefill} alone" if prefill == decode else f"{prefill} → {decode}"
        measured = _of(finished[key] / window_s if window_s else None, "/s")
        codec = "" if prefill == decode else route.codec
        table.add_row(escape(name), f"{route.flow:.3g}", measured, str(in_flight[key]), codec)
    return table
