"""Many workers under one coordinator: reporters and watchers that speak the real protocol, without engines.

What is measured is the coordinator's process: reports answered in time, how soon a change reaches a watcher, and the
CPU that it takes. Workers are reporters in a few processes, since engines would take the cores that are measured.
"""

import asyncio
import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click
import structlog

import hexgen2
from hexgen2.placement import Placement, ReplicaPlan, RoutePlan, StagePlan, to_yaml
from hexgen2.plan import GatewayLoad, Load, Measured, Replica, ReplicaState, Role, RouteLoad
from hexgen2.routing import Router
from hexgen2.rpc import plan_convert as convert
from hexgen2.rpc.client import channel
from hexgen2.rpc.report import REPORT_INTERVAL_S, PlanWatcher, report_gateway
from hexgen2.v1 import coordinator_pb2 as pb
from hexgen2.v1 import coordinator_pb2_grpc
from hexgen2.worker.aio import owned

#: Each in a process with so many reporters.
PER_PROCESS = 50
GATEWAYS = 2
#: One worker after another drains and is ready again.
DRAIN_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class Scale:
    """Of one run."""

    workers: int
    gateways: int
    seconds: float
    routes: int
    #: From the first report to a plan with everybody.
    registered_s: float
    #: Whoever missed the time after which it counts as lost.
    lost: int
    reports_per_s: float
    report_p50_s: float
    report_p99_s: float
    #: From a worker that says that it drains until a watching gateway has it.
    watch_p50_s: float
    watch_max_s: float
    picks_per_s: float
    coordinator_cpu: float
    coordinator_rss_mib: float


