"""Spans and log context of a call."""

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from hexgen2.errors import ModelNotFound
from hexgen2.rpc.client import channel, trace_metadata, traceparent
from hexgen2.rpc.interceptors import ServerInterceptor
from hexgen2.rpc.server import GrpcServer
from hexgen2.v1 import coordinator_pb2, coordinator_pb2_grpc, decode_pb2, decode_pb2_grpc, types_pb2

REQUEST = coordinator_pb2.GetPlanRequest()
WATCH = coordinator_pb2.WatchPlanRequest()


def server_spans(spans: InMemorySpanExporter) -> list[ReadableSpan]:
    return [span for span in spans.get_finished_spans() if span.kind is SpanKind.SERVER]


async def ok(context: Any) -> coordinator_pb2.GetPlanResponse:
    return coordinator_pb2.GetPlanResponse()


async def test_a_call_is_a_span_of_the_callers_trace(spans: InMemorySpanExporter, service: Any, stub: Any) -> None:
    service.unary = ok
    with trace.get_tracer("test").start_as_current_span("caller") as caller:
        await stub.GetPlan(REQUEST, metadata=trace_metadata())
    (span,) = server_spans(spans)
    assert span.name == "hexgen2.v1.Coordinator/GetPlan"
    assert span.parent is not None
    assert span.parent.span_id == caller.get_span_context().span_id
    assert span.context is not None
    assert span.context.trace_id == caller.get_span_context().trace_id
    assert span.attributes == {
        "rpc.system": "grpc",
        "rpc.service": "hexgen2.v1.Coordinator",
        "rpc.method": "GetPlan",
        "rpc.grpc.status_code": 0,
    }
    assert span.status.status_code is StatusCode.UNSET


async def test_an_error_is_on_its_span(
    spans: InMemorySpanExporter, service: Any, stub: Any, server: GrpcServer
) -> None:
    async def unary(context: Any) -> coordinator_pb2.GetPlanResponse:
        raise ModelNotFound("no model 'x' here")

    service.unary = unary
    with pytest.raises(grpc.aio.AioRpcError):
        await stub.GetPlan(REQUEST)
    # The caller is told of an error while its span is still open.
    await server.stop(5)
    (span,) = server_spans(spans)
    assert span.attributes is not None
    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, "no model 'x' here")
    assert span.attributes["error.type"] == "ModelNotFound"
    assert span.attributes["rpc.grpc.status_code"] == grpc.StatusCode.NOT_FOUND.value[0]


class BrokenConnection:
    """A call whose caller was killed: what gRPC does before it has noticed."""

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()

    async def write(self, response: Any) -> None:
        raise grpc.aio.InternalError('Failed "execute_batch"')

    async def abort(self, code: grpc.StatusCode, details: str, trailing: Any) -> None:
        raise grpc.aio.InternalError('Failed "execute_batch"')


@pytest.mark.parametrize("fails", [False, True])
async def test_a_connection_that_breaks_within_a_message_or_an_error_is_a_cancellation(
    spans: InMemorySpanExporter, caplog: pytest.LogCaptureFixture, fails: bool
) -> None:
    async def stream(request: Any, context: Any) -> AsyncIterator[coordinator_pb2.WatchPlanResponse]:
        if fails:
            raise ModelNotFound("no model 'x' here")
        yield coordinator_pb2.WatchPlanResponse()

    async def continuation(details: Any) -> Any:
        return grpc.unary_stream_rpc_method_handler(stream)

    details = SimpleNamespace(method="/hexgen2.v1.Coordinator/WatchPlan")
    handler: Any = await ServerInterceptor().intercept_service(continuation, details)
    with pytest.raises(asyncio.CancelledError):
        await handler.unary_stream(WATCH, BrokenConnection())
    (span,) = server_spans(spans)
    assert span.attributes is not None
    assert span.attributes.get("rpc.cancelled", False) is not fails
    assert span.status.status_code is (StatusCode.ERROR if fails else StatusCode.UNSET)
    assert "call_failed" not in caplog.text


@pytest.mark.parametrize("flood", [False, True])
async def test_a_cancelled_stream_ends_its_spans_without_an_error(
    spans: InMemorySpanExporter,
    service: Any,
    stub: Any,
    server: GrpcServer,
    flood: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def stream(context: Any) -> AsyncIterator[coordinator_pb2.WatchPlanResponse]:
        with trace.get_tracer("test").start_as_current_span("inside"):
            yield coordinator_pb2.WatchPlanResponse()
            while flood:
                yield coordinator_pb2.WatchPlanResponse(plan=types_pb2.Plan(traceparent="x" * 100_000))
            await asyncio.Event().wait()

    service.stream = stream
    call = stub.WatchPlan(WATCH)
    await call.read()
    call.cancel()
    async with asyncio.timeout(5):
        await server.stop(5)
    inside, outside = spans.get_finished_spans()
    assert (inside.name, outside.kind) == ("inside", SpanKind.SERVER)
    assert inside.parent is not None
    assert outside.context is not None
    assert inside.parent.span_id == outside.context.span_id
    assert outside.status.status_code is StatusCode.UNSET
    assert outside.attributes is not None
    assert outside.attributes["rpc.cancelled"] is True
    # "Failed to detach context" would be logged by OpenTelemetry had the generator been closed elsewhere.
    assert caplog.records == []


async def test_health_reflection_and_untraced_methods_make_no_span(spans: InMemorySpanExporter, service: Any) -> None:
    service.unary = ok
    server = GrpcServer("127.0.0.1:0", untraced=frozenset({"/hexgen2.v1.Coordinator/Report"}))
    server.add(coordinator_pb2_grpc.add_CoordinatorServicer_to_server, service, "hexgen2.v1.Coordinator")
    try:
        async with channel(await server.start()) as peer:
            health: Any = health_pb2_grpc.HealthStub(peer)
            await health.Check(health_pb2.HealthCheckRequest())
            await coordinator_pb2_grpc.CoordinatorStub(peer).Report(coordinator_pb2.ReportRequest())
    finally:
        await server.stop(0)
    assert spans.get_finished_spans() == ()


class Decode(decode_pb2_grpc.DecodeServicer):
    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}

    async def Decode(self, request: Any, context: Any) -> AsyncIterator[decode_pb2.DecodeResponse]:
        self.seen = structlog.contextvars.get_contextvars()
        yield decode_pb2.DecodeResponse()


async def test_logs_of_a_call_carry_its_request_id_and_no_other_calls(spans: InMemorySpanExporter) -> None:
    servicer = Decode()
    server = GrpcServer("127.0.0.1:0")
    server.add(decode_pb2_grpc.add_DecodeServicer_to_server, servicer, "hexgen2.v1.Decode")
    try:
        async with channel(await server.start()) as peer:
            stub = decode_pb2_grpc.DecodeStub(peer)
            for request_id, expected in (("r1", {"request_id": "r1"}), ("", {})):
                async for _ in stub.Decode(decode_pb2.DecodeRequest(request_id=request_id)):
                    assert servicer.seen == expected
    finally:
        await server.stop(0)
    assert [span.attributes.get("hexgen2.request_id") for span in server_spans(spans) if span.attributes] == [
        "r1",
        None,
    ]


def test_without_a_span_there_is_no_context_to_send() -> None:
    assert (trace_metadata(), traceparent()) == ((), "")


def test_the_current_span_is_sent_as_w3c_traceparent(spans: InMemorySpanExporter) -> None:
    with trace.get_tracer("test").start_as_current_span("caller") as span:
        context = span.get_span_context()
        assert traceparent() == f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
        assert trace_metadata() == (("traceparent", traceparent()),)
