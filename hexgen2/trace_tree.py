"""Draws a trace as a tree: who did what within what, when it began, how long it took, and what it says of itself."""

from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text
from rich.tree import Tree

from hexgen2.traces import Event, Link, Node, Span, Trace

#: What a rich tree indents each level by.
_INDENT = 4
_MAX_VALUE_CHARS = 60
#: Said by the span's name or its place already.
_HIDDEN = (
    *("rpc.", "server.", "network.", "gen_ai.operation.name", "gen_ai.provider.name", "gen_ai.response.model"),
    *("hexgen2.request_id", "hexgen2.kv.transfer_id", "exception.stacktrace"),
)
_PREFIXES = ("gen_ai.", "hexgen2.")


def draw(trace: Trace) -> RenderableType:
    """The trace for a terminal; print it with a rich console."""
    roots = trace.roots()
    names = max((len(_name(node.span)) + _INDENT * depth for node, depth in _walk(roots)), default=0)
    services = max((len(_where(span)) for span in trace.spans), default=0)
    started = datetime.fromtimestamp(trace.start_ns / 1e9).astimezone()
    processes = len({(span.service, span.replica) for span in trace.spans})
    head = Text.assemble(
        ("trace ", "dim"),
        (trace.trace_id, "bold"),
        (
            f"  {started:%Y-%m-%d %H:%M:%S}  {_duration(trace.seconds)}"
            f"  {_count(len(trace.spans), 'span')}, {_count(processes, 'process', 'processes')}",
            "dim",
        ),
    )

    def grow(tree: Tree, node: Node, depth: int) -> None:
        branch = tree.add(_label(node.span, depth, trace, names, services))
        for child in node.children:
            grow(branch, child, depth + 1)

    trees = []
    for root in roots:
        tree = Tree(_label(root.span, 0, trace, names, services), guide_style="dim")
        for child in root.children:
            grow(tree, child, 1)
        trees.append(tree)
    return Group(head, *trees)


def _walk(nodes: tuple[Node, ...], depth: int = 0) -> Iterator[tuple[Node, int]]:
    for node in nodes:
        yield node, depth
        yield from _walk(node.children, depth + 1)


def _label(span: Span, depth: int, trace: Trace, names: int, services: int) -> RenderableType:
    failed = span.status == "error"
    line = Text.assemble(
        (f"{_name(span):<{names - _INDENT * depth}}", "bold red" if failed else "bold"),
        (f"  {_where(span):<{services}}", "cyan"),
        (f"  {'+' + _duration((span.start_ns - trace.start_ns) / 1e9):>10}", "dim"),
        (f"  {_duration(span.seconds):>9}", "green"),
    )
    return Group(line, *(Padding(text, (0, 0, 0, 2), expand=False) for text in _details(span, depth, trace)))


def _details(span: Span, depth: int, trace: Trace) -> Iterator[Text]:
    if span.status == "error":
        yield Text(f"error: {span.message}", "red")
    if depth == 0 and span.parent_id:
        yield Text(f"its parent {span.parent_id} is not recorded here", "dim italic")
    said = _attributes(span.attributes)
    if said:
        yield Text(said, "dim")
    for event in span.events:
        yield Text(_event(event, trace), "dim")
    for link in span.links:
        yield Text(_link(link, trace), "dim")


def _name(span: Span) -> str:
    return span.name.removeprefix("hexgen2.v1.")


def _where(span: Span) -> str:
    return span.replica or span.service.removeprefix("hexgen2-")


def _event(event: Event, trace: Trace) -> str:
    said = _attributes(event.attributes)
    return f"{event.name} at +{_duration((event.time_ns - trace.start_ns) / 1e9)}" + (f": {said}" if said else "")


def _link(link: Link, trace: Trace) -> str:
    span = trace.linked.get(link.span_id)
    if span is None:
        return f"linked to span {link.span_id} of trace {link.trace_id}"
    said = _attributes(span.attributes)
    return f"linked to {_name(span)} of {_where(span)}, trace {link.trace_id}" + (f": {said}" if said else "")


def _attributes(attributes: Mapping[str, Any]) -> str:
    return "  ".join(
        f"{_short(key)}={_value(key, value)}" for key, value in attributes.items() if not key.startswith(_HIDDEN)
    )


def _short(key: str) -> str:
    for prefix in _PREFIXES:
        key = key.removeprefix(prefix)
    return key


def _value(key: str, value: Any) -> str:
    if key.endswith("bytes") and isinstance(value, int | float):
        return _size(value)
    if key.endswith("_s") and isinstance(value, int | float):
        return _duration(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= _MAX_VALUE_CHARS else text[: _MAX_VALUE_CHARS - 3] + "..."


def _size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.4g} GiB"


def _duration(seconds: float) -> str:
    if abs(seconds) < 0.01:
        return f"{seconds * 1e3:.2f} ms"
    if abs(seconds) < 1:
        return f"{seconds * 1e3:.1f} ms"
    return f"{seconds:.3f} s"


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one}" if number == 1 else f"{number} {many or one + 's'}"
