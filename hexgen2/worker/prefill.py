"""Prefill: makes the first token and the KV of a prompt, and serves that KV for as long as its Prefill call lasts.

``kv.sending`` decides; this moves memory and messages as it says.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from math import inf

from opentelemetry import trace

from hexgen2 import metrics
from hexgen2.engine.base import Engine, EngineRequest, Sampling
from hexgen2.errors import EngineFailed
from hexgen2.handover import first_token_finish, for_prefill
from hexgen2.kv.codecs import NONE
from hexgen2.kv.handoff import FetchMessage, FirstToken, header_for
from hexgen2.kv.messages import Failed, Ready, Source
from hexgen2.kv.ranks import Event, Ranks
from hexgen2.kv.sending import Reader, SendState, SendTransfer, SendTransfers
from hexgen2.kv.wire import num_chunks, prompt_sha256
from hexgen2.worker.aio import Changes, PageQueue, bounded, now, uninterrupted
from hexgen2.worker.meter import Meter

tracer = trace.get_tracer("hexgen2")

#: Prefill and FetchKv are sent at the same time by different processes: how long FetchKv waits for its twin.
ARRIVAL_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class PrefillJob:
    """One Prefill call. ``sampling`` is the client's; without ``hand_over`` no KV is kept."""

    request_id: str
    transfer_id: str
    token: bytes
    prompt_token_ids: tuple[int, ...]
    sampling: Sampling
    hand_over: bool
    codec: str = NONE
    trace_headers: tuple[tuple[str, str], ...] = ()
    #: By ``aio.now``; nothing here waits longer.
    deadline: float = inf


@dataclass(frozen=True, slots=True)
class Admitted:
    """The send buffer is held."""

    queue_s: float


class PrefillWorker:
    """Owns the transfers that leave this replica."""

    def __init__(self, engine: Engine, ranks: Ranks, memory: PageQueue, meter: Meter | None = None) -> None:
        self._meter = meter or Meter()
        self._engine = engine
        self._ranks = ranks
        self._memory = memory
        self._transfers = SendTransfers()
        self._changes: dict[str, Changes] = {}
        self._arrived = Changes()

    async def run(self, job: PrefillJob) -> AsyncGenerator[Admitted | FirstToken, None]:
        """The Prefill call. With ``hand_over`` it does not end by itself after a first token that is not final."""
        if not job.hand_over:
            yield Admitted(0.0)
            yield await self._first_token(job, None)
            return
        began = now()
        transfer = self._transfer(job)
        self._transfers.open(transfer)
        metrics.KV_TRANSFERS_OPEN.add("send", transfer)
        changes = self._changes[job.transfer_id] = Changes()
        self._arrived.notify()

        def hear(_rank: int, event: Event) -> None:
            match event:
                case Ready():
                    transfer.ready(event.pieces)
                case Failed():
                    transfer.fail(EngineFailed(event.detail))
                case _:
                    return
            changes.notify()

        try:
            with tracer.start_as_current_span("prefill.queue") as span:
                span.set_attribute("hexgen2.kv.transfer_id", job.transfer_id)
                num_pages = num_chunks(transfer.header.num_tokens)
                pages = await self._memory.acquire(job.transfer_id, num_pages, job.deadline)
                await self._ranks.open_send(
                    job.transfer_id, job.token, transfer.header.num_tokens, job.codec, pages, hear
                )
            hellos = self._ranks.hellos
            transfer.hold(tuple(Source(h.slice, h.endpoints, tuple(p * h.page_bytes for p in pages)) for h in hellos))
            changes.notify()
            yield Admitted(now() - began)
            first = await self._first_token(job, job.transfer_id)
            transfer.sampled(first)
            changes.notify()
            yield first
            if first.finish_reason is not None:
                return
            while transfer.error is None:
                await changes.next(transfer.deadline)
                transfer.expire(now())
            raise transfer.error
        finally:
            transfer.end()
            changes.notify()
            metrics.KV_TRANSFERS.labels(f"send_{transfer.state}").inc()
            metrics.KV_TRANSFERS_OPEN.remove(transfer)
            if transfer.state is SendState.RELEASED:
                num_bytes = transfer.header.shape.bytes_per_token * transfer.header.num_tokens
                metrics.KV_BYTES.labels(transfer.header.transport, transfer.header.codec, "offered").inc(num_bytes)
            await uninterrupted(self._free(job.transfer_id))

    async def fetch(
        self, transfer_id: str, token: bytes, *, resume: bool = False
    ) -> AsyncGenerator[FetchMessage, None]:
        """The FetchKv call: the offer, pieces as they become ready, the first token. Ends with the transfer.

        ``resume``: the caller has had the offer already, so that there is no Prefill call to wait for.

        Raises:
            TransferNotFound: no such transfer, or not its token.
            TransferEnded: the Prefill call is over.
        """
        transfer = await self._find(transfer_id, token, now() + (0.0 if resume else ARRIVAL_TIMEOUT_S))
        reader, changes = Reader(transfer), self._changes[transfer_id]
        while not reader.over:
            message = reader.next()
            if message is None:
                await changes.next()
            else:
                yield message

    async def _find(self, transfer_id: str, token: bytes, until: float) -> SendTransfer:
        while (found := self._transfers.find(transfer_id, token, now(), until)) is None:
            await self._arrived.next(until)
        return found

    def _transfer(self, job: PrefillJob) -> SendTransfer:
        hellos = self._ranks.hellos
        header = header_for(
            self._engine.model.sha256,
            prompt_sha256(job.prompt_token_ids),
            len(job.prompt_token_ids),
            hellos[0].shape,
            hellos[0].transport,
            job.codec,
        )
        return SendTransfer(job.transfer_id, job.token, header, tuple(h.slice for h in hellos), job.deadline)

    async def _first_token(self, job: PrefillJob, send_transfer: str | None) -> FirstToken:
        request = EngineRequest(
            request_id=job.request_id,
            prompt_token_ids=job.prompt_token_ids,
            sampling=for_prefill(job.sampling),
            send_transfer=send_transfer,
            trace_headers=job.trace_headers,
        )
        began = now()
        self._meter.began("prefill", began)
        try:
            with tracer.start_as_current_span("prefill.engine") as span:
                span.set_attribute("gen_ai.usage.input_tokens", len(job.prompt_token_ids))
                async with aclosing(bounded(self._engine.generate(request), job.deadline)) as outputs:
                    async for output in outputs:
                        if output.tokens:
                            self._meter.pace.first(now() - began)
                            self._meter.prefilled(len(job.prompt_token_ids) - output.cached_tokens, now())
                            span.set_attribute("hexgen2.cached_tokens", output.cached_tokens)
                            finish = first_token_finish(job.sampling, output.finish_reason)
                            return FirstToken(output.tokens[0], finish, output.cached_tokens)
            raise EngineFailed("the engine ended a request without a token")
        finally:
            self._meter.ended("prefill", now())

    async def _free(self, transfer_id: str) -> None:
        try:
            await self._ranks.close(transfer_id)
        finally:
            self._memory.release(transfer_id)
            self._transfers.close(transfer_id)
            del self._changes[transfer_id]