@click.command()
@click.option("--workers", default=200, show_default=True)
@click.option("--seconds", default=60.0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def scale(workers: int, seconds: float, as_json: bool) -> None:
    """Reports, plan watch and routing with many workers under one coordinator."""
    # Every change of plan is a line otherwise.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    found = asyncio.run(run(workers, seconds))
    if as_json:
        click.echo(json.dumps(asdict(found), indent=1))
        return
    for field, value in asdict(found).items():
        click.echo(f"{field:22} {value:.4g}" if isinstance(value, float) else f"{field:22} {value}")


async def run(workers: int, seconds: float) -> Scale:
    """Start the coordinator and everybody, look for so many seconds, stop."""
    with tempfile.TemporaryDirectory(prefix="hexgen2-scale-") as folder:
        plan = Path(folder) / "plan.yaml"
        plan.write_text(to_yaml(_placement(workers)), encoding="utf-8")
        async with _coordinator(Path(folder), plan) as (address, pid):
            firsts = range(0, workers, PER_PROCESS)
            children = [_Child(address, first, min(PER_PROCESS, workers - first)) for first in firsts]
            try:
                return await _look(address, pid, workers, seconds, children)
            finally:
                for child in children:
                    child.close()


async def _look(address: str, pid: int, workers: int, seconds: float, children: "list[_Child]") -> Scale:
    began = time.monotonic()
    watchers = [PlanWatcher(address) for _ in range(GATEWAYS)]
    async with owned(watchers[0].run()), owned(watchers[1].run()):
        first = watchers[0]
        async with asyncio.timeout(180):
            while len(first.plan.replicas) < workers or not all(
                each.state is ReplicaState.READY for each in first.statuses.values()
            ):
                await first.wait_changed()
        registered_s = time.monotonic() - began
        loads = [_load(number, first) for number in range(GATEWAYS)]
        async with owned(report_gateway(address, lambda: loads[0])), owned(report_gateway(address, lambda: loads[1])):
            for child in children:
                child.ask("reset")
            cpu, since = _cpu_s(pid), time.monotonic()
            lost: set[str] = set()
            delays: list[float] = []
            while time.monotonic() < since + seconds:
                delays.append(await _drain_and_back(first, children, len(delays)))
                lost |= {key for key, each in first.statuses.items() if each.state is ReplicaState.LOST}
                await asyncio.sleep(DRAIN_EVERY_S)
            passed = time.monotonic() - since
            used = _cpu_s(pid) - cpu
        times = sorted(each for child in children for each in child.ask("times"))
        return Scale(
            workers,
            GATEWAYS,
            passed,
            len(first.plan.routes),
            registered_s,
            len(lost),
            len(times) / passed,
            times[len(times) // 2],
            times[int(len(times) * 0.99)],
            sorted(delays)[len(delays) // 2],
            max(delays),
            _picks(first),
            used / passed,
            _rss_mib(pid),
        )


async def _drain_and_back(watcher: PlanWatcher, children: "list[_Child]", number: int) -> float:
    """Seconds from a worker's word that it drains to a gateway's knowing; it is ready again afterwards."""
    child = children[number % len(children)]
    replica_id = child.ask(f"drain {number % child.count}")
    at = time.monotonic()
    async with asyncio.timeout(60):
        while watcher.statuses[replica_id].state is not ReplicaState.DRAINING:
            await watcher.wait_changed()
        delay = time.monotonic() - at
        child.ask(f"ready {number % child.count}")
        while watcher.statuses[replica_id].state is not ReplicaState.READY:
            await watcher.wait_changed()
    return delay


def _load(number: int, watcher: PlanWatcher) -> GatewayLoad:
    """As busy as a gateway of such a fleet: something in flight on many routes."""
    routes = tuple(RouteLoad(r.prefill_replica_id, r.decode_replica_id, 1) for r in watcher.plan.routes[:500])
    return GatewayLoad(f"gateway-{number}", routes, Measured(60.0, 1000, 1000, 0, 500.0, 100.0, 0.3, 0.05))


def _picks(watcher: PlanWatcher) -> float:
    """Routes that one gateway picks per second."""
    router, count, began = Router(), 0, time.perf_counter()
    while time.perf_counter() < began + 2.0:
        assert router.pick(watcher.plan, watcher.statuses, {}) is not None
        count += 1
    return count / (time.perf_counter() - began)


def _name(number: int) -> str:
    return f"{'prefill' if number % 2 else 'decode'}-{number}"


def _placement(workers: int) -> Placement:
    """Every prefill replica hands over to two decode replicas: a largest flow has few routes, as planned ones do."""
    prefill, decode = (tuple(n for n in range(workers) if n % 2 == odd) for odd in (1, 0))
    stage = StagePlan(machine="m", gpu="any", tensor_parallel_size=1, first_layer=0, num_layers=32)
    replicas = tuple(
        ReplicaPlan(
            id=_name(number),
            role="prefill" if number % 2 else "decode",
            stages=(stage,),
            capacity_rps=2.0,
            flow_rps=1.0,
            utilisation=0.5,
        )
        for number in (*prefill, *decode)
    )
    routes = tuple(
        RoutePlan(prefill=_name(p), decode=_name(decode[(i + j) % len(decode)]), flow_rps=0.5, transfer_s=0.01)
        for i, p in enumerate(prefill)
        for j in range(2)
    )
    return Placement(
        cluster="none",
        model="none",
        workload="none",
        kind="disaggregated",
        why="by hand",
        throughput_rps=float(len(prefill)),
        bottleneck="none",
        ttft_s=None,
        tpot_s=0.05,
        load_rps=1.0,
        output_tokens_per_s=1.0,
        strategy="by hand",
        seed=0,
        evaluations=0,
        replicas=replicas,
        routes=routes,
        links=(),
        idle=(),
    )


class _Child:
    """A process with ``count`` reporters from number ``first`` on."""

    def __init__(self, address: str, first: int, count: int) -> None:
        self.count = count
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_report, args=(address, first, count, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, what: str) -> Any:
        """Its answer."""
        self._pipe.send(what)
        return self._pipe.recv()

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.join(10)


def _report(address: str, first: int, count: int, pipe: Connection) -> None:
    asyncio.run(_reporters(address, first, count, pipe))


async def _reporters(address: str, first: int, count: int, pipe: Connection) -> None:
    """Half of them prefill, half decode; each has a connection of its own."""
    times: list[float] = []
    workers = [_Worker(address, number, times) for number in range(first, first + count)]
    loop = asyncio.get_running_loop()
    async with asyncio.TaskGroup() as tasks:
        for worker in workers:
            tasks.create_task(worker.run())
        while True:
            what, _, number = str(await loop.run_in_executor(None, pipe.recv)).partition(" ")
            if what == "reset":
                times.clear()
                pipe.send(None)
            elif what == "times":
                pipe.send(list(times))
            else:
                chosen = workers[int(number)]
                chosen.turn(ReplicaState.DRAINING if what == "drain" else ReplicaState.READY)
                pipe.send(chosen.replica.replica_id)


class _Worker:
    """Reports once a second, and at once when its state changes, as a worker does; notes how long each report took."""

    def __init__(self, address: str, number: int, times: list[float]) -> None:
        role = Role.PREFILL if number % 2 else Role.DECODE
        host = f"10.0.{number // 250}.{number % 250 + 1}"
        self.replica = Replica(
            replica_id=_name(number),
            role=role,
            address=f"{host}:50000",
            model="m",
            model_sha256=b"m" * 32,
            incarnation=f"incarnation-{number}",
            max_model_len=8192,
            transport="tcp",
            version=hexgen2.__version__,
        )
        self._address = address
        self._times = times
        self._state = ReplicaState.READY
        self._changed = asyncio.Event()

    def turn(self, state: ReplicaState) -> None:
        """Report another state at once."""
        self._state = state
        self._changed.set()

    async def run(self) -> None:
        """Until cancelled."""
        load = convert.load_to_proto(Load(3, 1, 1 << 20, 1 << 28))
        async with channel(self._address) as peer:
            stub = coordinator_pb2_grpc.CoordinatorStub(peer)
            while True:
                self._changed.clear()
                request = pb.ReportRequest(
                    replica=convert.replica_to_proto(self.replica),
                    state=convert.state_to_proto(self._state),
                    load=load,
                    unix_time_s=time.time(),
                )
                began = time.perf_counter()
                await stub.Report(request, timeout=60, wait_for_ready=True)
                self._times.append(time.perf_counter() - began)
                with suppress(TimeoutError):
                    async with asyncio.timeout(REPORT_INTERVAL_S):
                        await self._changed.wait()


@asynccontextmanager
async def _coordinator(folder: Path, plan: Path) -> AsyncIterator[tuple[str, int]]:
    """A coordinator's process: its address and id."""
    command = [sys.executable, "-m", "services.coordinator", "--listen", "127.0.0.1:0"]
    command += ["--state-file", str(folder / "state.db"), "--plan", str(plan)]
    process = await asyncio.create_subprocess_exec(
        *command, stderr=asyncio.subprocess.PIPE, env=os.environ | {"HEXGEN2_HOME": str(folder)}
    )
    assert process.stderr is not None
    try:
        address = ""
        while not address:
            line = await process.stderr.readline()
            if not line:
                raise RuntimeError("the coordinator ended")
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            address = entry.get("address", "") if entry.get("event") == "ready" else ""
        async with owned(_drain_pipe(process.stderr)):
            yield address, process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        await process.wait()


async def _drain_pipe(stream: asyncio.StreamReader) -> None:
    while await stream.read(1 << 16):
        pass


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _rss_mib(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
