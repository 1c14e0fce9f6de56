"""Span files of several processes, read as one trace and drawn as a tree."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from hexgen2.errors import TraceNotFound
from hexgen2.trace_tree import draw
from hexgen2.traces import Event, Link, Node, Span, Trace, find, from_line

T0 = 1_795_371_728_000_000_000
MS = 1_000_000
REQUEST = "ab" * 16
PLAN = "cd" * 16


def span(span_id: str, parent: str, name: str, start_ms: float, end_ms: float, **changes: Any) -> Span:
    return replace(
        Span(
            trace_id=REQUEST,
            span_id=span_id * 16,
            parent_id=parent * 16,
            name=name,
            kind="internal",
            service="hexgen2-gateway",
            replica="",
            start_ns=T0 + int(start_ms * MS),
            end_ns=T0 + int(end_ms * MS),
        ),
        **changes,
    )


P: dict[str, Any] = {"service": "hexgen2-prefill", "replica": "prefill-0"}
D: dict[str, Any] = {"service": "hexgen2-decode", "replica": "decode-0"}
ROOT = span(
    "1",
    "",
    "chat smollm2",
    0,
    812.3,
    attributes={
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "smollm2",
        "gen_ai.usage.input_tokens": 36,
        "hexgen2.ttft_s": 0.2054,
    },
    events=(Event("first token", T0 + 205 * MS, {"token_id": 504}),),
    links=(Link(PLAN, "9" * 16),),
)
SPANS = (
    ROOT,
    span("2", "1", "hexgen2.v1.Prefill/Prefill", 2, 260, **P, attributes={"rpc.system": "grpc"}),
    span("3", "2", "prefill.engine", 4, 204, **P),
    span("4", "1", "hexgen2.v1.Decode/Decode", 2.1, 811, **D),
    span(
        "5",
        "4",
        "kv.fetch",
        3,
        255,
        **D,
        attributes={"hexgen2.kv.bytes": 1_658_880, "hexgen2.kv.transport": "ucx (tcp)", "hexgen2.kv.chunks": 30},
    ),
    span("6", "4", "decode.engine", 256, 810, **D),
)
PLANNED = span(
    "9",
    "",
    "coordinator.plan",
    -5000,
    -4999,
    trace_id=PLAN,
    service="hexgen2-coordinator",
    attributes={"hexgen2.plan.epoch": 17},
)


def write(folder: Path, name: str, *spans: Span, tail: str = "") -> None:
    (folder / f"{name}.jsonl").write_text("".join(each.to_line() + "\n" for each in spans) + tail)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Each process has its file, and writes spans as they end: children first."""
    write(tmp_path, "gateway", ROOT)
    write(tmp_path, "prefill", SPANS[2], SPANS[1])
    write(tmp_path, "decode", SPANS[4], tail='{"trace_id":"abab')
    write(tmp_path, "decode.1", SPANS[5], SPANS[3])
    write(tmp_path, "coordinator", PLANNED)
    return tmp_path


def names(nodes: tuple[Node, ...]) -> list[Any]:
    return [(node.span.name, names(node.children)) if node.children else node.span.name for node in nodes]


def text(trace: Trace, width: int = 100) -> str:
    console = Console(width=width, color_system=None, record=True, file=None, legacy_windows=False)
    with console.capture() as capture:
        console.print(draw(trace))
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


@pytest.mark.parametrize("which", [REQUEST, "abab", "ABAB", "last"])
def test_files_of_all_processes_make_one_tree(folder: Path, which: str) -> None:
    trace = find(which, folder)
    assert trace.trace_id == REQUEST
    assert names(trace.roots()) == [
        (
            "chat smollm2",
            [
                ("hexgen2.v1.Prefill/Prefill", ["prefill.engine"]),
                ("hexgen2.v1.Decode/Decode", ["kv.fetch", "decode.engine"]),
            ],
        )
    ]
    assert trace.seconds == pytest.approx(0.8123)
    assert trace.linked == {"9" * 16: PLANNED}


