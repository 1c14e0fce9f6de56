"""Span files: their record and how it is read back. ``hexgen2 trace`` draws what is here (``trace_tree``)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan


def span_record(span: "ReadableSpan") -> dict[str, Any]:
    """One line of a span file. Times are nanoseconds since the epoch."""
    context = span.get_span_context()
    assert context is not None
    resource = span.resource.attributes
    return {
        "trace_id": f"{context.trace_id:032x}",
        "span_id": f"{context.span_id:016x}",
        "parent_id": f"{span.parent.span_id:016x}" if span.parent is not None else "",
        "name": span.name,
        "kind": span.kind.name.lower(),
        "service": str(resource.get("service.name", "")),
        "replica": str(resource.get("service.instance.id", "")),
        "start_ns": span.start_time or 0,
        "end_ns": span.end_time or 0,
        "status": span.status.status_code.name.lower(),
        "message": span.status.description or "",
        "attributes": {key: _plain(value) for key, value in (span.attributes or {}).items()},
        "events": [
            {
                "name": e.name,
                "time_ns": e.timestamp,
                "attributes": {k: _plain(v) for k, v in (e.attributes or {}).items()},
            }
            for e in span.events
        ],
        "links": [
            {"trace_id": f"{link.context.trace_id:032x}", "span_id": f"{link.context.span_id:016x}"}
            for link in span.links
        ],
    }


def _plain(value: object) -> object:
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    return value if isinstance(value, str | int | float | bool) else str(value)
