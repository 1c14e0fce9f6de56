"""The gateway behind both its faces: admits requests, knows the model, and makes an answer of tokens."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from time import monotonic

from opentelemetry import trace

from hexgen2 import metrics
from hexgen2.config import GatewayConfig
from hexgen2.engine.base import FinishReason, SampledToken
from hexgen2.errors import HexgenError, InvalidRequest, ModelNotFound, Overloaded, Unavailable
from hexgen2.gateway import observe
from hexgen2.gateway.answer import Answer
from hexgen2.gateway.dispatch import Dispatch, PlanSource
from hexgen2.gateway.job import Job, Piece, Summary, Usage
from hexgen2.gateway.keys import Keys
from hexgen2.gateway.limits import ModelLimits, max_prompt_tokens
from hexgen2.gateway.measure import Ended, Measures
from hexgen2.gateway.peers import Peers
from hexgen2.gateway.runner import follow
from hexgen2.observed import Counter, Slo
from hexgen2.plan import GatewayLoad, ReplicaState, Role, RouteLoad
from hexgen2.routing import RouteKey
from hexgen2.security.tls import TlsFiles
from hexgen2.text.tokenizer import TextModel

#: Shorter texts are tokenised faster than a thread takes over.
_INLINE_CHARS = 4096

Emit = Callable[[Piece], Awaitable[None]]


class Gateway:
    """See the module. ``plans`` is the newest plan; ``text`` the model's tokenizer. ``close`` when done.

    ``elsewhere`` tells what other gateways, by the id of this one, have in flight on each route.
    """

    def __init__(
        self,
        config: GatewayConfig,
        text: TextModel,
        plans: PlanSource,
        tls: TlsFiles | None = None,
        elsewhere: Callable[[str], Mapping[RouteKey, int]] = lambda gateway_id: {},
    ) -> None:
        self.config = config
        self.gateway_id = config.gateway_id or f"gateway-{secrets.token_hex(4)}"
        self.text = text
        self.model_name = config.served_model_name or Path(config.model).resolve().name
        self.keys = Keys(config.api_keys)
        self.draining = False
        self.num_running = 0
        self._plans = plans
        self._dispatch = Dispatch(plans, elsewhere=lambda: elsewhere(self.gateway_id))
        self._measures = Measures(monotonic())
        self._counter = Counter()
        self._peers = Peers(self._planned_addresses, tls)
        self._idle = asyncio.Event()
        self._idle.set()

    def ready(self) -> bool:
        """Whether a request could be served now."""
        return not self.draining and self._dispatch.usable()

    def check_model(self, name: str | None) -> None:
        """Raise ModelNotFound unless that is the served model; None and "" mean it."""
        if name and name != self.model_name:
            raise ModelNotFound(f"the model {name[:200]!r} does not exist here; {self.model_name!r} is served")

    def limits(self) -> ModelLimits:
        """What the model allows. Unavailable while neither configuration nor a plan says how long a context may be."""
        # A replica that still starts does not know its own. Prefill's matter while there is no other.
        replicas = [each for each in self._plans.plan.replicas if each.max_model_len]
        whole = [each.max_model_len for each in replicas if each.role is not Role.PREFILL]
        lengths = whole or [each.max_model_len for each in replicas]
        if self.config.max_model_len is not None:
            lengths.append(self.config.max_model_len)
        if not lengths:
            raise Unavailable("no replica is ready yet; try again shortly")
        return ModelLimits(
            min(lengths),
            self.text.vocab_size,
            self.text.eos_token_ids,
            dict(self.text.sampling_defaults),
            max_prompt_tokens=min(filter(None, map(max_prompt_tokens, replicas)), default=0),
        )

    async def encode(self, text: str, field: str) -> tuple[int, ...]:
        """Token ids of a plain prompt, off the event loop when it is long."""
        if not text:
            raise InvalidRequest(field, "must not be empty")
        if len(text) <= _INLINE_CHARS:
            return self.text.encode(text)
        return await asyncio.to_thread(self.text.encode, text)

    async def encode_chat(self, messages: list[dict[str, str]]) -> tuple[int, ...]:
        """Token ids of a conversation, likewise."""
        if sum(len(message["content"]) for message in messages) <= _INLINE_CHARS:
            return self.text.encode_chat(messages)
        return await asyncio.to_thread(self.text.encode_chat, messages)

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """For the length of a request, from before its body is read.

        Raises:
            Unavailable: the gateway is stopping.
            Overloaded: as many requests as it takes at once are there already.
        """
        if self.draining:
            raise Unavailable("the gateway is stopping")
        if self.num_running >= self.config.max_concurrent_requests:
            raise Overloaded(f"{self.num_running} requests are running, which is the limit; try again shortly")
        self.num_running += 1
        self._idle.clear()
        metrics.NUM_REQUESTS_RUNNING.set(self.num_running)
        try:
            yield
        finally:
            self.num_running -= 1
            metrics.NUM_REQUESTS_RUNNING.set(self.num_running)
            if not self.num_running:
                self._idle.set()

    async def generate(self, job: Job, emit: Emit, watch: observe.Stopwatch, deadline: float) -> Summary:
        """Serve an admitted request, within the current span. The last piece has a finish reason.

        ``deadline`` is by ``time.monotonic``.

        Raises:
            HexgenError: what the client is to be told. Nothing runs any more then.
        """
        span = trace.get_current_span()
        observe.describe(span, job)
        plan = self._dispatch.plan
        observe.link_plan(span, plan.epoch, plan.traceparent)
        answer = Answer(job, self.text.detokenizer(job.prompt_token_ids))
        finish_reason = FinishReason.STOP

        async def give(tokens: tuple[SampledToken, ...], finish: FinishReason | None) -> bool:
            nonlocal finish_reason
            piece = answer.add(tokens, finish)
            watch.tokens(len(piece.tokens))
            finish_reason = piece.finish_reason or finish_reason
            await emit(piece)
            return answer.finished

        self._measures.arrived(monotonic())
        self._counter.arrived()
        try:
            async with observe.within(deadline, watch):
                served = await follow(job, self._dispatch, self._peers, give, deadline)
        except HexgenError as error:
            if not observe.is_clients_fault(error):
                self._measures.failed(monotonic())
                self._counter.failed()
            raise
        usage = Usage(len(job.prompt_token_ids), answer.num_tokens, served.cached_tokens)
        observe.succeeded(span, watch, usage, finish_reason)
        self._counter.ended(usage.prompt_tokens, usage.completion_tokens, watch.ttft_s, watch.tpot_s)
        self._measures.ended(
            Ended(
                monotonic(),
                usage.prompt_tokens,
                usage.completion_tokens,
                watch.ttft_s,
                watch.tpot_s,
                served.targets.key,
            )
        )
        return Summary(
            usage=usage,
            trace_id=observe.trace_id(span),
            ttft_s=watch.ttft_s,
            tpot_s=watch.tpot_s,
            e2e_s=watch.e2e_s,
            prefill_replica_id=served.targets.prefill.replica_id if served.targets.prefill else "",
            decode_replica_id=served.targets.decode.replica_id if served.targets.decode else "",
            kv=served.kv,
        )

    def load(self) -> GatewayLoad:
        """What it has in flight and measures now."""
        now_s = monotonic()
        in_flight, finished = self._dispatch.in_flight, self._measures.by_route(now_s)
        keys = sorted({*in_flight, *finished})
        routes = (RouteLoad(*key, in_flight.get(key, 0), finished.get(key, 0)) for key in keys)
        return GatewayLoad(self.gateway_id, tuple(routes), self._measures.measured(now_s), self._counter.tally)

    def take_slo(self, slo: Slo) -> None:
        """What counts as good from now on."""
        self._counter.slo = slo

    async def plan_changed(self) -> bool:
        """Let go of what the plan before needed, and of calls to lost replicas that are silent.

        Returns:
            Whether calls to lost replicas go on: ask again soon, though nothing changes.
        """
        await self._peers.prune()
        plan, statuses = self._plans.plan, self._plans.statuses
        lost = {key for key, status in statuses.items() if status.state is ReplicaState.LOST}
        return self._peers.end_silent(each.address for each in plan.replicas if each.replica_id in lost)

    async def drain(self, grace_s: float) -> bool:
        """Take no more requests and wait for those that run; whether all ended in time."""
        self.draining = True
        try:
            async with asyncio.timeout(grace_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """Free everything. Idempotent."""
        self.draining = True
        await self._peers.close()

    def _planned_addresses(self) -> frozenset[str]:
        return frozenset(replica.address for replica in self._plans.plan.replicas)
