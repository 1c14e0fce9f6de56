"""Traces kept in files: one JSON line a span, one file a process; here they are merged, sorted and joined to trees.

``telemetry.FileSpanExporter`` writes the lines, ``hexgen2 trace`` draws what ``find`` returns (``trace_tree``).
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hexgen2.config import home
from hexgen2.errors import TraceNotFound

#: On the span that stands for a client's request, by the GenAI conventions.
REQUEST_ATTRIBUTE = "gen_ai.operation.name"
MIN_PREFIX = 4
#: Ids named when a prefix fits several.
SHOWN = 5


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened within a span."""

    name: str
    time_ns: int
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Link:
    """Another span, of any trace, that this one has to do with."""

    trace_id: str
    span_id: str


@dataclass(frozen=True, slots=True)
class Span:
    """One line of a span file. Ids are lower-case hex, times ns since the epoch, ``parent_id`` "" at a root."""

    trace_id: str
    span_id: str
    parent_id: str
    name: str
    kind: str
    service: str
    replica: str
    start_ns: int
    end_ns: int
    status: str = "unset"
    message: str = ""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    events: tuple[Event, ...] = ()
    links: tuple[Link, ...] = ()

    @property
    def seconds(self) -> float:
        """How long it took."""
        return (self.end_ns - self.start_ns) / 1e9

    def to_line(self) -> str:
        """The span as its line, without the newline."""
        return json.dumps(asdict(self), separators=(",", ":"))


def from_line(line: str | bytes) -> Span | None:
    """The span of a line; None for a line cut short by the end of its process, or of another format."""
    try:
        record = json.loads(line)
        events = tuple(Event(**event) for event in record.pop("events", ()))
        links = tuple(Link(**link) for link in record.pop("links", ()))
        return Span(**record, events=events, links=links)
    except (ValueError, TypeError, AttributeError):
        return None


@dataclass(frozen=True, slots=True)
class Node:
    """A span and the spans within it, by their start."""

    span: Span
    children: tuple["Node", ...]


@dataclass(frozen=True, slots=True)
class Trace:
    """One request's spans over all processes, by their start. ``linked`` are spans of other traces, by their id."""

    trace_id: str
    spans: tuple[Span, ...]
    linked: Mapping[str, Span] = field(default_factory=dict)

    @property
    def start_ns(self) -> int:
        """When its first span began."""
        return self.spans[0].start_ns

    @property
    def seconds(self) -> float:
        """From its first start to its last end."""
        return (max(span.end_ns for span in self.spans) - self.start_ns) / 1e9

    def roots(self) -> tuple[Node, ...]:
        """The trees that its spans form: one, unless parents are missing (elsewhere, or not ended yet)."""
        known = {span.span_id for span in self.spans}
        children: dict[str, list[Span]] = {}
        for span in self.spans:
            children.setdefault(span.parent_id if span.parent_id in known else "", []).append(span)
        seen: set[str] = set()

        def node(span: Span) -> Node:
            seen.add(span.span_id)
            inner = [each for each in children.get(span.span_id, ()) if each.span_id not in seen]
            return Node(span, tuple(node(each) for each in inner))

        roots = [node(span) for span in children.get("", ())]
        # Spans that are each other's parents hang from no root: a file that somebody else wrote.
        roots += [node(span) for span in self.spans if span.span_id not in seen]
        return tuple(roots)

    def to_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "trace_id": self.trace_id,
            "start_ns": self.start_ns,
            "seconds": self.seconds,
            "spans": [asdict(span) for span in self.spans],
        }


def find(which: str, folder: Path | None = None) -> Trace:
    """The trace of that id, of the only id that begins so, or the ``last`` request's.

    Raises:
        TraceNotFound: none, or several; says what there is.
    """
    folder = folder or home() / "traces"
    trace_id = _last(folder) if which == "last" else _complete(which.strip().lower(), folder)
    spans = {span.span_id: span for span in _scan(folder, f'"trace_id":"{trace_id}"') if span.trace_id == trace_id}
    ordered = tuple(sorted(spans.values(), key=lambda span: (span.start_ns, -span.end_ns)))
    linked = {link.span_id for span in ordered for link in span.links}
    others = (span for span_id in linked for span in _scan(folder, f'"span_id":"{span_id}"'))
    return Trace(trace_id, ordered, {span.span_id: span for span in others if span.span_id in linked})


def _last(folder: Path) -> str:
    newest = _newest(span for span in _scan(folder, REQUEST_ATTRIBUTE) if REQUEST_ATTRIBUTE in span.attributes)
    if newest is None:
        raise TraceNotFound(f"no request has been traced in {folder}")
    return newest.trace_id


def _complete(prefix: str, folder: Path) -> str:
    if len(prefix) < MIN_PREFIX or not all(character in "0123456789abcdef" for character in prefix):
        raise TraceNotFound(f"{prefix!r} is no trace id: give `last` or at least its first {MIN_PREFIX} hex digits")
    ids = {span.trace_id for span in _scan(folder, f'"trace_id":"{prefix}') if span.trace_id.startswith(prefix)}
    if not ids:
        raise TraceNotFound(f"no trace {prefix} in {folder}")
    if len(ids) > 1:
        shown = ", ".join(sorted(ids)[:SHOWN]) + (", ..." if len(ids) > SHOWN else "")
        raise TraceNotFound(f"{len(ids)} traces begin with {prefix}: {shown}")
    return ids.pop()


def _newest(spans: Iterable[Span]) -> Span | None:
    return max(spans, key=lambda span: span.start_ns, default=None)


def _scan(folder: Path, needle: str) -> Iterator[Span]:
    """Spans of every file whose line holds ``needle``; only those lines are parsed."""
    wanted = needle.encode()
    for path in sorted(folder.glob("*.jsonl")):
        try:
            with path.open("rb") as file:
                for line in file:
                    if wanted in line and (span := from_line(line)) is not None:
                        yield span
        except FileNotFoundError:
            # Pruned by a process that just started.
            continue
