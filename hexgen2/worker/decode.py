"""Decode: fetches a prompt's KV, verifies it, makes the tokens after the first; or serves a request colocated.

No token leaves before every rank has said that verified KV is in its engine's blocks.
"""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from time import monotonic

import structlog
from opentelemetry import trace

from hexgen2 import metrics
from hexgen2.engine.base import Engine, EngineOutput, EngineRequest, Sampling
from hexgen2.errors import EngineFailed, HexgenError, KvCorrupt, TransferRefused, Unavailable
from hexgen2.handover import for_decode
from hexgen2.kv.codecs import NONE
from hexgen2.kv.handoff import RecvState, RecvTransfer, header_for
from hexgen2.kv.messages import Failed, Fetched, Loaded, Piece
from hexgen2.kv.ranks import Event, Ranks
from hexgen2.kv.wire import num_chunks, prompt_sha256
from hexgen2.worker.aio import PageQueue, uninterrupted
from hexgen2.worker.prefill import FirstToken, Offer

log = structlog.get_logger(__name__)
tracer = trace.get_tracer("hexgen2")

#: From the engine's first token to the last rank's word that its KV is loaded: a local message, long on its way.
LOADED_TIMEOUT_S = 10.0

#: ``(prefill_address, transfer_id, token) -> messages of FetchKv``.
FetchKv = Callable[[str, str, bytes], AsyncGenerator[Offer | tuple[Piece, ...] | FirstToken, None]]


@dataclass(frozen=True, slots=True)
class RemoteKv:
    """Where the prompt's KV is to be had."""

    transfer_id: str
    token: bytes
    prefill_address: str
    codec: str = NONE


