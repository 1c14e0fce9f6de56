"""Where one request's time went, against what the plan promised for each part, and what held it up. Pure.

The parts follow one another and leave nothing out: their times sum up to the request's. What runs beside another part
(KV that travels while prefill goes on) counts only for as long as it was waited for.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from hexgen2.calibration import at
from hexgen2.placement import Placement, ReplicaPlan, RoutePlan
from hexgen2.traces import REQUEST_ATTRIBUTE, Span, Trace

#: Less than this over the promise holds nobody up.
NEGLIGIBLE_S = 0.001


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a request's time. ``resource`` is what it was spent on, or waiting for."""

    name: str
    seconds: float
    promised_s: float | None
    resource: str
    note: str = ""

    @property
    def excess_s(self) -> float:
        """Beyond the promise; all of it where there is none."""
        return self.seconds - (self.promised_s or 0.0)


@dataclass(frozen=True, slots=True)
class WhySlow:
    """The parts in their order, what they sum up to, and the one that is furthest beyond its promise, if any is."""

    trace_id: str
    seconds: float
    promised_s: float | None
    parts: tuple[Part, ...]
    bottleneck: Part | None

    def to_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self)


def why_slow(trace: Trace, placement: Placement | None) -> WhySlow:
    """Of one request. Without a plan nothing was promised, and the longest part is what held it up."""
    request = next((span for span in trace.spans if REQUEST_ATTRIBUTE in span.attributes), None) or trace.spans[0]
    parts = tuple(part for part in _parts(trace, request, placement) if part.seconds > 0 or part.promised_s)
    told = [part.promised_s for part in parts if part.promised_s is not None]
    worst = max(parts, key=lambda part: part.excess_s, default=None)
    if worst is not None and worst.excess_s < NEGLIGIBLE_S:
        worst = None
    return WhySlow(trace.trace_id, request.seconds, sum(told) if told else None, parts, worst)


def _parts(trace: Trace, request: Span, placement: Placement | None) -> Iterator[Part]:
    found = _last_of_each(trace)
    queue, prefill = found.get("prefill.queue"), found.get("prefill.engine")
    fetch, verify, decode = found.get("kv.fetch"), found.get("kv.verify"), found.get("decode.engine")
    promise = _Promises(placement, prefill, decode)
    tokens = int(request.attributes.get("gen_ai.usage.input_tokens", 0))
    at_ns = request.start_ns

    def until(end_ns: int) -> float:
        """Seconds from where the last part ended. A worker may close its span after the client has all."""
        nonlocal at_ns
        end_ns = min(end_ns, request.end_ns)
        seconds = max(0, end_ns - at_ns) / 1e9
        at_ns = max(at_ns, end_ns)
        return seconds

    first = queue or prefill or decode
    if first is not None:
        yield Part("gateway", until(first.start_ns), None, "gateway", "checked, routed, on its way")
    if queue is not None and prefill is not None:
        waits = "for a send buffer"
        yield Part("prefill queue", until(prefill.start_ns), promise.wait_s, f"{queue.replica}: send buffers", waits)
    if prefill is not None:
        computed = tokens - int(prefill.attributes.get("hexgen2.cached_tokens", 0))
        yield Part(
            "prefill engine",
            until(prefill.end_ns),
            promise.prefill_s(computed),
            f"{prefill.replica}: engine",
            f"{computed} tokens, and those before them in the engine",
        )
    if fetch is not None and prefill is not None:
        yield from _kv(found, fetch, verify, promise, tokens, until)
    if decode is not None:
        yield from _decode(found, decode, promise, tokens, until, alone=prefill is None)
    yield Part("answer", until(request.end_ns), None, "gateway and client", "the last token to the client")


