"""What one request leaves behind: its span by OpenTelemetry's GenAI conventions, and Prometheus metrics."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from time import monotonic

from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from hexgen2 import metrics
from hexgen2.engine.base import FinishReason
from hexgen2.errors import DeadlineExceeded, HexgenError
from hexgen2.gateway.job import Job, Operation, Usage
from hexgen2.security.api_keys import ApiKey

_PROPAGATOR = TraceContextTextMapPropagator()
_CLIENTS_FAULT = frozenset({"INVALID_ARGUMENT", "NOT_FOUND", "PERMISSION_DENIED", "UNAUTHENTICATED"})

tracer = trace.get_tracer("hexgen2")


@contextmanager
def request_span(operation: Operation, headers: Mapping[str, str]) -> Iterator[Span]:
    """The span of a whole request: the root, unless ``headers`` (or a span around it) continue a trace."""
    inside = trace.get_current_span().get_span_context().is_valid
    with tracer.start_as_current_span(
        operation,
        context=None if inside else _PROPAGATOR.extract(headers),
        kind=SpanKind.INTERNAL if inside else SpanKind.SERVER,
        attributes={"gen_ai.operation.name": operation, "gen_ai.provider.name": "hexgen2"},
        record_exception=False,
        set_status_on_exception=False,
    ) as span:
        try:
            yield span
        except BaseException as error:
            _failed(span, error)
            raise


def trace_id(span: Span) -> str:
    """32 hexadecimal digits; empty when tracing is off."""
    context = span.get_span_context()
    return trace.format_trace_id(context.trace_id) if context.is_valid else ""


def describe_key(span: Span, key: ApiKey | None) -> None:
    """Put the name of who asks on the span."""
    if key is not None:
        span.set_attribute("hexgen2.api_key", key.name)


def describe(span: Span, job: Job) -> None:
    """Put the checked request on its span."""
    sampling = job.sampling
    span.update_name(f"{job.operation} {job.model}")
    span.set_attributes(
        {
            "gen_ai.request.model": job.model,
            "gen_ai.request.max_tokens": sampling.max_tokens,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
            "gen_ai.request.top_k": sampling.top_k,
            "gen_ai.response.id": job.request_id,
            "gen_ai.response.model": job.model,
            "gen_ai.usage.input_tokens": len(job.prompt_token_ids),
        }
    )
    if sampling.seed is not None:
        span.set_attribute("gen_ai.request.seed", sampling.seed)
    if job.stop:
        span.set_attribute("gen_ai.request.stop_sequences", job.stop)


def link_plan(span: Span, epoch: int, traceparent: str) -> None:
    """Which plan routed the request, and a link to how that plan was made."""
    span.set_attribute("hexgen2.plan.epoch", epoch)
    maker = trace.get_current_span(_PROPAGATOR.extract({"traceparent": traceparent})).get_span_context()
    if traceparent and maker.is_valid:
        span.add_link(maker)


class Stopwatch:
    """Times of one request, from when it was made; seconds."""

    def __init__(self) -> None:
        self.began = monotonic()
        self._first = self._last = self.began
        self._tokens = 0

    def tokens(self, num_tokens: int) -> None:
        """Tokens have come."""
        if not num_tokens:
            return
        now = monotonic()
        metrics.GENERATION_TOKENS.inc(num_tokens)
        if not self._tokens:
            self._first = now
            metrics.TIME_TO_FIRST_TOKEN_SECONDS.observe(self.ttft_s)
            trace.get_current_span().add_event("first_token")
        else:
            metrics.INTER_TOKEN_LATENCY_SECONDS.observe(now - self._last)
        self._last = now
        self._tokens += num_tokens

    @property
    def ttft_s(self) -> float:
        """To the first token."""
        return self._first - self.began

    @property
    def tpot_s(self) -> float:
        """Mean per token after the first; 0 when there is none."""
        return (self._last - self._first) / (self._tokens - 1) if self._tokens > 1 else 0.0

    @property
    def e2e_s(self) -> float:
        """To the last token."""
        return self._last - self.began


@asynccontextmanager
async def within(deadline: float, watch: Stopwatch) -> AsyncIterator[None]:
    """DeadlineExceeded when the block is not over by ``deadline`` (``time.monotonic``)."""
    try:
        async with asyncio.timeout(max(0.0, deadline - monotonic())):
            yield
    except TimeoutError:
        raise DeadlineExceeded(f"the answer was not complete after {deadline - watch.began:.1f} s") from None


def succeeded(span: Span, watch: Stopwatch, usage: Usage, finish_reason: FinishReason) -> None:
    """The answer is complete."""
    metrics.PROMPT_TOKENS.inc(usage.prompt_tokens)
    metrics.E2E_REQUEST_LATENCY_SECONDS.observe(watch.e2e_s)
    metrics.REQUEST_SUCCESS.labels(finish_reason.value).inc()
    if usage.completion_tokens > 1:
        metrics.TIME_PER_OUTPUT_TOKEN_SECONDS.observe(watch.tpot_s)
    span.set_attributes(
        {
            "gen_ai.usage.output_tokens": usage.completion_tokens,
            "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
            "gen_ai.response.finish_reasons": (finish_reason.value,),
            "hexgen2.ttft_s": watch.ttft_s,
            "hexgen2.tpot_s": watch.tpot_s,
        }
    )


def is_clients_fault(error: BaseException) -> bool:
    """Whether the request itself was wrong."""
    return isinstance(error, HexgenError) and error.status in _CLIENTS_FAULT


def _failed(span: Span, error: BaseException) -> None:
    span.set_attribute("error.type", type(error).__name__)
    if isinstance(error, HexgenError):
        metrics.REQUESTS_FAILED.labels(type(error).__name__).inc()
    if is_clients_fault(error):
        return
    if isinstance(error, Exception):
        # A client that left (cancellation) is no failure of ours.
        span.set_status(Status(StatusCode.ERROR, str(error)))
