"""Real fleets, every part a process, and a client's and the coordinator's view of them."""

import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from hexgen2.cli.fleet import Fleet
from hexgen2.cli.fleet_config import FleetConfig
from hexgen2.config import TlsConfig, home
from hexgen2.engine.base import Sampling
from hexgen2.plan import Load, Plan, Replica, ReplicaState
from hexgen2.rpc.client import channel
from hexgen2.rpc.convert import sampling_to_proto
from hexgen2.rpc.plan_convert import status_from_proto
from hexgen2.security.tls import TlsFiles
from hexgen2.v1 import coordinator_pb2, coordinator_pb2_grpc, gateway_pb2, gateway_pb2_grpc, types_pb2
from tests.eventually import eventually_async
from tests.worker.pair import Pair

DEADLINE_S = 120.0


def smollm2() -> Path:
    """The default model's folder; skips the test, saying so, where it was not prepared."""
    folder = home() / "models" / "SmolLM2-135M-Instruct"
    if not (folder / "config.json").exists():
        pytest.skip(f"{folder} is not there: make setup prepares it")
    return folder


@dataclass
class Answer:
    """What a client of the gateway got."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    last: gateway_pb2.GenerateResponse = field(default_factory=gateway_pb2.GenerateResponse)


@dataclass(frozen=True)
class Peer:
    """One worker's address and channels to it, as a gateway's and as another worker's."""

    address: str
    channel: grpc.aio.Channel
    worker_channel: grpc.aio.Channel


@dataclass
class Running:
    """A fleet that is up."""

    fleet: Fleet
    gateway: grpc.aio.Channel
    coordinator: grpc.aio.Channel
    workers: dict[str, Peer]
    plan: Plan
    #: A worker's certificates, in a fleet that speaks TLS.
    worker_tls: TlsFiles | None

    @property
    def pair(self) -> Pair:
        """The first prefill and decode worker, called as the gateway calls them."""
        return Pair(self.workers["prefill-0"], self.workers["decode-0"])

    def start(self, prompt: Sequence[int] | str, sampling: Sampling, *, stop: Sequence[str] = ()) -> Any:
        """A Generate call."""
        request = gateway_pb2.GenerateRequest(sampling=sampling_to_proto(sampling), stop=stop)
        if isinstance(prompt, str):
            request.prompt = prompt
        else:
            request.prompt_token_ids.ids.extend(prompt)
        return gateway_pb2_grpc.GatewayStub(self.gateway).Generate(request, timeout=DEADLINE_S)

    async def ask(self, prompt: Sequence[int] | str, sampling: Sampling, *, stop: Sequence[str] = ()) -> Answer:
        """A Generate call to its end."""
        answer = Answer()
        async for response in self.start(prompt, sampling, stop=stop):
            answer.tokens += [token.token_id for token in response.tokens]
            answer.text += response.text
            answer.last = response
        return answer

    async def colocated(self, prompt: Sequence[int], sampling: Sampling) -> list[int]:
        """The same by decode's engine alone: one vLLM, no hand-over."""
        call = self.pair.start_decode(None, prompt, sampling)
        return [token.token_id async for response in call for token in response.tokens.tokens]

    async def loads(self) -> dict[str, tuple[ReplicaState, Load]]:
        """As the workers report them."""
        stub = coordinator_pb2_grpc.CoordinatorStub(self.coordinator)
        answer = await stub.GetPlan(coordinator_pb2.GetPlanRequest(), timeout=DEADLINE_S, wait_for_ready=True)
        return {s.replica_id: (s.state, s.load) for s in map(status_from_proto, answer.statuses)}

    async def settled(self) -> None:
        """Wait until no worker has a request or holds KV memory."""

        async def idle() -> bool:
            return all(
                load.num_requests_running == load.num_requests_waiting == load.kv_pool_bytes_used == 0
                for _, load in (await self.loads()).values()
            )

        await eventually_async(idle)


async def metric(replica: Replica, name: str, label: str = "") -> float:
    """The sum over the labels of one of a worker's metrics, or over those that ``label`` is part of."""
    async with httpx.AsyncClient() as client:
        text = (await client.get(f"http://{replica.metrics_address}/metrics")).text
    lines = [line for line in text.splitlines() if line.split("{")[0].split(" ")[0] == name]
    assert lines, f"{replica.replica_id} has no metric {name}"
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if label in line)


@asynccontextmanager
async def running(config: FleetConfig) -> AsyncIterator[Running]:
    """A fleet on free ports of loopback; its logs are in the failure report."""
    config = config.model_copy(
        update={"listen": "127.0.0.1:0", "http_listen": "127.0.0.1:0", "coordinator": "127.0.0.1:0", "drain_s": 5.0}
    )

    def tls(role: str) -> TlsFiles | None:
        return TlsFiles(TlsConfig.model_validate(config.tls / role)) if config.tls else None

    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hexgen2-")))
        fleet = await stack.enter_async_context(Fleet(config, folder))
        gateway = await stack.enter_async_context(channel(fleet.grpc_address, tls("client")))
        coordinator = await stack.enter_async_context(channel(fleet.coordinator_address, tls("admin")))
        plan = await fleet.plan()
        workers = {
            replica.replica_id: Peer(
                replica.address,
                await stack.enter_async_context(channel(replica.address, tls("gateway"))),
                await stack.enter_async_context(channel(replica.address, tls("worker"))),
            )
            for replica in plan.replicas
        }
        yield Running(fleet, gateway, coordinator, workers, plan, tls("worker"))


def kv_bytes(folder_shape: tuple[int, int, int, int], num_tokens: int) -> int:
    """Layers x 2 x KV heads x head_dim x bytes of a value x tokens."""
    num_layers, num_kv_heads, head_dim, item_bytes = folder_shape
    return num_layers * 2 * num_kv_heads * head_dim * item_bytes * num_tokens


GREEDY = Sampling(max_tokens=16, temperature=0.0, ignore_eos=True)
STOP, LENGTH = types_pb2.FINISH_REASON_STOP, types_pb2.FINISH_REASON_LENGTH
