"""Where a request's time went: all of it, against what the plan promised, and what held it up."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexgen2.placement import Placement, TimesPlan
from hexgen2.traces import Event, Span, Trace
from hexgen2.why_slow import WhySlow, why_slow
from tests.placements import placement, planned_replica

T0, MS = 1_795_371_728_000_000_000, 1_000_000
TIMES = TimesPlan(prefill={100: 0.1, 1000: 1.0}, decode={1: 0.01, 8: 0.02})


def plan() -> Placement:
    """A prompt of 500 tokens takes 0.5 s, its KV 0.05 s, each further token 0.02 s."""
    replicas = tuple(
        planned_replica(name, role).model_copy(update={"times": TIMES, "prefill_s": prefill, "tpot_s": tpot})
        for name, role, prefill, tpot in (("p", "prefill", 0.4, None), ("d", "decode", None, 0.02))
    )
    made = placement(*replicas, routes=(("p", "d", 1.0),))
    route = made.routes[0].model_copy(update={"transfer_s": 0.1})
    return made.model_copy(update={"mean_prompt_tokens": 1000.0, "routes": (route,), "ttft_s": 0.45})


def span(name: str, replica: str, start_ms: float, end_ms: float, **changes: Any) -> Span:
    made = Span("ab" * 16, name, "", name, "internal", "s", replica, T0 + int(start_ms * MS), T0 + int(end_ms * MS))
    return replace(made, **changes)


def trace(prefill_ms: float = 500, wire_ms: float = 50, step_ms: float = 20, queue_ms: float = 20) -> Trace:
    """A request of 500 and 11 tokens, handed over; its parts take so long."""
    first = 10 + queue_ms
    made = first + prefill_ms
    there = made + wire_ms
    loaded = there + 5 + step_ms
    began = loaded + step_ms
    end = began + 10 * step_ms
    prompt = {"gen_ai.operation.name": "chat", "gen_ai.usage.input_tokens": 500}
    decode = {"gen_ai.usage.output_tokens": 11}
    spans = (
        span("chat m", "", 0, end + 2, attributes=prompt),
        span("prefill.queue", "p", 10, first),
        span("prefill.engine", "p", first, made, attributes={"hexgen2.cached_tokens": 0}),
        span("kv.fetch", "d", 11, there + 4),
        span("decode.queue", "d", 12, 13),
        span("kv.route", "d", first, there, attributes={"hexgen2.kv.bytes": 1_000_000}),
        span("kv.verify", "d", first, there + 3, attributes={"hexgen2.kv.verify_s": 0.002}),
        span(
            "decode.engine",
            "d",
            there + 5,
            end,
            attributes=decode,
            events=(Event("first token", T0 + int(began * MS)),),
        ),
        span("kv.load", "d", there + 5, loaded),
    )
    return Trace("ab" * 16, tuple(sorted(spans, key=lambda each: each.start_ns)))


def seconds(told: WhySlow) -> dict[str, float]:
    return {part.name: part.seconds for part in told.parts}


def test_each_part_stands_beside_its_promise() -> None:
    told = why_slow(trace(), plan())
    promised = {part.name: part.promised_s for part in told.parts}
    assert promised["prefill engine"] == pytest.approx(0.5)
    assert promised["prefill queue"] == pytest.approx(0.05)
    assert promised["KV transfer"] == pytest.approx(0.05)
    assert promised["decode steps"] == pytest.approx(0.2)
    assert seconds(told)["decode steps"] == pytest.approx(0.2)
    assert told.promised_s == pytest.approx(0.5 + 0.05 + 0.05 + 0.2 + 2 * 0.02)


@pytest.mark.parametrize(
    ("slow", "resource"),
    [
        ({"prefill_ms": 900}, "p: engine"),
        ({"wire_ms": 400}, "link p to d"),
        ({"step_ms": 90}, "d: batch"),
        ({"queue_ms": 700}, "p: send buffers"),
    ],
)
def test_what_is_furthest_beyond_its_promise_held_it_up(slow: dict[str, float], resource: str) -> None:
    told = why_slow(trace(**slow), plan())
    assert told.bottleneck is not None
    assert told.bottleneck.resource == resource


def test_a_long_part_that_was_promised_to_be_long_did_not() -> None:
    told = why_slow(trace(prefill_ms=500, wire_ms=80), plan())
    assert max(told.parts, key=lambda part: part.seconds).name == "prefill engine"
    assert told.bottleneck is not None
    assert told.bottleneck.name == "KV transfer"


def test_without_a_plan_the_longest_part_did() -> None:
    told = why_slow(trace(), None)
    assert told.promised_s is None
    assert told.bottleneck is not None
    assert told.bottleneck.name == "prefill engine"


def test_a_request_served_as_a_whole_has_its_prefill_on_the_decode_replica() -> None:
    prompt = {"gen_ai.operation.name": "chat", "gen_ai.usage.input_tokens": 100}
    events = (Event("first token", T0 + 150 * MS),)
    spans = (
        span("chat m", "", 0, 260, attributes=prompt),
        span("decode.engine", "d", 10, 250, attributes={"gen_ai.usage.output_tokens": 6}, events=events),
    )
    told = why_slow(Trace("ab" * 16, spans), plan())
    assert seconds(told) == pytest.approx(
        {"gateway": 0.01, "prefill engine": 0.14, "decode steps": 0.1, "answer": 0.01}
    )
    assert next(part for part in told.parts if part.name == "prefill engine").promised_s == pytest.approx(0.1)


def test_a_trace_without_its_workers_is_told_as_far_as_it_goes() -> None:
    whole = trace()
    told = why_slow(Trace(whole.trace_id, whole.spans[:1]), plan())
    assert [part.name for part in told.parts] == ["answer"]


def test_a_worker_that_closes_its_span_late_adds_nothing_to_the_request() -> None:
    whole = trace()
    spans = tuple(
        replace(each, end_ns=each.end_ns + 80 * MS) if each.name == "decode.engine" else each for each in whole.spans
    )
    told = why_slow(Trace(whole.trace_id, spans), plan())
    assert sum(part.seconds for part in told.parts) == pytest.approx(told.seconds)


@given(*(st.floats(0, 2000) for _ in range(4)))
def test_the_parts_are_all_of_the_requests_time(a: float, b: float, c: float, d: float) -> None:
    told = why_slow(trace(a, b, c, d), plan())
    assert sum(part.seconds for part in told.parts) == pytest.approx(told.seconds, abs=1e-6)