@dataclass(frozen=True, slots=True)
class DecodeJob:
    """One Decode call. ``sampling`` is the client's, counted from the very first token; no ``remote``: colocated."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: Sampling
    remote: RemoteKv | None
    trace_headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class KvSummary:
    """One verified hand-off. ``transport`` says what is beneath it."""

    num_bytes: int
    num_pieces: int
    transport: str
    codec: str
    seconds: float


class _Receiving:
    """The rank events of one transfer, and a future for each state worth waiting for."""

    def __init__(self, transfer: RecvTransfer) -> None:
        loop = asyncio.get_running_loop()
        self.transfer = transfer
        self.verified: asyncio.Future[None] = loop.create_future()
        self.loaded: asyncio.Future[None] = loop.create_future()
        self.first: asyncio.Future[FirstToken] = loop.create_future()
        self.num_bytes = 0
        self.num_pieces = 0
        self.verify_s = 0.0
        self.transport = ""

    def hear(self, rank: int, event: Event) -> None:
        match event:
            case Fetched():
                self.num_bytes += event.num_bytes
                self.num_pieces += event.num_pieces
                self.verify_s = max(self.verify_s, event.verify_s)
                self.transport = event.transport_detail
                self.transfer.fetched(rank)
                if self.transfer.state is RecvState.VERIFIED and not self.verified.done():
                    self.verified.set_result(None)
            case Loaded():
                self.transfer.loaded(rank)
                if self.transfer.state is RecvState.LOADED and not self.loaded.done():
                    self.loaded.set_result(None)
            case Failed():
                self.transfer.fail()
                self._fail(_error(event))
            case _:
                pass

    def _fail(self, error: HexgenError) -> None:
        for future in (self.verified, self.loaded):
            if not future.done():
                future.set_exception(error)
                future.exception()  # retrieved: whoever still waits gets it, and nobody need


def _error(event: Failed) -> HexgenError:
    if event.reason == "corrupt":
        metrics.KV_DIGEST_FAILURES.inc()
        return KvCorrupt(f"KV refused: {event.detail}")
    if event.reason == "invalid":
        return TransferRefused(event.detail)
    return Unavailable(f"KV lost on its way: {event.detail}")


#: What a header may differ in; anything else that a peer says is no label of ours.
_REASONS = (
    *("model", "prompt", "prompt_tokens", "num_layers", "num_kv_heads", "head_dim", "dtype", "codec"),
    *("chunk_tokens", "transport", "page_offsets", "ranks"),
)


def _reason(error: TransferRefused) -> str:
    word = str(error).split(" ", 1)[0].rstrip(":")
    return word if word in _REASONS else "other"


class DecodeWorker:
    """Owns the transfers that arrive at this replica."""

    def __init__(self, engine: Engine, ranks: Ranks, memory: PageQueue, fetch_kv: FetchKv) -> None:
        self._engine = engine
        self._ranks = ranks
        self._memory = memory
        self._fetch_kv = fetch_kv
        self._transport = ""

    async def run(self, job: DecodeJob) -> AsyncGenerator[KvSummary | EngineOutput, None]:
        """The Decode call.

        Colocated: outputs. Else: the summary once all is verified, then outputs after the first token; nothing at
        all when the first token was final.
        """
        if job.remote is None:
            request = EngineRequest(job.request_id, job.prompt_token_ids, job.sampling, trace_headers=job.trace_headers)
            async with aclosing(self._generate(request)) as outputs:
                async for output in outputs:
                    yield output
            return
        remote = job.remote
        hello = self._ranks.hellos[0]
        expected = header_for(
            self._engine.model.sha256,
            prompt_sha256(job.prompt_token_ids),
            len(job.prompt_token_ids),
            hello.shape,
            hello.transport,
            remote.codec,
        )
        receiving = _Receiving(RecvTransfer(expected, len(self._ranks.hellos)))
        # The same transfer may be tried here twice (another call of the gateway): the key is this call's own.
        key = f"{remote.transfer_id}/{secrets.token_hex(8)}"
        freed = False
        try:
            summary, first = await self._fetch(remote, key, receiving)
            if first.finish_reason is not None:
                return
            yield summary
            request = EngineRequest(
                job.request_id,
                (*job.prompt_token_ids, first.token.token_id),
                for_decode(job.sampling),
                load_transfer=key,
                trace_headers=job.trace_headers,
            )
            async with aclosing(self._generate(request)) as outputs:
                async for output in outputs:
                    if not freed:
                        await self._confirm_loaded(receiving)
                        freed = True
                        await uninterrupted(self._free(key))
                    yield output
        finally:
            receiving.transfer.end()
            metrics.KV_TRANSFERS.labels(f"recv_{receiving.transfer.state}").inc()
            if not freed:
                await uninterrupted(self._free(key))

    async def _fetch(self, remote: RemoteKv, key: str, receiving: _Receiving) -> tuple[KvSummary, FirstToken]:
        """Everything of the transfer, verified on every rank, and the first token; or a first token that is final."""
        transfer = receiving.transfer
        began = monotonic()
        with tracer.start_as_current_span("kv.fetch") as span:
            span.set_attribute("hexgen2.kv.transfer_id", remote.transfer_id)
            follow = asyncio.ensure_future(self._follow(remote, key, receiving))
            try:
                first = await self._await_all(receiving, follow)
            except TransferRefused as error:
                transfer.fail()
                metrics.KV_REFUSED.labels(_reason(error)).inc()
                raise
            finally:
                follow.cancel()
                await asyncio.wait((follow,))
            hello = self._ranks.hellos[0]
            summary = KvSummary(
                receiving.num_bytes, receiving.num_pieces, receiving.transport, remote.codec, monotonic() - began
            )
            span.set_attributes(
                {
                    "hexgen2.kv.bytes": summary.num_bytes,
                    "hexgen2.kv.chunks": summary.num_pieces,
                    "hexgen2.kv.transport": summary.transport,
                    "hexgen2.kv.codec": summary.codec,
                    "hexgen2.kv.digest": "verified" if transfer.state is RecvState.VERIFIED else "not needed",
                    "hexgen2.kv.verify_s": receiving.verify_s,
                }
            )
        if first.finish_reason is None:
            metrics.KV_BYTES.labels(hello.transport, summary.codec, "received").inc(summary.num_bytes)
            metrics.KV_TRANSFER_SECONDS.observe(summary.seconds)
            self._note_transport(hello.transport, summary.transport)
        return summary, first

    async def _await_all(self, receiving: _Receiving, follow: asyncio.Future[None]) -> FirstToken:
        """The first token, once it is final or everything is verified.

        FetchKv stays open as long as prefill holds the KV, so its end before that means that prefill is gone.
        """
        verified, first = receiving.verified, receiving.first
        while True:
            if verified.done():
                verified.result()
            if first.done() and (verified.done() or first.result().finish_reason is not None):
                return first.result()
            if follow.done():
                follow.result()
                raise Unavailable("prefill ended the transfer before all of it had arrived")
            waiting = [each for each in (verified, first, follow) if not each.done()]
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)

    async def _follow(self, remote: RemoteKv, key: str, receiving: _Receiving) -> None:
        """Read FetchKv to its end, setting the ranks to work as it goes.

        Staging is acquired once prefill holds its send buffer, never before: were both waited for in any order, two
        requests could each hold what the other needs.
        """
        transfer = receiving.transfer
        async with aclosing(self._fetch_kv(remote.prefill_address, remote.transfer_id, remote.token)) as messages:
            async for message in messages:
                match message:
                    case Offer():
                        transfer.begin(message.header, [s.slice for s in message.sources])
                        chunks = num_chunks(transfer.expected.num_tokens)
                        for source in message.sources:
                            if len(source.page_offsets) != chunks:
                                raise TransferRefused(
                                    f"page_offsets: {len(source.page_offsets)} given, {chunks} chunks expected"
                                )
                        with tracer.start_as_current_span("decode.queue"):
                            pages = await self._memory.acquire(key, chunks)
                        await self._ranks.open_recv(
                            key,
                            remote.token,
                            transfer.expected.num_tokens,
                            remote.codec,
                            message.header.shape.dtype,
                            pages,
                            message.sources,
                            receiving.hear,
                        )
                    case FirstToken():
                        if not receiving.first.done():
                            receiving.first.set_result(message)
                    case pieces:
                        new = transfer.offer(pieces)
                        if new:
                            self._ranks.fetch(key, tuple(new))

    def _note_transport(self, name: str, detail: str) -> None:
        """Say it whenever what carries the KV is not what it was, or was not known yet."""
        if detail != self._transport:
            self._transport = detail
            metrics.KV_TRANSPORT_INFO.clear()
            metrics.KV_TRANSPORT_INFO.labels(name, detail).set(1)
            log.info("kv_transport", transport=detail)

    async def _confirm_loaded(self, receiving: _Receiving) -> None:
        try:
            async with asyncio.timeout(LOADED_TIMEOUT_S):
                await asyncio.shield(receiving.loaded)
        except TimeoutError:
            raise EngineFailed("the engine made a token without having loaded its KV; the token was withheld") from None

    async def _generate(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        with tracer.start_span("decode.engine") as span:
            num_tokens = 0
            async with aclosing(self._engine.generate(request)) as outputs:
                async for output in outputs:
                    if num_tokens == 0:
                        span.set_attribute("hexgen2.cached_tokens", output.cached_tokens)
                        span.add_event("first token")
                    num_tokens += len(output.tokens)
                    yield output
            span.set_attribute("gen_ai.usage.output_tokens", num_tokens)

    async def _free(self, key: str) -> None:
        try:
            await self._ranks.close(key)
        finally:
            self._memory.release(key)
