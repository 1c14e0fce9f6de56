"""The fleet under test: every process at a fixed address, so that each can be killed and started again as itself,
and where the machine allows it each worker behind a link of its own that can be cut.
"""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Literal

import grpc
import httpx
import yaml

from hexgen2.address import held_port
from hexgen2.bench.netns import Link, Namespace
from hexgen2.cli.process import ServiceProcess, died
from hexgen2.config import Config, CoordinatorConfig, EngineConfig, GatewayConfig, KvConfig, WorkerConfig
from hexgen2.plan import ReplicaState
from hexgen2.rpc.client import channel
from hexgen2.rpc.health import serves
from hexgen2.rpc.plan_convert import status_from_proto
from hexgen2.v1 import coordinator_pb2, coordinator_pb2_grpc

#: Processes with nothing running end within this.
STOP_S = 10.0
LOOK_S = 0.3
LOOK_TIMEOUT_S = 2.0
#: The gateway's own limit. Longer than gRPC needs to find a stopped peer (30 s), so that there is time to go elsewhere.
REQUEST_TIMEOUT_S = 45.0

_HUB = "10.77.0.1"
#: Each link's own: links last as long as this process.
_subnets = count(1)
_PORT, _METRICS_PORT = 50061, 9100

Role = Literal["prefill", "decode", "flexible"]


class HouseError(RuntimeError):
    """A process died or did not become ready; says which, and the end of its log."""


@dataclass
class Member:
    """One process and what is being done to it. Whoever does something to it holds ``lock``."""

    process: ServiceProcess
    role: Role | None = None
    address: str = ""
    metrics_address: str = ""
    link: Link | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    #: Set while its end is our doing.
    struck: bool = False
    starts: int = 0

    @property
    def name(self) -> str:
        """``decode-1``..."""
        return self.process.name


@dataclass(frozen=True, slots=True)
class HouseConfig:
    """``folder`` receives configuration, logs and traces. ``tokenizer`` is the folder of the gateway's."""

    folder: Path
    tokenizer: Path
    engine: EngineConfig
    kv: KvConfig
    num_prefill: int = 2
    num_decode: int = 2
    #: That serve both phases at once, each handing over to the others.
    num_flexible: int = 0
    #: Each worker in a network namespace of its own. The caller has entered one.
    namespaces: bool = False
    start_timeout_s: float = 120.0


