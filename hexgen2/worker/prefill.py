"""Prefill: makes the first token and the KV of a prompt, and serves that KV for as long as its Prefill call lasts."""

import asyncio
import hmac
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from time import monotonic

from opentelemetry import trace

from hexgen2 import metrics
from hexgen2.engine.base import Engine, EngineRequest, FinishReason, SampledToken, Sampling
from hexgen2.errors import EngineFailed, InvalidRequest, TransferNotFound, Unavailable
from hexgen2.handover import first_token_finish, for_prefill
from hexgen2.kv.codecs import NONE
from hexgen2.kv.handoff import Header, SendState, SendTransfer, header_for
from hexgen2.kv.messages import Failed, Piece, Ready, Source
from hexgen2.kv.ranks import Event, Ranks
from hexgen2.kv.wire import num_chunks, prompt_sha256
from hexgen2.worker.aio import PageQueue, uninterrupted

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


@dataclass(frozen=True, slots=True)
class Admitted:
    """The send buffer is held."""

    queue_s: float


@dataclass(frozen=True, slots=True)
class FirstToken:
    """``finish_reason`` is set when this token ends the answer."""

    token: SampledToken
    finish_reason: FinishReason | None
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Offer:
    """First message of FetchKv."""

    header: Header
    sources: tuple[Source, ...]


class _Held:
    """One transfer and who follows it."""

    def __init__(self, token: bytes, transfer: SendTransfer) -> None:
        self.token = token
        self.transfer = transfer
        self.pages: tuple[int, ...] = ()
        self.first: FirstToken | None = None
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._changed = asyncio.Event()

    def notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def changed(self) -> None:
        await self._changed.wait()

    def hear(self, _rank: int, event: Event) -> None:
        match event:
            case Ready():
                self.transfer.ready(event.pieces)
                self.notify()
            case Failed() if not self.failed.done():
                self.failed.set_exception(EngineFailed(event.detail))
                self.failed.exception()  # retrieved: the call may have ended already
            case _:
                pass


class PrefillWorker:
    """Owns the transfers that leave this replica."""

    def __init__(self, engine: Engine, ranks: Ranks, memory: PageQueue) -> None:
        self._engine = engine
        self._ranks = ranks
        self._memory = memory
        self._held: dict[str, _Held] = {}
        self._arrived = asyncio.Event()

    async def run(self, job: PrefillJob) -> AsyncGenerator[Admitted | FirstToken, None]:
        """The Prefill call. With ``hand_over`` it does not end by itself after a first token that is not final."""
        if not job.hand_over:
            yield Admitted(0.0)
            yield await self._first_token(job, None)
            return
        if job.transfer_id in self._held:
            raise InvalidRequest("transfer.transfer_id", "a transfer of that id is under way")
        hello = self._ranks.hellos[0]
        num_tokens = len(job.prompt_token_ids)
        header = header_for(
            self._engine.model.sha256,
            prompt_sha256(job.prompt_token_ids),
            num_tokens,
            hello.shape,
            hello.transport,
            job.codec,
        )
        held = _Held(job.token, SendTransfer(header, [h.slice for h in self._ranks.hellos]))
        self._held[job.transfer_id] = held
        self._arrived.set()
        self._arrived = asyncio.Event()
        try:
            began = monotonic()
            with tracer.start_as_current_span("prefill.queue"):
                held.pages = await self._memory.acquire(job.transfer_id, num_chunks(num_tokens))
                await self._ranks.open_send(job.transfer_id, job.token, num_tokens, job.codec, held.pages, held.hear)
            held.transfer.hold()
            held.notify()
            yield Admitted(monotonic() - began)
            held.first = await self._first_token(job, job.transfer_id)
            held.notify()
            yield held.first
            if held.first.finish_reason is None:
                await held.failed
        finally:
            held.transfer.end()
            held.notify()
            metrics.KV_TRANSFERS.labels(f"send_{held.transfer.state}").inc()
            await uninterrupted(self._free(job.transfer_id))

    async def fetch(
        self, transfer_id: str, token: bytes
    ) -> AsyncGenerator[Offer | tuple[Piece, ...] | FirstToken, None]:
        """The FetchKv call: the offer, pieces as they become ready, the first token. Ends with the transfer.

        Raises:
            TransferNotFound: no such transfer, or not its token.
            Unavailable: the Prefill call ended first.
        """
        held = await self._find(transfer_id)
        if held is None or not hmac.compare_digest(held.token, token):
            raise TransferNotFound(f"no transfer {transfer_id} is held here for that token")
        while held.transfer.state is SendState.QUEUED:
            await held.changed()
        if held.transfer.over:
            raise Unavailable(f"transfer {transfer_id} has ended")
        sources = tuple(
            Source(h.slice, h.endpoint, tuple(page * h.page_bytes for page in held.pages)) for h in self._ranks.hellos
        )
        yield Offer(held.transfer.header, sources)
        num_sent, first_sent = 0, False
        while num_sent < held.transfer.num_expected or not first_sent:
            pieces = tuple(held.transfer.pieces[num_sent:])
            if held.first is not None and not first_sent:
                first_sent = True
                yield held.first
                if held.first.finish_reason is not None:
                    return
            elif pieces and not held.transfer.over:
                num_sent += len(pieces)
                yield pieces
            elif held.transfer.over:
                raise Unavailable(f"transfer {transfer_id} ended before it was complete")
            else:
                await held.changed()
        # The reads of what was announced may still run: the call stays open, so that its keepalive watches over them.
        while not held.transfer.over:
            await held.changed()

    async def _find(self, transfer_id: str) -> _Held | None:
        try:
            async with asyncio.timeout(ARRIVAL_TIMEOUT_S):
                while transfer_id not in self._held:
                    await self._arrived.wait()
        except TimeoutError:
            return None
        return self._held[transfer_id]

    async def _first_token(self, job: PrefillJob, send_transfer: str | None) -> FirstToken:
        request = EngineRequest(
            request_id=job.request_id,
            prompt_token_ids=job.prompt_token_ids,
            sampling=for_prefill(job.sampling),
            send_transfer=send_transfer,
            trace_headers=job.trace_headers,
        )
        with tracer.start_as_current_span("prefill.engine") as span:
            span.set_attribute("gen_ai.usage.input_tokens", len(job.prompt_token_ids))
            async with aclosing(self._engine.generate(request)) as outputs:
                async for output in outputs:
                    if output.tokens:
                        span.set_attribute("hexgen2.cached_tokens", output.cached_tokens)
                        finish = first_token_finish(job.sampling, output.finish_reason)
                        return FirstToken(output.tokens[0], finish, output.cached_tokens)
        raise EngineFailed("the engine ended a request without a token")

    async def _free(self, transfer_id: str) -> None:
        try:
            await self._ranks.close(transfer_id)
        finally:
            self._memory.release(transfer_id)
            del self._held[transfer_id]
