"""Spans and logs of a process: where they go, set up once at its start.

Spans go to OTLP when the standard ``OTEL_EXPORTER_OTLP_*`` variables name an endpoint, else to a file under
``home()/traces`` that ``hexgen2 trace`` reads. Logs are JSON lines on stderr, pretty on a terminal.
"""

import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from hexgen2.config import MIB, home
from hexgen2.traces import Event, Link, Span

if TYPE_CHECKING:
    from structlog.typing import EventDict, Processor, WrappedLogger

#: Of one process: the file being written and the one before it.
FILE_BYTES = 8 * MIB
#: Of the folder, kept by removing the oldest files at start-up.
FOLDER_BYTES = 256 * MIB
#: So that a trace can be read right after its request.
FLUSH_INTERVAL_S = 0.5


def setup(service: str, replica_id: str = "") -> Callable[[], None]:
    """Set up spans and logs of this process; returns what flushes and ends them. Call once, before any span.

    ``service`` is ``gateway``, ``prefill``...; ``replica_id`` its name within the fleet.
    """
    _setup_logs(service, replica_id)
    if _flag("OTEL_SDK_DISABLED"):
        return lambda: None
    resource = Resource.create(
        {
            "service.name": os.environ.get("OTEL_SERVICE_NAME") or f"hexgen2-{service}",
            "service.version": version("hexgen2"),
            "service.instance.id": f"{replica_id or service}-{os.getpid()}",
            "hexgen2.replica": replica_id,
            "process.pid": os.getpid(),
        }
    )
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    exporter = _exporter(service, replica_id)
    if exporter is not None:
        delay_ms = None if os.environ.get("OTEL_BSP_SCHEDULE_DELAY") else FLUSH_INTERVAL_S * 1000
        provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=delay_ms))
    trace.set_tracer_provider(provider)
    return provider.shutdown


def _exporter(service: str, replica_id: str) -> SpanExporter | None:
    if os.environ.get("OTEL_TRACES_EXPORTER", "").strip() == "none":
        return None
    if os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"):
        protocol = (
            os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL")
            or os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
            or "grpc"
        )
        # Imported here: a process that writes files needs neither.
        if protocol.startswith("http"):
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

            return HttpExporter()
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

        return GrpcExporter()
    folder = home() / "traces"
    folder.mkdir(parents=True, exist_ok=True)
    prune(folder, FOLDER_BYTES)
    name = re.sub(r"[^\w.-]", "_", f"{service}-{replica_id}" if replica_id else service)
    return FileSpanExporter(folder / f"{name}-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}.jsonl")


def prune(folder: Path, max_bytes: int) -> None:
    """Remove the oldest span files until the folder holds at most ``max_bytes``."""
    files = []
    for path in folder.glob("*.jsonl"):
        try:
            stat = path.stat()
        except FileNotFoundError:
            continue
        files.append((stat.st_mtime, stat.st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= max_bytes:
            return
        path.unlink(missing_ok=True)
        total -= size


class FileSpanExporter(SpanExporter):
    """Appends spans as JSON lines (``traces.Span``). At ``max_bytes`` the file becomes ``NAME.1.jsonl``."""

    def __init__(self, path: Path, max_bytes: int = FILE_BYTES) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._lock = threading.Lock()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Write whole lines in one call, so that readers never see half a batch of a live process for long."""
        lines = "".join(span_of(span).to_line() + "\n" for span in spans).encode()
        try:
            with self._lock:
                if self._path.exists() and self._path.stat().st_size + len(lines) > self._max_bytes:
                    self._path.replace(self._path.with_suffix(".1.jsonl"))
                # Opened anew each time: another process may have pruned the file.
                with self._path.open("ab") as file:
                    file.write(lines)
        except OSError as error:
            structlog.get_logger(__name__).warning("spans_not_written", path=str(self._path), reason=str(error))
            return SpanExportResult.FAILURE
        return SpanExportResult.SUCCESS


def span_of(span: ReadableSpan) -> Span:
    """A span that ended, as it is kept."""
    context = span.get_span_context()
    assert context is not None
    resource = span.resource.attributes
    return Span(
        trace_id=trace.format_trace_id(context.trace_id),
        span_id=trace.format_span_id(context.span_id),
        parent_id=trace.format_span_id(span.parent.span_id) if span.parent is not None else "",
        name=span.name,
        kind=span.kind.name.lower(),
        service=str(resource.get("service.name", "")),
        replica=str(resource.get("hexgen2.replica", "")),
        start_ns=span.start_time or 0,
        end_ns=span.end_time or 0,
        status=span.status.status_code.name.lower(),
        message=span.status.description or "",
        attributes=_plain(span.attributes),
        events=tuple(Event(event.name, event.timestamp, _plain(event.attributes)) for event in span.events),
        links=tuple(
            Link(trace.format_trace_id(link.context.trace_id), trace.format_span_id(link.context.span_id))
            for link in span.links
        ),
    )


def _plain(attributes: Mapping[str, object] | None) -> dict[str, object]:
    """Attributes as JSON has them."""
    return {
        key: list(value) if isinstance(value, tuple) else value if isinstance(value, str | int | float) else str(value)
        for key, value in (attributes or {}).items()
    }


def _setup_logs(service: str, replica_id: str) -> None:
    names = {"service": service} | ({"replica": replica_id} if replica_id else {})

    def add_names(_: "WrappedLogger", __: str, event: "EventDict") -> "EventDict":
        for key, value in names.items():
            event.setdefault(key, value)
        return event

    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        add_names,
        _add_trace,
    ]
    last: list[Processor] = (
        [structlog.dev.ConsoleRenderer()]
        if sys.stderr.isatty()
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(os.environ.get("HEXGEN2_LOG_LEVEL", "INFO").upper())
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )


def _add_trace(_: "WrappedLogger", __: str, event: "EventDict") -> "EventDict":
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        event["trace_id"] = trace.format_trace_id(context.trace_id)
        event["span_id"] = trace.format_span_id(context.span_id)
    return event


def _flag(name: str) -> bool:
    return os.environ.get(name, "").strip().lower() == "true"
