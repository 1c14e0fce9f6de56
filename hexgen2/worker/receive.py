"""One KV hand-off to this replica: FetchKv followed, ranks set to work, staging held until ``free``.

``kv.receiving`` decides; this moves memory and messages as it says.
"""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from time import time_ns

from opentelemetry import trace

from hexgen2 import metrics
from hexgen2.errors import EngineFailed, HexgenError, KvCorrupt, TransferRefused, Unavailable
from hexgen2.kv.codecs import NONE
from hexgen2.kv.handoff import FetchMessage, FirstToken, Header, Offer
from hexgen2.kv.messages import Failed, Fetched, Loaded
from hexgen2.kv.ranks import Event, Ranks
from hexgen2.kv.receiving import RecvState, RecvTransfer
from hexgen2.kv.wire import num_chunks
from hexgen2.worker.aio import Changes, PageQueue, now, owned

tracer = trace.get_tracer("hexgen2")

#: From the engine's first token to the last rank's word that its KV is loaded: a local message, long on its way.
LOADED_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class RemoteKv:
    """Where the prompt's KV is to be had."""

    transfer_id: str
    token: bytes
    prefill_address: str
    codec: str = NONE


#: ``(where, resume) -> messages of one FetchKv call``; ``resume``: an earlier call has had the offer.
FetchKv = Callable[[RemoteKv, bool], AsyncGenerator[FetchMessage, None]]


@dataclass(frozen=True, slots=True)
class KvSummary:
    """One verified hand-off. ``transport`` says what is beneath it."""

    num_bytes: int
    num_pieces: int
    transport: str
    codec: str
    seconds: float
    #: Of these, from when all of it was there to be read, and there was memory for it.
    exposed_s: float = 0.0


