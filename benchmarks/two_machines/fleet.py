"""The two machines and what `hexgen2 deploy baremetal` puts on them: started, asked, killed, stopped."""

import asyncio
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import grpc
import yaml

from hexgen2.bench.netns import Link, Namespace
from hexgen2.cli.process import ServiceProcess, died
from hexgen2.config import Config, CoordinatorConfig, KvConfig, TlsConfig, VllmEngineConfig
from hexgen2.deploy.baremetal import Process, names_of, processes, roles_of
from hexgen2.engine.base import Sampling
from hexgen2.inventory import Host, Inventory
from hexgen2.placement import Placement, ReplicaPlan, ReplicaRole, RoutePlan, StagePlan, to_yaml
from hexgen2.plan import ReplicaState
from hexgen2.rpc.client import channel
from hexgen2.rpc.convert import sampling_to_proto
from hexgen2.rpc.plan_convert import status_from_proto
from hexgen2.security import certs
from hexgen2.security.callers import Caller
from hexgen2.security.tls import TlsFiles
from hexgen2.v1 import coordinator_pb2, coordinator_pb2_grpc, gateway_pb2, gateway_pb2_grpc

ADDRESSES = {"a": "10.79.0.1", "b": "10.79.0.2"}
#: The replica on both machines, and the one on the first.
WIDE, NARROW = "wide", "narrow"
MIB = 1 << 20
#: Beyond it a process that was told to stop has not.
STOP_S = 30.0
LOOK_S = 0.5
LOOK_TIMEOUT_S = 3.0
REQUEST_TIMEOUT_S = 120.0
#: Shared memory of its own: else vLLM finds that its ranks are on one machine.
_OWN_MEMORY = (*("unshare", "--mount", "--ipc", "sh", "-c"), 'mount -t tmpfs tmpfs /dev/shm && exec "$0" "$@"')


class FleetError(RuntimeError):
    """A process ended, or did not become ready; says which, and the end of its log."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client got: tokens, and the bytes of KV that were handed over for them."""

    tokens: list[int]
    kv_bytes: int


def plan(role: ReplicaRole, num_layers: int) -> Placement:
    """``WIDE`` in ``role`` on both machines, one stage on each; ``NARROW`` for the other phase on the first."""
    half = num_layers // 2

    def stage(machine: str, first: int, layers: int) -> StagePlan:
        return StagePlan(machine=machine, gpu="cpu", tensor_parallel_size=1, first_layer=first, num_layers=layers)

    def replica(name: str, role: ReplicaRole, *stages: StagePlan) -> ReplicaPlan:
        return ReplicaPlan(id=name, role=role, stages=stages, capacity_rps=1.0, flow_rps=1.0, utilisation=1.0)

    other: ReplicaRole = "prefill" if role == "decode" else "decode"
    pair = {role: WIDE, other: NARROW}
    return Placement(
        cluster="two machines",
        model="as the inventory says",
        workload="none",
        kind="disaggregated",
        why="to be run",
        throughput_rps=1.0,
        bottleneck="none",
        ttft_s=None,
        tpot_s=1.0,
        load_rps=1.0,
        output_tokens_per_s=1.0,
        strategy="by hand",
        seed=0,
        evaluations=0,
        replicas=(
            replica(WIDE, role, stage("a", 0, half), stage("b", half, num_layers - half)),
            replica(NARROW, other, stage("a", 0, num_layers)),
        ),
        routes=(RoutePlan(prefill=pair["prefill"], decode=pair["decode"], flow_rps=1.0, transfer_s=0.1),),
        links=(),
        idle=(),
    )


def inventory(model: Path, engine: VllmEngineConfig) -> Inventory:
    """The two machines; KV memory small enough for one to be both."""
    return Inventory(
        hosts=tuple(Host(name=name, address=address, cores=4) for name, address in ADDRESSES.items()),
        coordinator="a",
        gateways=("a",),
        model=model,
        engine=engine,
        kv=KvConfig(send_bytes=64 * MIB, staging_bytes=64 * MIB, landing_bytes=16 * MIB),
        packages=("hexgen2",),
        drain_s=10.0,
    )


