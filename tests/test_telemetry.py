"""Where spans and logs of a real process go."""

import asyncio
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SpanExportResult

from hexgen2.telemetry import FileSpanExporter, prune
from hexgen2.traces import find, from_line

PROGRAM = """
import logging, sys, time
import structlog
from opentelemetry import trace
from hexgen2 import telemetry

shutdown = telemetry.setup("prefill", "p/0")
tracer = trace.get_tracer("hexgen2")
log = structlog.get_logger("here")
with tracer.start_as_current_span("chat", attributes={"gen_ai.operation.name": "chat", "n": (1, 2)}) as span:
    with tracer.start_as_current_span("inner") as inner:
        inner.add_event("first token", {"token_id": 7})
        structlog.contextvars.bind_contextvars(request_id="r1")
        log.info("inside", answer=42)
        try:
            1 / 0
        except ZeroDivisionError:
            log.exception("broken")
log.debug("too quiet")
logging.getLogger("uvicorn").warning("of a library: %s", "x")
if sys.argv[1:] == ["wait"]:
    print("ended", flush=True)
    sys.stdin.readline()
shutdown()
"""


def environment(home: Path, **changes: str) -> dict[str, str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("OTEL_")}
    return inherited | {"HEXGEN2_HOME": str(home)} | changes


def run(home: Path, **changes: str) -> list[dict[str, Any]]:
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment(home, **changes),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert ended.stdout == ""
    return [json.loads(line) for line in ended.stderr.splitlines()]


def test_logs_are_json_lines_that_name_their_trace_request_and_replica(tmp_path: Path) -> None:
    inside, broken, library = run(tmp_path)
    trace = find("last", tmp_path / "traces")
    assert inside.pop("timestamp").endswith("Z")
    assert inside == {
        "event": "inside",
        "answer": 42,
        "level": "info",
        "logger": "here",
        "request_id": "r1",
        "service": "prefill",
        "replica": "p/0",
        "trace_id": trace.trace_id,
        "span_id": trace.spans[1].span_id,
    }
    assert "ZeroDivisionError" in broken["exception"]
    assert (library["event"], library["logger"], library["level"]) == ("of a library: x", "uvicorn", "warning")
    assert "trace_id" not in library


def test_without_a_collector_spans_are_kept_in_a_file_of_the_process(tmp_path: Path) -> None:
    run(tmp_path)
    (path,) = (tmp_path / "traces").iterdir()
    assert path.name.startswith("prefill-p_0-")
    outer, inner = find("last", tmp_path / "traces").spans
    assert (outer.service, outer.replica) == ("hexgen2-prefill", "p/0")
    assert outer.attributes == {"gen_ai.operation.name": "chat", "n": [1, 2]}
    assert (inner.name, inner.parent_id, inner.events[0].attributes) == ("inner", outer.span_id, {"token_id": 7})


def test_spans_are_readable_while_the_process_goes_on(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "wait"],
        env=environment(tmp_path),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ended\n"

        async def written() -> None:
            async with asyncio.timeout(20):
                while not list((tmp_path / "traces").glob("*.jsonl")):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)

        asyncio.run(written())
        assert process.poll() is None
        assert len(find("last", tmp_path / "traces").spans) == 2
        process.communicate(b"\n", timeout=60)


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self) -> None:
        self.names: list[str] = []

    def Export(self, request: Any, context: Any) -> Any:
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.names += [span.name for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()


def test_with_an_otlp_endpoint_spans_go_there_and_to_no_file(tmp_path: Path) -> None:
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(1))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        run(tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{port}", no_proxy="127.0.0.1")
    finally:
        server.stop(0).wait()
    assert sorted(collector.names) == ["chat", "inner"]
    assert not (tmp_path / "traces").exists()


@pytest.mark.parametrize("variables", [{"OTEL_SDK_DISABLED": "true"}, {"OTEL_TRACES_EXPORTER": "none"}])
def test_tracing_can_be_turned_off(tmp_path: Path, variables: dict[str, str]) -> None:
    assert [line["event"] for line in run(tmp_path, **variables)] == ["inside", "broken", "of a library: x"]
    assert not (tmp_path / "traces").exists()


def test_a_span_file_is_rotated_and_bounded(tmp_path: Path) -> None:
    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("test")
    span: Any = tracer.start_span("x" * 100)
    span.end()
    path = tmp_path / "a.jsonl"
    exporter = FileSpanExporter(path, max_bytes=5000)
    for _ in range(100):
        assert exporter.export([span]) is SpanExportResult.SUCCESS
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.1.jsonl", "a.jsonl"]
    for each in tmp_path.iterdir():
        assert each.stat().st_size <= 5000
        assert all(from_line(line) is not None for line in each.read_text().splitlines())


def test_a_folder_that_cannot_be_written_costs_spans_not_the_process(tmp_path: Path) -> None:
    exporter = FileSpanExporter(tmp_path / "gone" / "a.jsonl")
    span: Any = TracerProvider(shutdown_on_exit=False).get_tracer("test").start_span("x")
    span.end()
    assert exporter.export([span]) is SpanExportResult.FAILURE


def test_the_oldest_files_go_first_when_the_folder_is_full(tmp_path: Path) -> None:
    for age, name in enumerate(["new", "middle", "old"]):
        path = tmp_path / f"{name}.jsonl"
        path.write_bytes(b"x" * 1000)
        os.utime(path, (1e9 - age, 1e9 - age))
    (tmp_path / "other.txt").write_bytes(b"x" * 10_000)
    prune(tmp_path, 2000)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["middle.jsonl", "new.jsonl", "other.txt"]