class Receiver:
    """See the module. ``expected`` is what this replica was asked to decode; ``deadline`` is by ``aio.now``."""

    def __init__(
        self, ranks: Ranks, memory: PageQueue, fetch_kv: FetchKv, remote: RemoteKv, expected: Header, deadline: float
    ) -> None:
        self.transfer = RecvTransfer(expected, len(ranks.hellos), deadline)
        # The same transfer may be tried here twice (another call of the gateway): the key is this call's own.
        self.key = f"{remote.transfer_id}/{secrets.token_hex(8)}"
        self.summary: KvSummary | None = None
        self._ranks = ranks
        self._memory = memory
        self._fetch_kv = fetch_kv
        self._remote = remote
        self._num_pages = num_chunks(expected.num_tokens)
        self._changes = Changes()
        # What ranks said, and when, in nanoseconds since the epoch: for spans.
        self._opened_ns = 0
        self._all_there_s = 0.0
        self._fetched: dict[int, tuple[Fetched, int]] = {}
        self._loaded_ns = 0

    async def fetch(self) -> FirstToken:
        """The first token, once it is final or everything is verified on every rank; then there is a ``summary``.

        Raises:
            HexgenError: why nothing of the transfer may be used.
        """
        # Before prefill is asked: whoever finds no room here should hear of it before it has a first token.
        self._memory.check(self._num_pages)
        transfer, began = self.transfer, now()
        with tracer.start_as_current_span("kv.fetch") as span:
            span.set_attribute("hexgen2.kv.transfer_id", self._remote.transfer_id)
            async with owned(self._follow()) as follow:
                follow.add_done_callback(lambda _: self._changes.notify())
                while not transfer.settled and not follow.done():
                    await self._changes.next(transfer.deadline)
                    transfer.expire(now())
            if isinstance(transfer.error, TransferRefused):
                metrics.KV_REFUSED.labels(_reason(transfer.error)).inc()
            self._check()
            assert transfer.first is not None, "it is settled without an error"
            self.summary = self._summarise(now() - began)
            span.set_attributes(
                {
                    "hexgen2.kv.bytes": self.summary.num_bytes,
                    "hexgen2.kv.chunks": self.summary.num_pieces,
                    "hexgen2.kv.transport": self.summary.transport,
                    "hexgen2.kv.codec": self.summary.codec,
                    "hexgen2.kv.fetches": transfer.num_fetches,
                    "hexgen2.kv.digest": "verified" if transfer.state is RecvState.VERIFIED else "not needed",
                }
            )
            for rank, (event, end_ns) in sorted(self._fetched.items()):
                self._tell(rank, event, end_ns)
        return transfer.first

    async def confirm_loaded(self, load_ns: int) -> None:
        """Return when every rank's engine has the KV in its blocks. ``load_ns``: when the engine got the request.

        Raises:
            EngineFailed: they have not, and yet the engine made a token.
        """
        until = min(now() + LOADED_TIMEOUT_S, self.transfer.deadline)
        while self.transfer.state is RecvState.VERIFIED and now() < until:
            await self._changes.next(until)
        self._check()
        if self.transfer.state is not RecvState.LOADED:
            raise EngineFailed("the engine made a token without having loaded its KV; the token was withheld")
        span = tracer.start_span("kv.load", start_time=load_ns)
        span.set_attribute("hexgen2.kv.transfer_id", self._remote.transfer_id)
        span.end(self._loaded_ns)

    async def free(self) -> None:
        """Give the staging back; on return nothing touches it."""
        try:
            await self._ranks.close(self.key)
        finally:
            self._memory.release(self.key)

    async def _follow(self) -> None:
        """Call FetchKv, again where that may help, and tell the transfer of all that comes."""
        transfer = self.transfer
        async with asyncio.TaskGroup() as group:
            again = True
            while again:
                error: HexgenError | None = None
                try:
                    async with aclosing(self._fetch_kv(self._remote, transfer.offer_seen)) as messages:
                        async for message in messages:
                            match message:
                                case Offer():
                                    transfer.offered(message)
                                case FirstToken():
                                    transfer.sampled(message)
                                    self._all_there_s = now()
                                case pieces:
                                    if new := transfer.ready(pieces):
                                        self._ranks.fetch(self.key, new)
                                    if offer := transfer.wanted():
                                        group.create_task(self._stage(offer))
                            self._changes.notify()
                except HexgenError as failed:
                    error = failed
                again = transfer.fetch_ended(error)
                metrics.KV_REFETCHES.inc(again)
                self._changes.notify()

    async def _stage(self, offer: Offer) -> None:
        """Acquire staging and begin.

        Only once there is KV to read. Earlier it would be held while the request waits for prefill's engine; and
        before prefill holds its send buffer two requests could each hold what the other needs.
        """
        transfer = self.transfer
        try:
            with tracer.start_as_current_span("decode.queue"):
                pages = await self._memory.acquire(self.key, self._num_pages, transfer.deadline)
            await self._ranks.open_recv(
                self.key,
                self._remote.token,
                transfer.expected.num_tokens,
                self._remote.codec,
                offer.header.shape.dtype,
                pages,
                offer.sources,
                self._hear,
            )
        except HexgenError as error:
            transfer.fail(error)
        self._opened_ns = time_ns()
        self._all_there_s = max(self._all_there_s, now())
        if announced := transfer.opened():
            self._ranks.fetch(self.key, announced)
        self._changes.notify()

    def _hear(self, rank: int, event: Event) -> None:
        match event:
            case Fetched():
                self._fetched.setdefault(rank, (event, time_ns()))
                self.transfer.fetched(rank)
            case Loaded():
                self._loaded_ns = time_ns()
                self.transfer.loaded(rank)
            case Failed():
                self.transfer.fail(_error(event))
            case _:
                return
        self._changes.notify()

    def _tell(self, rank: int, event: Fetched, end_ns: int) -> None:
        """Spans and figures of what a rank did: each route's stream, and verifying, which overlaps with them."""
        for share in event.routes:
            seconds = max(share.ended_ns - share.began_ns, 1) / 1e9
            route = tracer.start_span("kv.route", start_time=share.began_ns)
            route.set_attributes(
                {
                    "hexgen2.kv.rank": rank,
                    "hexgen2.kv.route": share.name,
                    "hexgen2.kv.bytes": share.num_bytes,
                    "hexgen2.kv.bandwidth": share.num_bytes / seconds,
                }
            )
            route.end(share.ended_ns)
            metrics.KV_ROUTE_BYTES.labels(share.name).inc(share.num_bytes)
            metrics.KV_ROUTE_BYTES_PER_SECOND.labels(share.name).set(share.num_bytes / seconds)
        verify = tracer.start_span("kv.verify", start_time=self._opened_ns)
        verify.set_attributes(
            {
                "hexgen2.kv.rank": rank,
                "hexgen2.kv.bytes": event.num_bytes,
                "hexgen2.kv.chunks": event.num_pieces,
                "hexgen2.kv.verify_s": event.verify_s,
            }
        )
        verify.end(end_ns)

    def _check(self) -> None:
        if self.transfer.error is not None:
            raise self.transfer.error

    def _summarise(self, seconds: float) -> KvSummary:
        events = [event for event, _ in self._fetched.values()]
        return KvSummary(
            num_bytes=sum(event.num_bytes for event in events),
            num_pieces=sum(event.num_pieces for event in events),
            transport=events[-1].transport_detail if events else "",
            codec=self._remote.codec,
            seconds=seconds,
            exposed_s=now() - self._all_there_s,
        )


def _error(event: Failed) -> HexgenError:
    if event.reason == "corrupt":
        metrics.KV_DIGEST_FAILURES.inc()
        return KvCorrupt(f"KV refused: {event.detail}")
    if event.reason == "invalid":
        return TransferRefused(event.detail)
    return Unavailable(f"KV lost on its way: {event.detail}")


#: What an offer may be refused for; anything else that a peer says is no label of ours.
_REASONS = (
    *("model", "prompt", "prompt_tokens", "num_layers", "num_kv_heads", "head_dim", "dtype", "codec"),
    *("chunk_tokens", "transport", "page_offsets", "ranks", "offer", "pieces", "first_token"),
)


def _reason(error: TransferRefused) -> str:
    word = str(error).split(" ", 1)[0].rstrip(":")
    return word if word in _REASONS else "other"