class Fleet:
    """Life: ``start``, then whatever, then ``stop``. The caller is in a network namespace of its own, machine ``a``."""

    def __init__(self, folder: Path, placement: Placement, hosts: Inventory) -> None:
        self._folder = folder
        self._plan = folder / "plan.yaml"
        self._plan.write_text(to_yaml(placement), encoding="utf-8")
        self._here, self._there = Namespace.here(), Namespace.new()
        self.link = Link.between(self._here, ADDRESSES["a"], self._there, ADDRESSES["b"])
        certs.init(folder / "certs")
        certs.issue(folder / "certs", "admin", (Caller.ADMIN,))
        self._tls = TlsFiles(TlsConfig.model_validate(folder / "certs" / "admin"))
        self.processes: dict[str, ServiceProcess] = {}
        for name, found in processes(hosts, placement, "inventory.yaml").items():
            host = hosts.host(name)
            for role in roles_of(hosts, found, host):
                certs.issue(folder / "certs", f"{name}-{role}", (role,), names_of(host))
            for process in found:
                self.processes[process.name] = self._process(name, process)
                if process.command == "coordinator":
                    self._coordinator = process.listen
                elif process.command == "gateway":
                    self._gateway = process.listen

    async def start(self, *names: str) -> None:
        """Start those processes; none: all."""
        for name in names or tuple(self.processes):
            await self.processes[name].start()

    async def wait_ready(self, timeout_s: float) -> float:
        """Wait until both replicas are; how long it took. Raises FleetError."""
        ready = {WIDE: ReplicaState.READY, NARROW: ReplicaState.READY}
        return await self._wait(lambda states: states == ready, timeout_s, alive=True)

    async def wait_gone(self, timeout_s: float) -> float:
        """Wait until the coordinator has given up the wide replica; how long it took. Raises FleetError."""
        gone = (None, ReplicaState.LOST, ReplicaState.STOPPED)
        return await self._wait(lambda states: NARROW in states and states.get(WIDE) in gone, timeout_s, alive=False)

    async def states(self) -> dict[str, ReplicaState]:
        """What the coordinator says of the replicas; nothing while it is not there."""
        async with channel(self._coordinator, self._tls) as peer:
            stub: coordinator_pb2_grpc.CoordinatorAsyncStub = coordinator_pb2_grpc.CoordinatorStub(peer)
            try:
                told = await stub.GetPlan(coordinator_pb2.GetPlanRequest(), timeout=LOOK_TIMEOUT_S)
            except grpc.aio.AioRpcError:
                return {}
        return {each.replica_id: each.state for each in map(status_from_proto, told.statuses)}

    async def ask(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Answer]:
        """All at once. Raises grpc.aio.AioRpcError."""
        async with channel(self._gateway, self._tls) as peer:
            stub: gateway_pb2_grpc.GatewayAsyncStub = gateway_pb2_grpc.GatewayStub(peer)

            async def one(prompt: Sequence[int]) -> Answer:
                request = gateway_pb2.GenerateRequest(sampling=sampling_to_proto(sampling))
                request.prompt_token_ids.ids.extend(prompt)
                answer = Answer([], 0)
                async for response in stub.Generate(request, timeout=REQUEST_TIMEOUT_S):
                    answer.tokens.extend(token.token_id for token in response.tokens)
                    answer = Answer(answer.tokens, response.timing.kv.bytes)
                return answer

            return list(await asyncio.gather(*map(one, prompts)))

    def kill_second(self) -> int:
        """SIGKILL whatever runs on machine ``b``; how many processes."""
        found = _inside(self._there)
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return len(found)

    async def stop(self) -> dict[str, int]:
        """Gateway, workers, nodes, coordinator, one after the other; how each that was started ended. Idempotent."""
        order = ("gateway", f"worker-{WIDE}", f"worker-{NARROW}", f"node-{WIDE}", "coordinator")
        for name in order:
            await self.processes[name].stop(STOP_S, asyncio.Event())
        return {name: status for name in order if (status := self.processes[name].returncode) is not None}

    def left(self) -> int:
        """How many processes are still on machine ``b``."""
        return len(_inside(self._there))

    async def _wait(self, enough: Callable[[dict[str, ReplicaState]], bool], timeout_s: float, *, alive: bool) -> float:
        began = time.monotonic()
        while True:
            states = await self.states()
            if enough(states):
                return time.monotonic() - began
            ended = [each for each in self.processes.values() if each.returncode is not None]
            if alive and ended:
                raise FleetError("\n".join(map(died, ended)))
            if time.monotonic() > began + timeout_s:
                ends = "\n".join(f"{each.name}:\n{each.tail()}" for each in self.processes.values())
                raise FleetError(f"after {timeout_s:.0f} s the replicas are {states}\n{ends}")
            await asyncio.sleep(LOOK_S)

    def _process(self, host: str, process: Process) -> ServiceProcess:
        file = self._folder / f"{process.name}.yaml"
        settings = self._here_and_now(host, process).model_dump(mode="json")
        file.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        launcher = () if host == "a" else (*self._there.command, *_OWN_MEMORY)
        log = self._folder / f"{process.name}.log"
        return ServiceProcess(process.name, process.command, file, log, launcher, process.environment)

    def _here_and_now(self, host: str, process: Process) -> Config:
        """Its configuration, with files where they are here instead of in /etc and /var."""
        update: dict[str, object] = {
            "tls": TlsConfig.model_validate(self._folder / "certs" / f"{host}-{process.caller}")
        }
        if isinstance(process.config, CoordinatorConfig):
            update |= {"plan": self._plan, "state_file": self._folder / "coordinator.db"}
        return process.config.model_copy(update=update)


def _inside(namespace: Namespace) -> list[int]:
    """The processes in a network namespace."""
    wanted = os.stat(namespace.path).st_ino
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            if os.stat(f"/proc/{pid}/ns/net").st_ino == wanted:
                found.append(int(pid))
    return found
