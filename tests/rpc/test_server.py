"""The server over real sockets: what clients see, and that nothing outlives its call."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any, cast

import grpc
import pytest
import structlog
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from hexgen2.errors import ConfigError, DeadlineExceeded, HexgenError, InvalidRequest, ModelNotFound, Overloaded
from hexgen2.rpc import client as client_module
from hexgen2.rpc import server as server_module
from hexgen2.rpc.client import channel, to_error
from hexgen2.rpc.server import GrpcServer
from hexgen2.v1 import coordinator_pb2, coordinator_pb2_grpc, types_pb2

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
REQUEST = coordinator_pb2.GetPlanRequest()
WATCH = coordinator_pb2.WatchPlanRequest()
EMPTY = coordinator_pb2.WatchPlanResponse()


def raising(error: Exception) -> Callable[[Any], Awaitable[coordinator_pb2.GetPlanResponse]]:
    async def unary(context: Any) -> coordinator_pb2.GetPlanResponse:
        raise error

    return unary


async def failure(call: Awaitable[object]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


@pytest.mark.parametrize(
    "raised",
    [
        InvalidRequest("sampling.top_p", "2.0 is not in (0, 1]"),
        ModelNotFound("no model 'gpt-5' here; served: 'smollm2'"),
        Overloaded("256 requests wait already", retry_after_s=2.5),
        DeadlineExceeded("prefill queue: 3.0 s passed"),
    ],
)
async def test_an_error_of_ours_arrives_as_it_was_raised(service: Any, stub: Any, raised: HexgenError) -> None:
    service.unary = raising(raised)
    error = await failure(stub.GetPlan(REQUEST))
    assert error.code().name == raised.status
    again = to_error(error)
    assert (type(again), str(again), vars(again)) == (type(raised), str(raised), vars(raised))


async def test_a_call_that_is_silent_for_long_goes_on(service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keepalive pings must not look like a flood to the server. At a tenth of all times: 80 s of silence."""

    def tenth(options: tuple[tuple[str, int], ...]) -> tuple[tuple[str, int], ...]:
        return tuple((name, value // 10 if name.endswith("_ms") else value) for name, value in options)

    for module in (client_module, server_module):
        monkeypatch.setattr(module, "_OPTIONS", tenth(module._OPTIONS))

    async def unary(context: Any) -> coordinator_pb2.GetPlanResponse:
        await asyncio.sleep(8.0)
        return coordinator_pb2.GetPlanResponse()

    service.unary = unary
    server = GrpcServer("127.0.0.1:0")
    server.add(coordinator_pb2_grpc.add_CoordinatorServicer_to_server, service, "hexgen2.v1.Coordinator")
    address = await server.start()
    try:
        async with channel(address) as peer:
            await coordinator_pb2_grpc.CoordinatorStub(peer).GetPlan(REQUEST)
    finally:
        await server.stop(0)


async def test_of_too_many_connections_the_last_are_closed(service: Any) -> None:
    async def unary(context: Any) -> coordinator_pb2.GetPlanResponse:
        return coordinator_pb2.GetPlanResponse()

    service.unary = unary
    server = GrpcServer("127.0.0.1:0", max_connections=2)
    server.add(coordinator_pb2_grpc.add_CoordinatorServicer_to_server, service, "hexgen2.v1.Coordinator")
    host, port = (await server.start()).split(":")
    try:
        ours = [await asyncio.open_connection(host, port) for _ in range(2)]
        for reader, _ in ours:
            assert await asyncio.wait_for(reader.read(1), 30), "a server says its settings first"
        refused, writer = await asyncio.open_connection(host, port)
        with suppress(ConnectionError):
            assert not await asyncio.wait_for(refused.read(1), 30)
        for each in (writer, *(writer for _, writer in ours)):
            each.close()
        async with channel(f"{host}:{port}") as peer:
            await coordinator_pb2_grpc.CoordinatorStub(peer).GetPlan(REQUEST, wait_for_ready=True, timeout=30)
    finally:
        await server.stop(0)


async def test_overload_says_in_trailing_metadata_when_to_come_back(service: Any, stub: Any) -> None:
    service.unary = raising(Overloaded("full", retry_after_s=2.5))
    error = await failure(stub.GetPlan(REQUEST))
    assert dict(error.trailing_metadata())["retry-after-s"] == "2.5"


async def test_an_error_of_ours_out_of_a_task_group_keeps_its_status(service: Any, stub: Any) -> None:
    service.unary = raising(ExceptionGroup("two", [ModelNotFound("a"), ModelNotFound("b")]))
    assert (await failure(stub.GetPlan(REQUEST))).code() is grpc.StatusCode.NOT_FOUND


async def test_a_bug_is_internal_without_its_traceback_and_logged_once(
    service: Any, stub: Any, caplog: pytest.LogCaptureFixture
) -> None:
    service.unary = raising(KeyError("secret-of-the-server"))
    with structlog.testing.capture_logs() as logs:
        error = await failure(stub.GetPlan(REQUEST))
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in str(error.details())
    assert [entry["event"] for entry in logs] == ["call_failed"]
    assert isinstance(logs[0]["exc_info"], KeyError)
    assert caplog.records == []


async def test_a_handler_that_cancels_itself_is_a_bug_not_a_hang(service: Any, stub: Any) -> None:
    service.unary = raising(asyncio.CancelledError())  # type: ignore[arg-type]
    error = await failure(stub.GetPlan(REQUEST, timeout=10))
    assert error.code() is grpc.StatusCode.INTERNAL


async def test_an_error_in_mid_stream_follows_what_was_sent(service: Any, stub: Any) -> None:
    async def stream(context: Any) -> AsyncIterator[coordinator_pb2.WatchPlanResponse]:
        yield EMPTY
        raise ModelNotFound("gone")

    service.stream = stream
    call = stub.WatchPlan(WATCH)
    assert await call.read() == EMPTY
    assert (await failure(call.read())).code() is grpc.StatusCode.NOT_FOUND


class Recorder:
    """A stream handler that says how it ended."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.ended: asyncio.Future[tuple[str, bool]] = asyncio.get_running_loop().create_future()

    async def waiting(self, context: Any) -> AsyncIterator[coordinator_pb2.WatchPlanResponse]:
        task = asyncio.current_task()
        try:
            yield EMPTY
            self.started.set()
            await asyncio.Event().wait()
        except BaseException as error:
            self.ended.set_result((type(error).__name__, asyncio.current_task() is task))
            raise

    async def flooding(self, context: Any) -> AsyncIterator[coordinator_pb2.WatchPlanResponse]:
        task = asyncio.current_task()
        try:
            for _ in range(1_000_000):
                yield coordinator_pb2.WatchPlanResponse(plan=types_pb2.Plan(traceparent="x" * 100_000))
                self.started.set()
        except BaseException as error:
            self.ended.set_result((type(error).__name__, asyncio.current_task() is task))
            raise


@pytest.mark.parametrize(("kind", "ends_with"), [("waiting", "CancelledError"), ("flooding", "GeneratorExit")])
async def test_a_client_that_leaves_in_mid_stream_ends_the_handler_in_its_own_task(
    service: Any, stub: Any, kind: str, ends_with: str
) -> None:
    recorder = Recorder()
    service.stream = getattr(recorder, kind)
    call = stub.WatchPlan(WATCH)
    await call.read()
    await recorder.started.wait()
    call.cancel()
    async with asyncio.timeout(5):
        assert await recorder.ended == (ends_with, True)


async def test_the_clients_deadline_ends_the_handler(service: Any, stub: Any) -> None:
    recorder = Recorder()
    service.stream = recorder.waiting
    call = stub.WatchPlan(WATCH, timeout=2.0)
    await call.read()
    assert (await failure(call.read())).code() is grpc.StatusCode.DEADLINE_EXCEEDED
    async with asyncio.timeout(5):
        assert await recorder.ended == ("CancelledError", True)


async def test_the_handler_sees_the_deadline(service: Any, stub: Any) -> None:
    async def unary(context: Any) -> coordinator_pb2.GetPlanResponse:
        assert 0 < context.time_remaining() < 31
        return coordinator_pb2.GetPlanResponse()

    service.unary = unary
    await stub.GetPlan(REQUEST, timeout=30)


async def test_a_large_message_passes_and_one_beyond_the_limit_does_not(service: Any, stub: Any) -> None:
    async def unary(context: Any) -> coordinator_pb2.GetPlanResponse:
        return coordinator_pb2.GetPlanResponse(plan=types_pb2.Plan(traceparent="x" * size))

    service.unary = unary
    size = 32 << 20
    assert len((await stub.GetPlan(REQUEST)).plan.traceparent) == size
    size = 65 << 20
    assert (await failure(stub.GetPlan(REQUEST))).code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_method_that_nobody_serves_is_unimplemented(peer: grpc.aio.Channel) -> None:
    call: Any = peer.unary_unary("/hexgen2.v1.Coordinator/Nothing")
    assert (await failure(call(b""))).code() is grpc.StatusCode.UNIMPLEMENTED


# Health


def health_of(peer: grpc.aio.Channel) -> Any:
    return health_pb2_grpc.HealthStub(cast("Any", peer))


async def check(peer: grpc.aio.Channel, name: str) -> Any:
    return (await health_of(peer).Check(health_pb2.HealthCheckRequest(service=name))).status


async def health_turns(peer: grpc.aio.Channel, status: Any) -> None:
    watch = health_of(peer).Watch(health_pb2.HealthCheckRequest())
    async with asyncio.timeout(10):
        while (await watch.read()).status != status:
            pass
    watch.cancel()


async def test_health_follows_set_serving_per_service_and_overall(server: GrpcServer) -> None:
    async with channel(await server.start()) as peer:
        for serving, status in ((None, NOT_SERVING), (True, SERVING), (False, NOT_SERVING)):
            if serving is not None:
                await server.set_serving(serving)
            assert [await check(peer, name) for name in ("", "hexgen2.v1.Coordinator")] == [status, status]
        error = await failure(check(peer, "hexgen2.v1.Nothing"))
        assert error.code() is grpc.StatusCode.NOT_FOUND


async def test_a_health_watch_sees_the_stop_and_does_not_hold_it_up(
    server: GrpcServer, service: Any, address: str, peer: grpc.aio.Channel
) -> None:
    watch = health_of(peer).Watch(health_pb2.HealthCheckRequest())
    assert (await watch.read()).status == SERVING
    async with asyncio.timeout(10):
        await server.stop(600)
        assert (await watch.read()).status == NOT_SERVING


# Reflection


async def ask(peer: grpc.aio.Channel, **request: Any) -> Any:
    stub: Any = cast("Any", reflection_pb2_grpc).ServerReflectionStub(peer)
    return await stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(**request)])).read()


async def test_reflection_lists_every_service(peer: grpc.aio.Channel) -> None:
    answer = await ask(peer, list_services="")
    assert {each.name for each in answer.list_services_response.service} == {
        "hexgen2.v1.Coordinator",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }


async def test_a_call_can_be_made_knowing_nothing_but_reflection(service: Any, peer: grpc.aio.Channel) -> None:
    async def unary(context: Any) -> coordinator_pb2.GetPlanResponse:
        return coordinator_pb2.GetPlanResponse(plan=types_pb2.Plan(epoch=7))

    service.unary = unary
    pool = descriptor_pool.DescriptorPool()

    async def learn(**request: Any) -> None:
        answer = await ask(peer, **request)
        for data in answer.file_descriptor_response.file_descriptor_proto:
            file = descriptor_pb2.FileDescriptorProto.FromString(data)
            for name in file.dependency:
                await learn(file_by_filename=name)
            pool.AddSerializedFile(data)

    await learn(file_containing_symbol="hexgen2.v1.Coordinator")
    method = pool.FindServiceByName("hexgen2.v1.Coordinator").FindMethodByName("GetPlan")
    Request, Response = (message_factory.GetMessageClass(each) for each in (method.input_type, method.output_type))
    call: Any = peer.unary_unary(
        "/hexgen2.v1.Coordinator/GetPlan",
        request_serializer=Request.SerializeToString,
        response_deserializer=Response.FromString,
    )
    assert (await call(Request())).plan.epoch == 7


# Stop


async def test_a_stop_lets_a_running_call_finish_and_refuses_a_new_one(
    server: GrpcServer, service: Any, stub: Any, peer: grpc.aio.Channel
) -> None:
    entered, leave = asyncio.Event(), asyncio.Event()

    async def unary(context: Any) -> coordinator_pb2.GetPlanResponse:
        entered.set()
        await leave.wait()
        return coordinator_pb2.GetPlanResponse(plan=types_pb2.Plan(epoch=7))

    service.unary = unary
    running = asyncio.ensure_future(stub.GetPlan(REQUEST))
    await entered.wait()
    stopping = asyncio.create_task(server.stop(600))
    await health_turns(peer, NOT_SERVING)
    error = await failure(stub.GetPlan(REQUEST))
    assert (error.code(), error.details()) == (grpc.StatusCode.UNAVAILABLE, "this server is stopping")
    leave.set()
    async with asyncio.timeout(10):
        assert (await running).plan.epoch == 7
        await stopping


async def test_a_call_that_outlasts_the_grace_is_cancelled(server: GrpcServer, service: Any, stub: Any) -> None:
    recorder = Recorder()
    service.stream = recorder.waiting
    call = stub.WatchPlan(WATCH)
    await call.read()
    await recorder.started.wait()
    await server.stop(0.05)
    assert await recorder.ended == ("CancelledError", True)
    assert (await failure(call.read())).code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


async def test_a_second_stop_shortens_the_first(server: GrpcServer, service: Any, stub: Any) -> None:
    recorder = Recorder()
    service.stream = recorder.waiting
    call = stub.WatchPlan(WATCH)
    await call.read()
    await recorder.started.wait()
    async with asyncio.timeout(10):
        await asyncio.gather(server.stop(600), server.stop(600), server.stop(0), server.stop(0))
        await server.stop(0)
    assert await recorder.ended == ("CancelledError", True)


# Address


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_a_port_in_use_is_said_in_one_line(host: str, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        listen = f"{host}:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError) as caught:
            await GrpcServer(listen).start()
    assert str(caught.value) == f"{listen} is in use: stop the process that listens there, or choose another port"
    assert capfd.readouterr().err == ""


async def test_two_servers_never_share_a_port(address: str) -> None:
    with pytest.raises(ConfigError, match="is in use"):
        await GrpcServer(address).start()


@pytest.mark.parametrize(
    ("listen", "message"),
    [
        ("50051", "listen: '50051' is not host:port"),
        ("127.0.0.1:http", "listen: '127.0.0.1:http' is not host:port"),
        ("127.0.0.1:70000", "listen: port 70000 is above 65535"),
        ("::1:50051", "listen: '::1:50051' is not host:port (an IPv6 address goes in brackets)"),
        ("192.0.2.1:50051", "listen: '192.0.2.1' is not an address of this machine"),
    ],
)
async def test_an_address_that_cannot_be_bound_is_explained(listen: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        await GrpcServer(listen).start()
    assert str(caught.value) == message


async def test_the_trailing_name_of_an_error_that_is_not_ours_is_ignored() -> None:
    error = grpc.aio.AioRpcError(
        grpc.StatusCode.NOT_FOUND,
        grpc.aio.Metadata(),
        grpc.aio.Metadata(("hexgen2-error", "Exception"), ("retry-after-s", "soon")),
        "nothing",
    )
    assert type(to_error(error)).__name__ == "TransferNotFound"
