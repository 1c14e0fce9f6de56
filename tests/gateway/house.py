"""A gateway on real sockets, with prefill and decode workers whose every message a test scripts."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from hexgen2.config import GatewayConfig
from hexgen2.gateway.gateway import Gateway
from hexgen2.plan import Load, Plan, Replica, ReplicaState, ReplicaStatus, Role, Route
from hexgen2.rpc.client import channel
from hexgen2.rpc.server import GrpcServer
from hexgen2.text.tokenizer import TextModel
from hexgen2.v1 import decode_pb2, decode_pb2_grpc, gateway_pb2_grpc, prefill_pb2, prefill_pb2_grpc, types_pb2
from hexgen2.web.guard import Limits
from hexgen2.web.server import HttpServer
from services.gateway.grpc_api import GatewayServicer
from services.gateway.http_api import make_app
from tests.eventually import eventually
from tests.models import EOS_TOKEN_ID

EOS = EOS_TOKEN_ID
MAX_MODEL_LEN = 64
MODEL = "tiny"
STOP, LENGTH = types_pb2.FINISH_REASON_STOP, types_pb2.FINISH_REASON_LENGTH
MORE = types_pb2.FINISH_REASON_UNSPECIFIED

Script = Callable[[Any], AsyncGenerator[Any, None]]


@dataclass
class Call:
    """One call that a worker got."""

    request: Any
    #: Set when the worker's handler is over.
    over: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: bool = False

    async def ended(self) -> bool:
        """Wait for its end; whether it was cancelled."""
        async with asyncio.timeout(10):
            await self.over.wait()
        return self.cancelled


class Worker(prefill_pb2_grpc.PrefillServicer, decode_pb2_grpc.DecodeServicer):
    """Serves one role; ``script`` makes the responses of the next calls."""

    def __init__(self, role: Role, number: int) -> None:
        self.role = role
        self.replica_id = f"{role}-{number}"
        self.calls: list[Call] = []
        self.called = asyncio.Event()
        self.script: Script = silent
        self.server = GrpcServer("127.0.0.1:0")
        self.address = ""

    async def start(self) -> None:
        if self.role is Role.PREFILL:
            self.server.add(prefill_pb2_grpc.add_PrefillServicer_to_server, self, "hexgen2.v1.Prefill")
        else:
            self.server.add(decode_pb2_grpc.add_DecodeServicer_to_server, self, "hexgen2.v1.Decode")
        self.address = await self.server.start()

    async def Prefill(self, request: prefill_pb2.PrefillRequest, context: Any) -> AsyncIterator[Any]:
        async for response in self._serve(request):
            yield response

    async def Decode(self, request: decode_pb2.DecodeRequest, context: Any) -> AsyncIterator[Any]:
        async for response in self._serve(request):
            yield response

    def FetchKv(self, request: prefill_pb2.FetchKvRequest, context: Any) -> AsyncIterator[Any]:
        """These workers exchange no KV."""
        return silent(request)

    async def _serve(self, request: Any) -> AsyncIterator[Any]:
        call = Call(request)
        self.calls.append(call)
        self.called.set()
        try:
            async with aclosing(self.script(request)) as responses:
                async for response in responses:
                    yield response
        except (asyncio.CancelledError, GeneratorExit):
            call.cancelled = True
            raise
        finally:
            call.over.set()

    async def first_call(self) -> Call:
        """Once it is there."""
        await self.called.wait()
        return self.calls[0]

    @property
    def replica(self) -> Replica:
        return Replica(self.replica_id, self.role, self.address, MODEL, b"", self.address, MAX_MODEL_LEN, "memory")


async def silent(_: Any) -> AsyncGenerator[Any, None]:
    """Accepts the call and says nothing."""
    await asyncio.Event().wait()
    yield


class Plans:
    """The newest plan, as a test sets it."""

    def __init__(self) -> None:
        self.plan = Plan(0)
        self.statuses: Mapping[str, ReplicaStatus] = {}

    async def wait_changed(self) -> None:
        """Soon: tests set a plan without a word."""
        await asyncio.sleep(0.01)


@dataclass
class House:
    """What a test talks to."""

    gateway: Gateway
    text: TextModel
    plans: Plans
    prefills: list[Worker]
    decodes: list[Worker]
    http: httpx.AsyncClient
    http_address: str
    stub: "gateway_pb2_grpc.GatewayAsyncStub"

    def ids(self, text: str) -> list[int]:
        """One token per byte."""
        return list(self.text.encode(text))

    def set_states(self, **states: ReplicaState) -> None:
        """By ``prefill_0=...``; the others are READY."""
        self.plans.statuses = {
            replica.replica_id: ReplicaStatus(
                replica.replica_id, states.get(replica.replica_id.replace("-", "_"), ReplicaState.READY), Load()
            )
            for replica in self.plans.plan.replicas
        }

    def answers(self, text: str, *, eos: bool = True, cached: int = 0) -> None:
        """Script all workers to answer ``text``: its first byte from prefill, the rest token by token from decode."""
        ids = [*self.ids(text), *([EOS] if eos else [])]
        for worker in self.prefills:
            worker.script = first_token(ids[0], STOP if ids == [EOS] else MORE, cached=cached)
        for worker in self.decodes:
            worker.script = rest(ids[1:], STOP if eos else LENGTH)

    def prompts(self, workers: list[Worker]) -> list[str]:
        """Of all calls that they got."""
        calls = (call for worker in workers for call in worker.calls)
        return [b"".join(map(self.text.token_bytes, call.request.prompt_token_ids)).decode() for call in calls]

    def knows(self, prompt: str, text: str) -> None:
        """Script all workers to answer ``prompt`` with ``text``, and any part of that answer with what follows it."""
        ids, before = [*self.ids(text), EOS], len(self.ids(prompt))

        def left(request: Any) -> list[int]:
            given = list(request.prompt_token_ids)[before:]
            assert given == ids[: len(given)], "not the prompt and what was given"
            assert request.sampling.max_tokens >= len(ids) - len(given)
            return ids[len(given) :]

        def prefill(request: Any) -> AsyncGenerator[Any, None]:
            token, *more = left(request)
            return first_token(token, MORE if more else STOP)(request)

        def decode(request: Any) -> AsyncGenerator[Any, None]:
            return rest(left(request)[1 if request.HasField("remote_kv") else 0 :], STOP)(request)

        for worker in (*self.prefills, *self.decodes):
            worker.script = prefill if worker.role is Role.PREFILL else decode


def first_token(token_id: int, finish: Any = MORE, *, cached: int = 0, logprob: float | None = None) -> Script:
    """Prefill: admitted, the first token, then the KV is held until the call is ended."""

    async def script(request: prefill_pb2.PrefillRequest) -> AsyncGenerator[prefill_pb2.PrefillResponse, None]:
        yield prefill_pb2.PrefillResponse(admitted=prefill_pb2.Admitted(queue_s=0.0))
        final = finish
        if finish == MORE and request.sampling.max_tokens == 1:
            final = LENGTH
        token = types_pb2.Token(token_id=token_id, logprob=logprob)
        yield prefill_pb2.PrefillResponse(
            first_token=prefill_pb2.FirstToken(token=token, finish_reason=final, cached_tokens=cached)
        )
        if request.hand_over and final == MORE:
            await asyncio.Event().wait()

    return script


def verified() -> decode_pb2.DecodeResponse:
    summary = types_pb2.KvSummary(bytes=1000, pieces=4, transport="memory", codec="none", seconds=0.01)
    return decode_pb2.DecodeResponse(kv_verified=decode_pb2.KvVerified(summary=summary))


def tokens(ids: list[int], finish: Any = MORE) -> decode_pb2.DecodeResponse:
    return decode_pb2.DecodeResponse(
        tokens=decode_pb2.Tokens(tokens=[types_pb2.Token(token_id=each) for each in ids], finish_reason=finish)
    )


def rest(ids: list[int], finish: Any = STOP, *, then: BaseException | None = None, hold: bool = False) -> Script:
    """Decode: the KV is verified (when there is any), then a token at a time; ``then`` is raised before the end."""

    async def script(request: decode_pb2.DecodeRequest) -> AsyncGenerator[decode_pb2.DecodeResponse, None]:
        if request.HasField("remote_kv"):
            yield verified()
        for number, token_id in enumerate(ids):
            last = number == len(ids) - 1 and then is None and not hold
            yield tokens([token_id], finish if last else MORE)
        if then is not None:
            raise then
        if hold:
            await asyncio.Event().wait()

    return script


def fails(error: BaseException, after: Worker | None = None) -> Script:
    """The call fails at once, or as soon as ``after`` has been called."""

    async def script(_: Any) -> AsyncGenerator[Any, None]:
        for _ in ():
            yield
        if after is not None:
            await after.called.wait()
        raise error

    return script


@asynccontextmanager
async def house(folder: Path, prefills: int = 1, decodes: int = 1, **config: Any) -> AsyncIterator[House]:
    """Everything up, every route planned with the same flow."""
    plans = Plans()
    workers: dict[Role, list[Worker]] = {Role.PREFILL: [], Role.DECODE: []}
    async with AsyncExitStack() as stack:
        for role, count in ((Role.PREFILL, prefills), (Role.DECODE, decodes)):
            for number in range(count):
                worker = Worker(role, number)
                workers[role].append(worker)
                await worker.start()
                stack.push_async_callback(worker.server.stop, 0)
        everybody = [*workers[Role.PREFILL], *workers[Role.DECODE]]
        routes = [Route(p.replica_id, d.replica_id, 1.0) for p in workers[Role.PREFILL] for d in workers[Role.DECODE]]
        plans.plan = Plan(7, tuple(worker.replica for worker in everybody), tuple(routes))
        settings = GatewayConfig(model=folder, served_model_name=MODEL, **config)
        text = TextModel.load(folder)
        gateway = Gateway(settings, text, plans)
        stack.push_async_callback(gateway.close)
        http_server = HttpServer(
            make_app(gateway),
            "127.0.0.1:0",
            limits=Limits(settings.max_http_connections, settings.head_timeout_s, settings.unread_timeout_s),
        )
        http_address = await http_server.start()
        stack.push_async_callback(http_server.stop)
        grpc_server = GrpcServer("127.0.0.1:0")
        grpc_server.add(gateway_pb2_grpc.add_GatewayServicer_to_server, GatewayServicer(gateway), "hexgen2.v1.Gateway")
        address = await grpc_server.start()
        stack.push_async_callback(grpc_server.stop, 0)
        peer = await stack.enter_async_context(channel(address))
        client = httpx.AsyncClient(base_url=f"http://{http_address}", timeout=30)
        http = await stack.enter_async_context(client)
        stub = gateway_pb2_grpc.GatewayStub(peer)
        made = House(gateway, text, plans, workers[Role.PREFILL], workers[Role.DECODE], http, http_address, stub)
        made.set_states()
        yield made
        # The client may have its answer before the gateway has put everything away.
        await eventually(lambda: gateway.num_running == 0)