def _kv(
    found: dict[str, Span], fetch: Span, verify: Span | None, promise: "_Promises", tokens: int, until: Any
) -> Iterator[Part]:
    """What of the hand-over was waited for after prefill had made the first token."""
    link = f"link {promise.sender or found['prefill.engine'].replica} to {fetch.replica}"
    staging, route = found.get("decode.queue"), found.get("kv.route")
    if staging is not None:
        yield Part("KV wait", until(staging.end_ns), None, f"{fetch.replica}: staging", "for memory to receive it")
    if route is not None:
        size = int(route.attributes.get("hexgen2.kv.bytes", 0))
        note = f"{size / 1e6:.1f} MB over {route.seconds:.3g} s, most of it beside prefill" if size else ""
        yield Part("KV transfer", until(route.end_ns), promise.transfer_s(tokens), link, note)
    if verify is not None:
        took = float(verify.attributes.get("hexgen2.kv.verify_s", 0.0))
        yield Part("KV check", until(fetch.end_ns), None, f"{fetch.replica}: digests", f"{took:.3g} s in all")
    else:
        yield Part("KV check", until(fetch.end_ns), None, f"{fetch.replica}: digests")


def _decode(
    found: dict[str, Span], decode: Span, promise: "_Promises", tokens: int, until: Any, *, alone: bool
) -> Iterator[Part]:
    where = f"{decode.replica}: engine"
    made = int(decode.attributes.get("gen_ai.usage.output_tokens", 0))
    load = found.get("kv.load")
    began = next((event.time_ns for event in decode.events if event.name == "first token"), decode.end_ns)
    if load is not None:
        yield Part("decode queue", until(load.start_ns), None, where, "to the engine")
        yield Part("KV load", until(load.end_ns), promise.step_s, where, "a place in the batch, then its blocks")
    if alone:
        yield Part("prefill engine", until(began), promise.decodes_prefill_s(tokens), where, "without a hand-over")
    else:
        yield Part("first step", until(began), promise.step_s, where)
    steps = max(0, made - 1)
    promised = None if promise.step_s is None else promise.step_s * steps
    yield Part("decode steps", until(decode.end_ns), promised, f"{decode.replica}: batch", f"{steps} steps")


class _Promises:
    """What the plan says of the replicas that served a request; None for what it does not say."""

    def __init__(self, placement: Placement | None, prefill: Span | None, decode: Span | None) -> None:
        self._plan = placement
        self._prefill, self._decode = (self._replica(span) for span in (prefill, decode))
        self.sender = prefill.replica if prefill is not None else ""

    @property
    def wait_s(self) -> float | None:
        """In the mean, at the plan's load."""
        plan = self._plan
        if plan is None or plan.ttft_s is None:
            return None
        rated = [(each.flow_rps, each.prefill_s) for each in plan.replicas if each.prefill_s is not None]
        total = sum(flow for flow, _ in rated)
        return max(0.0, plan.ttft_s - sum(flow * seconds for flow, seconds in rated) / total) if total else None

    def prefill_s(self, tokens: int) -> float | None:
        """Of a prompt, alone."""
        times = self._prefill.times if self._prefill else None
        return at(times.prefill, tokens) if times else None

    def decodes_prefill_s(self, tokens: int) -> float | None:
        """Of a prompt that the decode replica takes in by itself."""
        times = self._decode.times if self._decode else None
        return at(times.prefill, tokens) if times else None

    @property
    def step_s(self) -> float | None:
        """Of a token, in the planned batch."""
        return self._decode.tpot_s if self._decode else None

    def transfer_s(self, tokens: int) -> float | None:
        """Of a prompt's KV, when nobody else uses the link."""
        plan, route = self._plan, self._route()
        if plan is None or route is None or not plan.mean_prompt_tokens:
            return None
        return route.transfer_s * tokens / plan.mean_prompt_tokens

    def _replica(self, span: Span | None) -> ReplicaPlan | None:
        if self._plan is None or span is None:
            return None
        return next((each for each in self._plan.replicas if each.id == span.replica), None)

    def _route(self) -> RoutePlan | None:
        if self._plan is None or self._prefill is None or self._decode is None:
            return None
        ends = (self._prefill.id, self._decode.id)
        return next((each for each in self._plan.routes if (each.prefill, each.decode) == ends), None)


def _last_of_each(trace: Trace) -> dict[str, Span]:
    """Spans by name: of several (another attempt, several ranks or routes) the one that ended last."""
    found: dict[str, Span] = {}
    for span in trace.spans:
        if span.name not in found or span.end_ns > found[span.name].end_ns:
            found[span.name] = span
    return found
