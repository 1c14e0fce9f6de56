"""The coordinator over a real socket."""

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import grpc
import pytest
import structlog
from opentelemetry import trace
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from hexgen2.plan import GatewayLoad, Load, Measured, Plan, Replica, ReplicaState, Role, Route, RouteLoad
from hexgen2.rpc import plan_convert as convert
from hexgen2.v1 import coordinator_pb2 as pb
from hexgen2.v1 import types_pb2
from tests.coordinator.harness import connected, coordinator, replica

READY, DRAINING, LOST = ReplicaState.READY, ReplicaState.DRAINING, ReplicaState.LOST


def report(replica: Replica, state: ReplicaState = READY, load: Load | None = None) -> pb.ReportRequest:
    return pb.ReportRequest(
        replica=convert.replica_to_proto(replica),
        state=convert.state_to_proto(state),
        load=convert.load_to_proto(load or Load()),
    )


class Watch:
    def __init__(self, stub: Any) -> None:
        self._call = stub.WatchPlan(pb.WatchPlanRequest())
        self._plan = Plan(0)

    async def next(self) -> Any:
        async with asyncio.timeout(10):
            message = await self._call.read()
        if message is grpc.aio.EOF:
            return await self._call.code()
        statuses = convert.statuses_from_proto(message.statuses)
        if message.HasField("plan"):
            assert message.plan.epoch != self._plan.epoch
            self._plan = convert.plan_from_proto(message.plan)
        return self._plan, {key: status.state for key, status in statuses.items()}


async def test_a_watcher_hears_the_plan_at_once_and_every_change() -> None:
    async with coordinator() as address, connected(address) as stub:
        watch = Watch(stub)
        plan, states = await watch.next()
        assert (plan.epoch, plan.replicas, states) == (100, (), {})

        answer = await stub.Report(report(replica("p1")))
        assert (convert.role_from_proto(answer.role), answer.plan_epoch) == (Role.PREFILL, 101)
        plan, states = await watch.next()
        assert (plan.epoch, states) == (101, {"p1": READY})

        await stub.Report(report(replica("d1")))
        plan, states = await watch.next()
        assert plan.routes == (Route("p1", "d1", 1.0),)
        assert plan.replicas == (replica("d1"), replica("p1"))

        await stub.Report(report(replica("d1"), DRAINING))
        plan, states = await watch.next()
        assert (plan.epoch, states) == (102, {"p1": READY, "d1": DRAINING})

        got = await stub.GetPlan(pb.GetPlanRequest())
        assert convert.plan_from_proto(got.plan) == plan


async def test_loads_are_pushed_no_faster_than_their_interval() -> None:
    async with coordinator(load_interval_s=3600.0) as address, connected(address) as stub:
        await stub.Report(report(replica("p1")))
        watch = Watch(stub)
        await watch.next()
        for running in range(5):
            await stub.Report(report(replica("p1"), load=Load(num_requests_running=running)))
        await stub.Report(report(replica("p1"), DRAINING))
        # The next message is the change of state: the five loads before it were not sent.
        assert (await watch.next())[1] == {"p1": DRAINING}


async def test_a_load_is_pushed_once_its_interval_is_over() -> None:
    async with coordinator(load_interval_s=0.05) as address, connected(address) as stub:
        await stub.Report(report(replica("p1")))
        call = stub.WatchPlan(pb.WatchPlanRequest())
        await call.read()
        await stub.Report(report(replica("p1"), load=Load(num_requests_running=7)))
        async with asyncio.timeout(10):
            message: Any = await call.read()
        assert message.statuses[0].load.num_requests_running == 7
        call.cancel()


async def test_what_gateways_have_in_flight_reaches_every_watcher() -> None:
    seen = GatewayLoad("g1", (RouteLoad("p1", "d1", 3),), Measured(60.0, 9, 8, 1, 100.0, 10.0, 0.5, 0.02))
    async with coordinator() as address, connected(address) as stub:
        call = stub.WatchPlan(pb.WatchPlanRequest())
        await call.read()
        await stub.ReportGateway(pb.ReportGatewayRequest(gateway=convert.gateway_to_proto(seen)))
        async with asyncio.timeout(10):
            message: Any = await call.read()
        assert not message.HasField("plan")
        assert [convert.gateway_from_proto(each) for each in message.gateways] == [seen]
        call.cancel()


async def test_a_worker_that_falls_silent_is_lost_and_its_routes_go() -> None:
    async with coordinator(lost_after_s=0.3) as address, connected(address) as stub:
        await stub.Report(report(replica("p1")))
        await stub.Report(report(replica("d1")))
        watch = Watch(stub)
        plan, states = await watch.next()
        while LOST not in states.values():
            plan, states = await watch.next()
        while set(states.values()) != {LOST}:
            plan, states = await watch.next()
        assert plan.routes == ()
        await stub.Report(report(replica("p1")))
        await stub.Report(report(replica("d1")))
        while not plan.routes:
            plan, states = await watch.next()
        assert states == {"p1": READY, "d1": READY}


@pytest.mark.parametrize(
    ("request_", "details"),
    [
        (pb.ReportRequest(), "replica.role: must be a known role, is 0"),
        (
            pb.ReportRequest(replica=types_pb2.Replica(role=types_pb2.ROLE_DECODE)),
            "state: must be a known state, is 0",
        ),
        (report(replica("d1", address="0.0.0.0:1")), "replica.address: '0.0.0.0:1' is where it listens, not where "),
    ],
)
async def test_a_report_that_says_too_little_is_refused(request_: pb.ReportRequest, details: str) -> None:
    async with coordinator() as address, connected(address) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Report(request_)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert str(caught.value.details()).startswith(details)
        assert not (await stub.GetPlan(pb.GetPlanRequest())).statuses


async def test_an_id_that_is_taken_is_refused_with_what_differs_and_logged_once() -> None:
    async with coordinator() as address, connected(address) as stub:
        await stub.Report(report(replica("d1", address="10.0.0.1:7")))
        with structlog.testing.capture_logs() as logs:
            for _ in range(3):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await stub.Report(report(replica("d1", address="10.0.0.2:7")))
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "'d1' is alive at 10.0.0.1:7, and now also reports from 10.0.0.2:7" in str(caught.value.details())
        assert [entry["event"] for entry in logs] == ["report_refused"]


async def test_the_plan_names_the_span_that_made_it_and_heartbeats_make_none(spans: InMemorySpanExporter) -> None:
    async with coordinator() as address, connected(address) as stub:
        await stub.Report(report(replica("p1")))
        await stub.Report(report(replica("p1")))
        plan = (await stub.GetPlan(pb.GetPlanRequest())).plan
    made = [span for span in spans.get_finished_spans() if span.name != "hexgen2.v1.Coordinator/GetPlan"]
    assert [span.name for span in made] == ["coordinator.plan"]
    context, attributes = made[0].context, made[0].attributes
    assert context is not None
    assert attributes is not None
    assert plan.traceparent.startswith(f"00-{trace.format_trace_id(context.trace_id)}-{context.span_id:016x}-")
    assert attributes["hexgen2.plan.epoch"] == plan.epoch


async def test_watches_end_as_unavailable_when_the_coordinator_stops() -> None:
    async with AsyncExitStack() as running:
        address = await running.enter_async_context(coordinator())
        async with connected(address) as stub:
            call = stub.WatchPlan(pb.WatchPlanRequest())
            await call.read()
            await running.aclose()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert caught.value.details() == "the coordinator is stopping"