class House:
    """See the module."""

    def __init__(self, config: HouseConfig) -> None:
        self.config = config
        self.members: dict[str, Member] = {}
        with ExitStack() as held:
            here = Namespace.here() if config.namespaces else None
            host = "127.0.0.1"
            if here is not None:
                host = _HUB
                here.run("ip", "address", "replace", f"{_HUB}/32", "dev", "lo")
            self.coordinator_address = _free(host, held)
            self.grpc_address = _free("127.0.0.1", held)
            self.http_address = _free("127.0.0.1", held)
            coordinator = self._add("coordinator", CoordinatorConfig(listen=self.coordinator_address, drain_s=1.0))
            coordinator.address = self.coordinator_address
            roles: list[tuple[Role, int]] = [
                ("prefill", config.num_prefill),
                ("decode", config.num_decode),
                ("flexible", config.num_flexible),
            ]
            for role, num in roles:
                for index in range(num):
                    self._add_worker(role, f"{role}-{index}", here, held)
            gateway = self._add(
                "gateway",
                GatewayConfig(
                    listen=self.grpc_address,
                    http_listen=self.http_address,
                    coordinator=self.coordinator_address,
                    model=config.tokenizer,
                    served_model_name="chaos",
                    request_timeout_s=REQUEST_TIMEOUT_S,
                    drain_s=1.0,
                ),
            )
            gateway.address = self.grpc_address

    @property
    def workers(self) -> tuple[Member, ...]:
        """Prefill and decode."""
        return tuple(member for member in self.members.values() if member.role is not None)

    def of(self, role: Role) -> tuple[Member, ...]:
        """The workers that serve a role."""
        return tuple(member for member in self.workers if member.role in (role, "flexible"))

    async def start(self) -> None:
        """Start all and wait until all are ready. Raises HouseError."""
        for member in self.members.values():
            await self.start_one(member)
        await self.wait_ready(self.config.start_timeout_s)

    async def start_one(self, member: Member) -> None:
        """Start one (again), at the address that it always has."""
        await member.process.start()
        member.starts += 1
        member.struck = False

    async def kill(self, member: Member) -> None:
        """SIGKILL it, and wait until it is gone."""
        member.struck = True
        member.process.send(signal.SIGKILL)
        await member.process.wait()
        # Whatever it had started.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(member.process.pid, signal.SIGKILL)

    async def wait_ready(self, timeout_s: float) -> None:
        """Wait until every process serves. Raises HouseError."""
        deadline = time.monotonic() + timeout_s
        while True:
            late = await self.not_ready()
            if not late:
                return
            for name in late:
                process = self.members[name].process
                if process.returncode is not None:
                    raise HouseError(died(process))
            if time.monotonic() > deadline:
                ends = "\n".join(self.members[name].process.tail() for name in late)
                raise HouseError(f"not ready within {timeout_s:.0f} s: {', '.join(late)}\n{ends}")
            await asyncio.sleep(LOOK_S)

    async def serves(self, member: Member) -> bool:
        """Whether one process says itself that it serves."""
        async with channel(member.address) as peer:
            try:
                return await serves(peer, LOOK_TIMEOUT_S)
            except grpc.aio.AioRpcError:
                return False

    async def not_ready(self) -> list[str]:
        """Who does not serve now."""
        late = {name for name, member in self.members.items() if member.process.returncode is not None}
        async with channel(self.coordinator_address) as peer:
            stub: coordinator_pb2_grpc.CoordinatorAsyncStub = coordinator_pb2_grpc.CoordinatorStub(peer)
            try:
                answer = await stub.GetPlan(coordinator_pb2.GetPlanRequest(), timeout=LOOK_TIMEOUT_S)
            except grpc.aio.AioRpcError:
                return list(self.members)
        ready = {s.replica_id for s in map(status_from_proto, answer.statuses) if s.state is ReplicaState.READY}
        late |= {member.name for member in self.workers} - ready
        async with httpx.AsyncClient(timeout=LOOK_TIMEOUT_S) as client:
            try:
                healthy = (await client.get(f"http://{self.http_address}/health")).status_code == 200
            except httpx.HTTPError:
                healthy = False
        return sorted(late if healthy else late | {"gateway"})

    async def stop(self) -> None:
        """Stop all. Idempotent."""
        hurry = asyncio.Event()
        for member in self.members.values():
            member.struck = True
            member.process.send(signal.SIGCONT)
        async with asyncio.TaskGroup() as tasks:
            for member in self.members.values():
                tasks.create_task(member.process.stop(STOP_S, hurry))

    def _add(self, name: str, config: Config, link: Link | None = None) -> Member:
        folder = self.config.folder
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
        launcher = link.b_side.command if link is not None else ()
        service = config.role if isinstance(config, WorkerConfig) else name
        if isinstance(config, GatewayConfig) and self.config.num_flexible:
            service = "benchmarks.chaos.cross"
        process = ServiceProcess(name, service, file, folder / f"{name}.log", launcher)
        self.members[name] = Member(process, link=link)
        return self.members[name]

    def _add_worker(self, role: Role, name: str, here: Namespace | None, held: ExitStack) -> None:
        link = None
        if here is None:
            host = "127.0.0.1"
            address, metrics_address = _free(host, held), _free(host, held)
        else:
            number = next(_subnets)
            near, host = f"10.77.{number}.1", f"10.77.{number}.2"
            link = Link.between(here, near, Namespace.new(), host)
            link.route_all_through(near)
            address, metrics_address = f"{host}:{_PORT}", f"{host}:{_METRICS_PORT}"
        member = self._add(
            name,
            WorkerConfig(
                role=role,
                replica_id=name,
                listen=address,
                metrics_listen=metrics_address,
                coordinator=self.coordinator_address,
                engine=self.config.engine,
                kv=self.config.kv.model_copy(update={"host": host}),
                drain_s=5.0,
            ),
            link,
        )
        member.role, member.address, member.metrics_address = role, address, metrics_address


@asynccontextmanager
async def running(config: HouseConfig) -> AsyncIterator[House]:
    """A fleet that is ready, stopped at the end of the block."""
    house = House(config)
    try:
        await house.start()
        yield house
    finally:
        await house.stop()


def _free(host: str, held: ExitStack) -> str:
    """A free port of this host, held until all are chosen."""
    return f"{host}:{held.enter_context(held_port(host))}"
