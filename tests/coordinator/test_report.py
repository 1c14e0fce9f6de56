"""Workers and gateways through the life of a coordinator: absent, there, killed, back knowing nobody."""

import asyncio
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import grpc
import pytest
import structlog

from hexgen2.address import held_port
from hexgen2.coordinator.assignment import Assignment
from hexgen2.coordinator.state import FleetState
from hexgen2.errors import Unavailable
from hexgen2.plan import Load, Plan, Prediction, ReplicaState, Role
from hexgen2.rpc import plan_convert as convert
from hexgen2.rpc.report import PlanWatcher, Reporter
from hexgen2.v1 import coordinator_pb2 as pb
from services.coordinator.service import TURN_S, CoordinatorService
from tests.coordinator.harness import connected, coordinator, replica, running

READY, DRAINING, STARTING = ReplicaState.READY, ReplicaState.DRAINING, ReplicaState.STARTING


def worker(address: str, replica_id: str, *, interval_s: float = 0.1, state: ReplicaState = READY) -> Reporter:
    reporter = Reporter(address, replica(replica_id), Load, interval_s)
    reporter.state = state
    return reporter


def states(watcher: PlanWatcher) -> dict[str, ReplicaState]:
    return {key: status.state for key, status in watcher.statuses.items()}


async def until(watcher: PlanWatcher, condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await watcher.changed()


async def true(condition: Callable[[], bool], within_s: float = 20) -> None:
    """For what nothing announces."""
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def free_address() -> str:
    with held_port("127.0.0.1") as port:
        return f"127.0.0.1:{port}"


async def test_a_watcher_is_ready_once_a_route_is() -> None:
    async with coordinator() as address:
        p1, d1 = worker(address, "p1"), worker(address, "d1", state=STARTING)
        watcher = PlanWatcher(address)
        async with running(p1, d1, watcher):
            await until(watcher, lambda: states(watcher) == {"p1": READY, "d1": STARTING})
            assert not watcher.ready
            d1.state = READY
            await watcher.wait_ready(10)
            assert len(watcher.plan.routes) == 1


async def test_a_decode_replica_alone_is_enough() -> None:
    async with coordinator() as address:
        watcher = PlanWatcher(address)
        async with running(worker(address, "d1"), watcher):
            await watcher.wait_ready(10)
            assert watcher.plan.routes == ()


async def test_a_change_of_state_is_reported_at_once() -> None:
    async with coordinator() as address:
        d1, watcher = worker(address, "d1", interval_s=3600), PlanWatcher(address)
        async with running(d1, watcher):
            await watcher.wait_ready(10)
            d1.state = DRAINING
            await until(watcher, lambda: states(watcher) == {"d1": DRAINING})


@pytest.mark.parametrize(
    ("there", "reason"),
    [
        (False, r"no replica can serve after 0\.1 s: coordinator 127\.0\.0\.1:\d+: "),
        (True, r"no replica can serve after 0\.1 s: p1 is ready"),
    ],
)
async def test_waiting_in_vain_says_why(there: bool, reason: str) -> None:
    async with coordinator() as address:
        watcher = PlanWatcher(address if there else free_address())
        async with running(worker(address, "p1"), watcher):
            if there:
                await until(watcher, lambda: states(watcher) == {"p1": READY})
            with pytest.raises(Unavailable, match=reason):
                await watcher.wait_ready(0.1)


async def test_reports_survive_a_coordinator_that_comes_late_and_are_logged_by_change() -> None:
    address = free_address()
    d1, watcher = worker(address, "d1"), PlanWatcher(address)
    with structlog.testing.capture_logs() as logs:
        async with running(d1, watcher):
            await true(lambda: {entry["event"] for entry in logs} == {"report_failed", "coordinator_away"})
            async with coordinator(address):
                await watcher.wait_ready(20)
    about = [e["event"] for e in logs if e.get("coordinator")]
    assert sorted(about[:4]) == ["coordinator_away", "coordinator_reached", "coordinator_reached", "report_failed"]


async def test_a_second_worker_of_the_same_id_is_refused_and_says_so_once() -> None:
    async with coordinator() as address:
        first, watcher = worker(address, "d1"), PlanWatcher(address)
        second = Reporter(address, replica("d1", address="127.0.0.1:9", incarnation="second"), Load, 0.01)
        async with running(first, watcher):
            await watcher.wait_ready(10)
            with structlog.testing.capture_logs() as logs:
                async with running(second):
                    await true(lambda: any(entry["event"] == "report_failed" for entry in logs))
                    # Several more reports pass.
                    for _ in range(5):
                        await watcher_turn(address)
            assert [e["event"] for e in logs].count("report_failed") == 1
            assert watcher.plan.replicas == (replica("d1"),)


async def watcher_turn(address: str) -> None:
    async with connected(address) as stub:
        await stub.GetPlan(pb.GetPlanRequest())


# A coordinator that restarts


async def test_an_empty_plan_does_not_wipe_a_working_one() -> None:
    address = free_address()
    watcher = PlanWatcher(address, settle_s=3600)
    async with running(watcher):
        async with coordinator(address), running(worker(address, "p1"), worker(address, "d1")):
            await until(watcher, lambda: len(watcher.plan.routes) == 1)
            held = watcher.plan
        async with coordinator(address, epoch=1000):
            await true(lambda: watcher.holding)
            assert watcher.plan == held
            assert watcher.ready
            # One of two is not enough to give up the other.
            async with running(worker(address, "p1")):
                await until_known(address, {"p1"})
                assert watcher.plan == held
                async with running(worker(address, "d1")):
                    await until(watcher, lambda: watcher.plan.epoch > 1000)
    assert len(watcher.plan.routes) == 1


async def test_who_does_not_come_back_is_given_up_after_the_settling_time() -> None:
    address = free_address()
    watcher = PlanWatcher(address, settle_s=0.2)
    async with running(watcher):
        async with coordinator(address), running(worker(address, "p1"), worker(address, "d1")):
            await watcher.wait_ready(10)
        async with coordinator(address, epoch=1000):
            await until(watcher, lambda: watcher.plan == Plan(1000))
            assert not watcher.ready


async def test_a_replica_that_the_new_coordinator_knows_as_lost_is_given_up_at_once() -> None:
    address = free_address()
    watcher = PlanWatcher(address, settle_s=3600)
    async with running(watcher):
        async with coordinator(address), running(worker(address, "d1"), worker(address, "d2")):
            await until(watcher, lambda: states(watcher) == {"d1": READY, "d2": READY})
        async with coordinator(address, epoch=1000, lost_after_s=0.5), running(worker(address, "d1")):
            async with running(worker(address, "d2")):
                await until(watcher, lambda: watcher.plan.epoch > 1000)
            await until(watcher, lambda: states(watcher) == {"d1": READY, "d2": ReplicaState.LOST})


async def until_known(address: str, ids: set[str]) -> None:
    async with connected(address) as stub, asyncio.timeout(20):
        async for message in stub.WatchPlan(pb.WatchPlanRequest()):
            if {status.replica_id for status in message.statuses} == ids:
                return


# The real process


class Process:
    """``python -m services.coordinator`` and what it logs."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.events: list[Mapping[str, Any]] = []

    async def event(self, name: str) -> Mapping[str, Any]:
        assert self._process.stderr is not None
        async with asyncio.timeout(60):
            async for line in self._process.stderr:
                self.events.append(json.loads(line))
                if self.events[-1]["event"] == name:
                    return self.events[-1]
        raise AssertionError(f"ended without {name!r}: {self.events}")

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    async def end(self, number: signal.Signals) -> int:
        self._process.send_signal(number)
        async with asyncio.timeout(20):
            return await self._process.wait()


@asynccontextmanager
async def process(
    home: Path, listen: str = "127.0.0.1:0", lost_after_s: float = 5.0, *flags: str
) -> AsyncIterator[Process]:
    started = await asyncio.create_subprocess_exec(
        *(
            sys.executable,
            "-m",
            "services.coordinator",
            "--listen",
            listen,
            "--lost-after-s",
            str(lost_after_s),
            *flags,
        ),
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | {"HEXGEN2_HOME": str(home)},
    )
    try:
        yield Process(started)
    finally:
        if started.returncode is None:
            started.kill()
            await started.wait()


async def test_a_gateway_never_notices_a_coordinator_that_is_killed_and_comes_back(tmp_path: Path) -> None:
    watched: list[bool] = []
    async with process(tmp_path) as first:
        address = str((await first.event("ready"))["address"])
        watcher = PlanWatcher(address)
        workers = worker(address, "p1"), worker(address, "d1")
        async with running(watcher, *workers):
            await until(watcher, lambda: states(watcher) == {"p1": READY, "d1": READY})
            before = watcher.plan
            listening = asyncio.create_task(record(watcher, watched))
            assert await first.end(signal.SIGKILL) == -signal.SIGKILL
            async with process(tmp_path, address) as second:
                assert (await second.event("ready"))["plan_epoch"] > before.epoch
                await until(watcher, lambda: watcher.plan.epoch > before.epoch)
                assert watcher.plan.replicas == before.replicas
                assert watcher.plan.routes == before.routes
                assert watched
                assert all(watched)
                assert await second.end(signal.SIGTERM) == 0
            assert watcher.ready
            listening.cancel()


async def test_a_coordinator_that_comes_back_goes_on_with_its_plan_and_epoch(tmp_path: Path) -> None:
    state_file = ("--state-file", str(tmp_path / "state.db"))
    async with process(tmp_path, "127.0.0.1:0", 5.0, *state_file) as first:
        address = str((await first.event("ready"))["address"])
        watcher, workers = PlanWatcher(address), (worker(address, "p1"), worker(address, "d1"))
        async with running(watcher, *workers):
            await until(watcher, lambda: states(watcher) == {"p1": READY, "d1": READY} and bool(watcher.plan.routes))
            before = watcher.plan
            assert await first.end(signal.SIGKILL) == -signal.SIGKILL
            # Changes that nobody hears of while it is away come out by themselves.
            workers[1].state = DRAINING
            async with process(tmp_path, address, 5.0, *state_file) as second:
                assert (await second.event("state"))["restored"] is True
                assert (await second.event("ready"))["plan_epoch"] == before.epoch
                await until(watcher, lambda: states(watcher) == {"p1": READY, "d1": DRAINING})
                assert watcher.plan == before
                assert not watcher.holding


async def test_a_worker_that_stops_is_gone_at_once_and_nobody_calls_it_lost() -> None:
    async with coordinator(lost_after_s=3600) as address:
        p1, d1, watcher = worker(address, "p1"), worker(address, "d1", interval_s=3600), PlanWatcher(address)
        async with running(p1, watcher):
            reporting = asyncio.create_task(d1.run())
            await until(watcher, lambda: states(watcher) == {"p1": READY, "d1": READY})
            with structlog.testing.capture_logs() as logs:
                d1.state = DRAINING
                await until(watcher, lambda: states(watcher)["d1"] is DRAINING)
                d1.reason, d1.state = "it was stopped", ReplicaState.STOPPED
                await until(watcher, lambda: states(watcher) == {"p1": READY})
                async with asyncio.timeout(10):
                    await reporting
            told = [(e["state"], e.get("reason")) for e in logs if e["event"] == "replica" and e["replica"] == "d1"]
            assert told == [("draining", None), ("stopped", "it was stopped")]


async def test_a_flexible_worker_takes_the_role_that_the_plan_gives_it() -> None:
    heard: list[tuple[Role, int]] = []
    async with coordinator() as address:
        flexible = replica("w1", flexible=True, role=Role.COLOCATED)
        w1 = Reporter(address, flexible, Load, 0.05, on_role=lambda role, epoch: heard.append((role, epoch)))
        w1.state = READY
        watcher = PlanWatcher(address)
        async with running(w1, watcher):
            await until(watcher, lambda: len(watcher.plan.routes) == 1)
            assert heard == []
    first = watcher.plan
    given = Assignment(MappingProxyType({"w1": Role.DECODE}), (), Prediction(1.0, 1.0, 1.0, None, 0.1))
    async with coordinator(epoch=first.epoch, assignment=given) as address:
        w1 = Reporter(address, flexible, Load, 0.05, on_role=lambda role, epoch: heard.append((role, epoch)))
        async with running(w1):
            await true(lambda: bool(heard))
    assert heard == [(Role.DECODE, first.epoch + 1)]
    assert w1.replica.role is Role.DECODE


async def test_clocks_apart_are_refused_with_by_how_much() -> None:
    async with coordinator() as address, connected(address) as stub:
        request = pb.ReportRequest(
            replica=convert.replica_to_proto(replica("p1")),
            state=convert.state_to_proto(READY),
            unix_time_s=time.time() + 90,
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Report(request)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "the clock of replica 'p1' is 90 s ahead of the coordinator's, more than 30 s" in str(caught.value.details())


async def record(watcher: PlanWatcher, watched: list[bool]) -> None:
    """Whether the gateway could serve, at every change that it saw."""
    while True:
        await watcher.changed()
        watched.append(watcher.ready)


@pytest.mark.slow
async def test_a_coordinator_that_falls_silent_is_noticed_by_keepalive(tmp_path: Path) -> None:
    async with process(tmp_path) as silent:
        address = str((await silent.event("ready"))["address"])
        watcher = PlanWatcher(address)
        with structlog.testing.capture_logs() as logs:
            async with running(watcher):
                await watcher.changed()
                silent.send(signal.SIGSTOP)
                # A ping after 10 s, its answer awaited for 5 s; gRPC's own default would be 70.
                await true(lambda: any(entry["event"] == "coordinator_away" for entry in logs), within_s=40)


async def test_a_stalled_coordinator_does_not_take_its_workers_for_dead(tmp_path: Path) -> None:
    lost_after_s = 3.0
    async with process(tmp_path, lost_after_s=lost_after_s) as stalled:
        address = str((await stalled.event("ready"))["address"])
        watcher = PlanWatcher(address)
        seen: list[dict[str, ReplicaState]] = []
        async with running(watcher, worker(address, "d1")):
            await until(watcher, lambda: states(watcher) == {"d1": READY})
            stalled.send(signal.SIGSTOP)
            # Longer than lost_after_s; nothing but time can bring this about.
            await asyncio.sleep(lost_after_s + 2)
            stalled.send(signal.SIGCONT)
            await stalled.event("stalled")
            async with connected(address) as stub:
                got = await stub.GetPlan(pb.GetPlanRequest())
                seen.append({s.replica_id: s.state for s in map(convert.status_from_proto, got.statuses)})
    assert seen == [{"d1": READY}]


async def test_a_coordinator_that_stalls_before_it_first_looks_takes_nobody_for_dead() -> None:
    now_s = [100.0]
    service = CoordinatorService(FleetState(100, lost_after_s=3.0), lambda: now_s[0])
    expiry = asyncio.create_task(service.run_expiry())
    await asyncio.sleep(0)
    d1 = convert.replica_to_proto(replica("d1"))
    await service.Report(pb.ReportRequest(replica=d1, state=convert.state_to_proto(READY)), None)
    # The process stops before anything else has run.
    now_s[0] += 5
    await asyncio.sleep(TURN_S * 2)
    expiry.cancel()
    assert [status.state for status in service.statuses] == [READY]


async def test_a_port_in_use_ends_the_process_with_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "services.coordinator", "--listen", listen),
            stderr=asyncio.subprocess.PIPE,
            env=os.environ | {"HEXGEN2_HOME": str(tmp_path)},
        )
        async with asyncio.timeout(60):
            _, stderr = await process.communicate()
    assert process.returncode == 2
    assert stderr.decode() == (
        f"error: {listen} is in use: stop the process that listens there, or choose another port\n"
    )
