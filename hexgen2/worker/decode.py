"""Decode: makes the tokens after the first from KV that was fetched and verified; or serves a request colocated.

No token leaves before every rank has said that verified KV is in its engine's blocks.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from math import inf
from time import time_ns

import structlog
from opentelemetry import trace

from hexgen2 import metrics
from hexgen2.engine.base import Engine, EngineOutput, EngineRequest, Sampling
from hexgen2.errors import HexgenError, KvCorrupt
from hexgen2.handover import for_decode
from hexgen2.kv.handoff import header_for
from hexgen2.kv.ranks import Ranks
from hexgen2.kv.wire import prompt_sha256
from hexgen2.worker.aio import PageQueue, bounded, now, uninterrupted
from hexgen2.worker.meter import Answer, Meter, Work
from hexgen2.worker.receive import FetchKv, KvSummary, Receiver, RemoteKv
from hexgen2.worker.received import Received

log = structlog.get_logger(__name__)
tracer = trace.get_tracer("hexgen2")


@dataclass(frozen=True, slots=True)
class DecodeJob:
    """One Decode call. ``sampling`` is the client's, counted from the very first token; no ``remote``: colocated."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: Sampling
    remote: RemoteKv | None
    trace_headers: tuple[tuple[str, str], ...] = ()
    #: By ``aio.now``; nothing here waits longer.
    deadline: float = inf


class DecodeWorker:
    """Owns the transfers that arrive at this replica, and tells ``received`` of each."""

    def __init__(
        self,
        engine: Engine,
        ranks: Ranks,
        memory: PageQueue,
        fetch_kv: FetchKv,
        received: Received | None = None,
        meter: Meter | None = None,
    ) -> None:
        self._meter = meter or Meter()
        self._engine = engine
        self._ranks = ranks
        self._memory = memory
        self._fetch_kv = fetch_kv
        self._received = received or Received()
        self._transport = ""

    async def run(self, job: DecodeJob) -> AsyncGenerator[KvSummary | EngineOutput, None]:
        """The Decode call.

        Colocated: outputs. Else: the summary once all is verified, then outputs after the first token; nothing at
        all when the first token was final.
        """
        if job.remote is None:
            request = EngineRequest(job.request_id, job.prompt_token_ids, job.sampling, trace_headers=job.trace_headers)
            async with aclosing(self._generate(request, job.deadline)) as outputs:
                async for output in outputs:
                    yield output
            return
        receiver = self._receiver(job, job.remote)
        metrics.KV_TRANSFERS_OPEN.add("recv", receiver.transfer)
        freed = False
        try:
            first = await receiver.fetch()
            if first.finish_reason is not None:
                return
            assert receiver.summary is not None, "everything was fetched"
            self._count(receiver.summary)
            self._meter.transferred(len(job.prompt_token_ids), receiver.summary.exposed_s, job.remote.prefill_address)
            yield receiver.summary
            request = EngineRequest(
                job.request_id,
                (*job.prompt_token_ids, first.token.token_id),
                for_decode(job.sampling),
                load_transfer=receiver.key,
                trace_headers=job.trace_headers,
            )
            load_ns = time_ns()
            async with aclosing(self._generate(request, job.deadline)) as outputs:
                async for output in outputs:
                    if not freed:
                        await receiver.confirm_loaded(load_ns)
                        freed = True
                        await uninterrupted(receiver.free())
                    yield output
        except KvCorrupt:
            self._received.corrupt()
            raise
        finally:
            receiver.transfer.end()
            metrics.KV_TRANSFERS.labels(f"recv_{receiver.transfer.state}").inc()
            metrics.KV_TRANSFERS_OPEN.remove(receiver.transfer)
            if not freed:
                await uninterrupted(receiver.free())

    def _receiver(self, job: DecodeJob, remote: RemoteKv) -> Receiver:
        hello = self._ranks.hellos[0]
        expected = header_for(
            self._engine.model.sha256,
            prompt_sha256(job.prompt_token_ids),
            len(job.prompt_token_ids),
            hello.shape,
            hello.transport,
            remote.codec,
        )
        return Receiver(self._ranks, self._memory, self._fetch_kv, remote, expected, job.deadline)

    def _count(self, summary: KvSummary) -> None:
        """Metrics; and a word whenever what carries the KV is not what it was, or was not known yet."""
        name = self._ranks.hellos[0].transport
        self._received.verified(summary.num_bytes, summary.seconds, now())
        metrics.KV_BYTES.labels(name, summary.codec, "received").inc(summary.num_bytes)
        metrics.KV_TRANSFER_SECONDS.observe(summary.seconds)
        metrics.KV_BANDWIDTH.observe(summary.num_bytes / max(summary.seconds, 1e-9))
        if summary.transport != self._transport:
            self._transport = summary.transport
            metrics.KV_TRANSPORT_INFO.clear()
            metrics.KV_TRANSPORT_INFO.labels(name, summary.transport).set(1)
            log.info("kv_transport", transport=summary.transport)

    async def _generate(self, request: EngineRequest, deadline: float) -> AsyncGenerator[EngineOutput, None]:
        # A caller that has what it wants closes this generator: no failure, unlike what the span's own exit would say.
        meter = self._meter
        answer: Answer | None = None
        work: Work = "decode" if request.load_transfer else "whole"
        last = now()
        meter.began(work, last)
        with tracer.start_span("decode.engine", record_exception=False, set_status_on_exception=False) as span:
            num_tokens = num_first = 0
            try:
                async with aclosing(bounded(self._engine.generate(request), deadline)) as outputs:
                    async for output in outputs:
                        if num_tokens == 0:
                            span.set_attribute("hexgen2.cached_tokens", output.cached_tokens)
                            span.add_event("first token")
                            answer, num_first = meter.stepping(now()), len(output.tokens)
                            meter.pace.first(now() - last)
                        elif output.tokens:
                            meter.pace.gap(now() - last, len(output.tokens))
                        last = now()
                        num_tokens += len(output.tokens)
                        yield output
            except HexgenError as error:
                span.record_exception(error)
                span.set_status(trace.StatusCode.ERROR, str(error))
                raise
            finally:
                if answer is not None:
                    meter.stepped(answer, num_tokens - num_first, now())
                meter.ended(work, now())
                span.set_attribute("gen_ai.usage.output_tokens", num_tokens)
