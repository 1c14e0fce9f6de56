"""``hexgen2 status --watch``: it follows a fleet, outlives its coordinator, and ends when told to."""

import asyncio
import io
import json
import os
import signal

import pytest
from rich.console import Console

from hexgen2.cli.client import get_plan
from hexgen2.cli.watch import Seen, drawn, told, watch_status
from hexgen2.plan import Load, Plan, ReplicaState
from hexgen2.rpc import plan_convert as convert
from hexgen2.v1 import coordinator_pb2 as pb
from tests.coordinator.harness import connected, coordinator, replica
from tests.eventually import eventually

INTERVAL_S = 0.05


async def register(address: str, replica_id: str) -> None:
    request = pb.ReportRequest(
        replica=convert.replica_to_proto(replica(replica_id)),
        state=convert.state_to_proto(ReplicaState.READY),
        load=convert.load_to_proto(Load(3, 2)),
    )
    async with connected(address) as stub:
        await stub.Report(request, timeout=10)


@pytest.mark.parametrize("terminal", [True, False])
async def test_it_follows_the_fleet_waits_for_its_coordinator_and_ends_at_ctrl_c(terminal: bool) -> None:
    text = io.StringIO()
    console = Console(file=text, width=160, height=50, force_terminal=terminal, color_system=None)
    async with coordinator() as address:
        watching = asyncio.create_task(
            watch_status(lambda: get_plan(address, 10.0), console, INTERVAL_S, as_json=False)
        )
        await register(address, "d1")
        await eventually(lambda: "d1" in text.getvalue())
    await eventually(lambda: "coordinator away since" in text.getvalue())
    async with coordinator(address):
        await register(address, "d2")
        await eventually(lambda: "d2" in text.getvalue())
        os.kill(os.getpid(), signal.SIGINT)
        async with asyncio.timeout(20):
            await watching
    # The terminal's own screen is back.
    assert text.getvalue().endswith("\x1b[?25h\x1b[?1049l") is terminal


def test_what_was_said_last_stays_while_the_coordinator_is_away() -> None:
    answer = pb.GetPlanResponse(plan=convert.plan_to_proto(Plan(7, (replica("d[1]"),))))
    answer.statuses.add(replica_id="d[1]", state=convert.state_to_proto(ReplicaState.READY))
    away = Seen(answer).missed(100.0, "nobody answers").missed(200.0, "still nobody")
    assert away.away_since_s == 100.0
    text = io.StringIO()
    Console(file=text, width=160).print(drawn(away, 201.0))
    assert "still nobody" in text.getvalue()
    assert "plan epoch 7" in text.getvalue()
    assert "d[1]" in text.getvalue()
    assert json.loads(told(away, 201.0)) == {"unix_time_s": 201.0, "away_since_s": 100.0, "why": "still nobody"}
    assert json.loads(told(Seen(answer), 201.0))["plan"]["epoch"] == "7"
