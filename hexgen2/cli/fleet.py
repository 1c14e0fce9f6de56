"""A fleet on this machine: coordinator, prefill and decode workers and gateway, each a process of its own.

``hexgen2 up`` and ``hexgen2 demo`` run one; so do tests::

    async with Fleet(FleetConfig(...), run_dir) as fleet:
        ... fleet.grpc_address, fleet.http_address, fleet["prefill-0"].send(signal.SIGKILL)
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from types import TracebackType

import grpc
import yaml

from hexgen2.address import check_free, format_address, held_port, parse_address
from hexgen2.cli.client import Access
from hexgen2.cli.cpu_quota import quota
from hexgen2.cli.fleet_config import FleetConfig
from hexgen2.cli.members import COORDINATOR, GATEWAY, Addresses, Place, members
from hexgen2.cli.process import ServiceProcess, died
from hexgen2.config import PAGE_PORT, TlsConfig
from hexgen2.errors import ConfigError, HexgenError
from hexgen2.plan import Plan, ReplicaState
from hexgen2.rpc.client import channel
from hexgen2.rpc.health import serves
from hexgen2.rpc.plan_convert import plan_from_proto, status_from_proto
from hexgen2.security.tls import load_tls
from hexgen2.v1 import coordinator_pb2, coordinator_pb2_grpc

#: How often a fleet that starts is looked at.
LOOK_S = 0.2
#: One look at one process.
LOOK_TIMEOUT_S = 2.0

#: What a start-up shows of each process, by name.
States = Mapping[str, str]


class FleetError(HexgenError):
    """A process of the fleet died or did not become ready; says which, and the end of its log."""

    status = "UNAVAILABLE"


class Fleet:
    """See the module. ``run_dir`` receives configuration files and logs. ``workers``: those that do not run here, by
    their names.
    """

    def __init__(self, config: FleetConfig, run_dir: Path, workers: Mapping[str, Place] | None = None) -> None:
        self.config = config
        self.run_dir = run_dir
        #: How this fleet is asked for its state.
        self.access = Access(load_tls(self._tls("admin")))
        with ExitStack() as held:
            grpc_address = _choose_port(config.listen, "listen", held)
            http_address = _choose_port(config.http_listen, "http_listen", held)
            more = tuple(
                (_any_port(config.listen, held), _any_port(config.http_listen, held))
                for _ in range(config.gateways - 1)
            )
            coordinator = _choose_port(config.coordinator, "coordinator", held)
            page = _page_port(config.page_listen, config.coordinator, held)
        self.addresses = Addresses(coordinator, grpc_address, http_address, more, page, workers or {})
        # Cores of the replicas that are held to a share, by name; the groups last as long as the processes.
        self._cores: dict[str, float] = {}
        self._quotas = ExitStack()
        #: Set: stop at once instead of letting running requests end.
        self.hurry = asyncio.Event()
        self._processes = {process.name: process for process in self._make()}

    def __getitem__(self, name: str) -> ServiceProcess:
        """``coordinator``, ``gateway``, ``prefill-0``, ``decode-0``, ..."""
        return self._processes[name]

    @property
    def grpc_address(self) -> str:
        """Of the first gateway."""
        return self.addresses.grpc

    @property
    def http_address(self) -> str:
        """Of the first gateway."""
        return self.addresses.http

    @property
    def coordinator_address(self) -> str:
        """Where workers register."""
        return self.addresses.coordinator

    @property
    def http_url(self) -> str:
        """Of the OpenAI-compatible API, without ``/v1``."""
        return f"{'https' if self.config.tls else 'http'}://{self.http_address}"

    @property
    def page_url(self) -> str:
        """Of the page that shows the fleet."""
        return f"http://{self.addresses.page}/"

    @property
    def processes(self) -> tuple[ServiceProcess, ...]:
        """In the order in which they start."""
        return tuple(self._processes.values())

    async def __aenter__(self) -> "Fleet":
        """Start, and stop again when that fails."""
        try:
            await self.start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop."""
        await self.stop()

    async def start(self, show: Callable[[States], None] = lambda states: None) -> None:
        """Start every process and wait until all are ready; ``show`` is called with their states meanwhile.

        Raises:
            FleetError: one died, or not all were ready within ``start_timeout_s``.
        """
        deadline = time.monotonic() + self.config.start_timeout_s
        groups = {name: self._quotas.enter_context(quota(name, cores)) for name, cores in self._cores.items()}
        for process in self.processes:
            await process.start()
            if process.name in groups:
                groups[process.name].add(process.pid)
        async with AsyncExitStack() as peers:
            addresses = {
                GATEWAY if not number else f"{GATEWAY}-{number}": address
                for number, address in enumerate((self.grpc_address, *(grpc for grpc, _ in self.addresses.more)))
            }
            channels = {
                name: await peers.enter_async_context(channel(address, self.access.tls))
                for name, address in ({COORDINATOR: self.coordinator_address} | addresses).items()
            }
            while True:
                states = await self._states(channels)
                show(states)
                if dead := [process for process in self.processes if process.returncode is not None]:
                    raise FleetError("\n".join(died(process) for process in dead))
                if all(state == ReplicaState.READY for state in states.values()):
                    return
                if time.monotonic() > deadline:
                    late = [process for process in self.processes if states[process.name] != ReplicaState.READY]
                    told = "\n".join(f"{p.name} is {states[p.name]}; see {p.log_file}\n{p.tail()}" for p in late)
                    raise FleetError(f"not ready within {self.config.start_timeout_s:.0f} s:\n{told}")
                await asyncio.sleep(LOOK_S)

    async def watch(self) -> ServiceProcess:
        """Wait until a process ends by itself; return it."""
        waits = {asyncio.ensure_future(process.wait()): process for process in self.processes}
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        return waits[done.pop()]

    async def stop(self, show: Callable[[str], None] = lambda names: None) -> None:
        """Stop the gateway first, so that nothing new comes in, then the workers, then the coordinator. Idempotent."""
        # A service drains for as long as its configuration says; the time on top is for the rest of its ending.
        drain_s = self.config.drain_s + 5.0
        gateways = [process for process in self.processes if process.service == GATEWAY]
        workers = [process for process in self.processes if process.service not in (GATEWAY, COORDINATOR)]
        for group in (gateways, workers, [self[COORDINATOR]]):
            if alive := [process.name for process in group if process.returncode is None]:
                show(", ".join(alive))
            async with asyncio.TaskGroup() as tasks:
                for process in group:
                    tasks.create_task(process.stop(drain_s, self.hurry))
        self._quotas.close()

    async def plan(self) -> Plan:
        """The coordinator's plan now."""
        async with channel(self.coordinator_address, self.access.tls) as coordinator:
            stub: coordinator_pb2_grpc.CoordinatorAsyncStub = coordinator_pb2_grpc.CoordinatorStub(coordinator)
            answer = await stub.GetPlan(coordinator_pb2.GetPlanRequest(), timeout=LOOK_TIMEOUT_S)
            return plan_from_proto(answer.plan)

    async def _states(self, channels: Mapping[str, grpc.aio.Channel]) -> dict[str, str]:
        """``channels`` to the coordinator and the gateways, by name; workers are known to the coordinator."""
        states: dict[str, str] = {process.name: ReplicaState.STARTING for process in self.processes}
        for name, peer in channels.items():
            if await _is_serving(peer):
                states[name] = ReplicaState.READY
        if states[COORDINATOR] == ReplicaState.READY:
            coordinator = channels[COORDINATOR]
            stub: coordinator_pb2_grpc.CoordinatorAsyncStub = coordinator_pb2_grpc.CoordinatorStub(coordinator)
            try:
                answer = await stub.GetPlan(coordinator_pb2.GetPlanRequest(), timeout=LOOK_TIMEOUT_S)
            except grpc.aio.AioRpcError:
                return states
            for status in map(status_from_proto, answer.statuses):
                if status.replica_id in states:
                    states[status.replica_id] = status.state
        return states

    def _tls(self, role: str) -> TlsConfig | None:
        return None if self.config.tls is None else TlsConfig.model_validate((self.config.tls / role).absolute())

    def _make(self) -> list[ServiceProcess]:
        """Write every process's configuration file."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        processes = []
        for member in members(self.config, self.addresses, self.run_dir):
            file = self.run_dir / f"{member.name}.yaml"
            file.write_text(yaml.safe_dump(member.settings.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
            log_file = self.run_dir / f"{member.name}.log"
            if member.share is not None and member.share.cores:
                self._cores[member.name] = member.share.cores
            place = self.addresses.workers.get(member.name)
            launcher = place.launcher if place is not None else ()
            processes.append(ServiceProcess(member.name, member.service, file, log_file, launcher, member.environment))
        return processes


async def _is_serving(peer: grpc.aio.Channel) -> bool:
    try:
        return await serves(peer, LOOK_TIMEOUT_S)
    except grpc.aio.AioRpcError:
        return False


def _choose_port(listen: str, what: str, held: ExitStack) -> str:
    """``listen`` when it is free, or with a free port when its port is 0; held until all are chosen."""
    _, port = parse_address(listen, what=what)
    if port:
        check_free(listen, what=what)
        return listen
    return _any_port(listen, held)


def _page_port(listen: str, coordinator: str, held: ExitStack) -> str:
    """As configured; else the usual port beside a coordinator that has one, where it is free, or any."""
    if listen:
        return _choose_port(listen, "page_listen", held)
    host, port = parse_address(coordinator)
    if not port:
        return _any_port(coordinator, held)
    try:
        return _choose_port(format_address(host, PAGE_PORT), "page_listen", held)
    except ConfigError:
        return _any_port(coordinator, held)


def _any_port(listen: str, held: ExitStack) -> str:
    """The same host with a free port, held until all are chosen."""
    host, _ = parse_address(listen)
    return format_address(host, held.enter_context(held_port(host)))