def test_a_tree_says_who_when_how_long_and_what(folder: Path) -> None:
    lines = text(find("last", folder)).splitlines()
    assert lines[0].startswith(f"trace {REQUEST}  20")
    assert lines[0].endswith("812.3 ms  6 spans, 3 processes")
    assert lines[1:] == [
        "chat smollm2            gateway      +0.00 ms   812.3 ms",
        "  request.model=smollm2  usage.input_tokens=36  ttft_s=205.4 ms",
        "  first token at +205.0 ms: token_id=504",
        f"  linked to coordinator.plan of coordinator, trace {PLAN}: plan.epoch=17",
        "├── Prefill/Prefill     prefill-0    +2.00 ms   258.0 ms",
        "│   └── prefill.engine  prefill-0    +4.00 ms   200.0 ms",
        "└── Decode/Decode       decode-0     +2.10 ms   808.9 ms",
        "    ├── kv.fetch        decode-0     +3.00 ms   252.0 ms",
        "    │     kv.bytes=1.582 MiB  kv.transport=ucx (tcp)  kv.chunks=30",
        "    └── decode.engine   decode-0    +256.0 ms   554.0 ms",
    ]


def test_an_error_is_in_the_tree() -> None:
    failed = replace(ROOT, status="error", message="decode-0 is gone", links=(), events=(), attributes={})
    assert text(Trace(REQUEST, (failed,))).splitlines()[1:] == [
        "chat smollm2  gateway    +0.00 ms   812.3 ms",
        "  error: decode-0 is gone",
    ]


def test_spans_whose_parent_is_missing_are_shown_beside_it_with_a_word() -> None:
    trace = Trace(REQUEST, (SPANS[1], SPANS[2], SPANS[4]))
    assert names(trace.roots()) == [("hexgen2.v1.Prefill/Prefill", ["prefill.engine"]), "kv.fetch"]
    drawn = text(trace)
    assert "its parent 1111111111111111 is not recorded here" in drawn
    assert "its parent 4444444444444444 is not recorded here" in drawn


def test_spans_that_are_each_others_parents_are_shown_once() -> None:
    trace = Trace(REQUEST, (span("1", "2", "a", 0, 1), span("2", "1", "b", 0, 1), span("3", "3", "c", 0, 1)))
    assert names(trace.roots()) == [("a", ["b"]), "c"]


def test_a_link_to_a_span_that_is_not_kept_shows_its_ids(folder: Path) -> None:
    (folder / "coordinator.jsonl").unlink()
    assert f"linked to span {'9' * 16} of trace {PLAN}" in text(find("last", folder), width=120)


def test_last_is_the_request_that_began_last_not_the_plan_made_since(folder: Path) -> None:
    later = replace(ROOT, trace_id="ef" * 16, start_ns=T0 + 1)
    write(folder, "gateway", later, ROOT)
    write(folder, "coordinator", replace(PLANNED, start_ns=T0 + 10**12))
    assert find("last", folder).trace_id == later.trace_id


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("xyz", "'xyz' is no trace id: give `last` or at least its first 4 hex digits"),
        ("ab", "'ab' is no trace id: give `last` or at least its first 4 hex digits"),
        ("1234", "no trace 1234 in "),
        ("abab", f"2 traces begin with abab: {REQUEST}, {'ab' * 15}ff"),
    ],
)
def test_what_is_not_found_is_explained(folder: Path, which: str, message: str) -> None:
    write(folder, "other", replace(ROOT, trace_id="ab" * 15 + "ff"))
    with pytest.raises(TraceNotFound) as caught:
        find(which, folder)
    assert str(caught.value).startswith(message)


def test_an_empty_folder_has_no_last_trace(tmp_path: Path) -> None:
    with pytest.raises(TraceNotFound, match="no request has been traced in "):
        find("last", tmp_path / "none")


@given(st.binary(max_size=200))
def test_a_line_of_anything_is_a_span_or_none(line: bytes) -> None:
    assert from_line(line) is None


def test_a_span_comes_back_from_its_line() -> None:
    assert from_line(ROOT.to_line()) == ROOT
    assert "\n" not in ROOT.to_line()
    cut = ROOT.to_line()[:-5]
    assert from_line(cut) is None
    assert from_line('{"trace_id":"abab"}') is None
