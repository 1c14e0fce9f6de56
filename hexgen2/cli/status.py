"""``hexgen2 status``: the plan, and what every replica is doing, as the coordinator knows it."""

import json

from google.protobuf.json_format import MessageToDict
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from hexgen2.cli.client import Access, get_plan
from hexgen2.plan import ReplicaState
from hexgen2.rpc.plan_convert import plan_from_proto, status_from_proto

_STYLES = {ReplicaState.READY: "green", ReplicaState.LOST: "red"}


async def show_status(address: str, timeout_s: float, access: Access, console: Console, *, as_json: bool) -> None:
    """The command. Raises HexgenError."""
    answer = await get_plan(address, timeout_s, access)
    if as_json:
        print(
            json.dumps(
                MessageToDict(answer, preserving_proto_field_name=True, always_print_fields_with_no_presence=True),
                indent=2,
            )
        )
        return
    plan = plan_from_proto(answer.plan)
    statuses = {status.replica_id: status for status in map(status_from_proto, answer.statuses)}
    table = Table(
        "replica", "state", "running", "waiting", "KV memory used", "model", "address", box=None, padding=(0, 2, 0, 0)
    )
    for replica in plan.replicas:
        status = statuses.get(replica.replica_id)
        if status is None:
            continue
        load = status.load
        table.add_row(
            replica.replica_id,
            f"[{_STYLES.get(status.state, 'yellow')}]{status.state}",
            str(load.num_requests_running),
            str(load.num_requests_waiting),
            f"{decimal(load.kv_pool_bytes_used)} of {decimal(load.kv_pool_bytes_total)}",
            replica.model,
            replica.address,
        )
    console.print(f"plan epoch {plan.epoch}, {len(plan.replicas)} replicas, {len(plan.routes)} routes", highlight=False)
    console.print(table)
    console.print()
    for replica in plan.replicas:
        console.print(f"{replica.replica_id}: KV by {replica.transport}", highlight=False, soft_wrap=True)
    for route in plan.routes:
        console.print(f"{route.prefill_replica_id} → {route.decode_replica_id}   flow {route.flow:g}", highlight=False)
