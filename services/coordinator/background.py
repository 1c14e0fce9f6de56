"""What the coordinator has computed elsewhere: searches and forecasts, each in a process of its own.

The serving loop never computes them and never imports what they need. The processes start with their first task and
end with the coordinator, however that ends.
"""

import asyncio
import importlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from hexgen2.errors import ConfigError, Unavailable
from hexgen2.placement import Placement
from hexgen2.workload import Workload

if TYPE_CHECKING:
    from hexgen2.coordinator.recast import Recast

P = ParamSpec("P")
T = TypeVar("T")

#: However bounded a task is by itself: a machine may be busy.
TIMEOUT_S = 120.0


class Background:
    """One process for one kind of task. A context manager; tasks under way are left behind at the end.

    ``nice``: how far it stands back when others want the cores.
    """

    def __init__(self, nice: int = 0) -> None:
        self._nice = nice
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Background":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._discard()

    async def run(self, task: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The task's result. Raises ConfigError as the task does, and Unavailable when the process died or hangs."""
        if kwargs:
            raise TypeError("tasks take positional arguments")
        if self._pool is None:
            self._pool = ProcessPoolExecutor(1, get_context("spawn"), _begin, (self._nice,))
        try:
            async with asyncio.timeout(TIMEOUT_S):
                return await asyncio.get_running_loop().run_in_executor(self._pool, task, *args)
        except BrokenProcessPool as error:
            self._discard()
            raise Unavailable(f"the background process died: {error}") from error
        except TimeoutError:
            self._discard()
            raise Unavailable(f"the background process said nothing for {TIMEOUT_S:.0f} s") from None

    def _discard(self) -> None:
        pool, self._pool = self._pool, None
        if pool is None:
            return
        processes = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()


def _begin(nice: int) -> None:
    """In the new process: end with the one that started it."""
    os.nice(nice)

    def follow() -> None:
        parent = parent_process()
        if parent is not None:
            parent.join()
        os._exit(0)

    threading.Thread(target=follow, daemon=True).start()


def warm_up() -> None:
    """A task: import what searches need, which takes longer than they do."""
    importlib.import_module("hexgen2.coordinator.recast")
    importlib.import_module("hexgen2.cluster_file")


def search(
    cluster: str,
    base: Placement,
    workload: Workload,
    roles: Mapping[str, str],
    evaluations: int,
    factors: Mapping[str, tuple[float, float]],
) -> "Recast":
    """A task: the best roles. ``cluster`` is a file or a name of the catalog, and ``factors`` say how much longer
    prefill and decode take on its devices. Raises ConfigError.
    """
    # The planner is heavy; only this process has it.
    from hexgen2 import llm as llms
    from hexgen2.cluster_file import find_cluster
    from hexgen2.coordinator.recast import recast
    from hexgen2.scheduler.calibrated import calibrated
    from hexgen2.scheduler.efficiency import engine
    from hexgen2.scheduler.problem import Problem

    codecs = tuple(dict.fromkeys(("none", *(route.codec for route in base.routes))))
    path = Path(cluster)
    found = calibrated(find_cluster(path if path.exists() else cluster), factors, engine())
    problem = Problem(found, llms.find(base.model), workload, codecs)
    try:
        return recast(base, problem, roles, evaluations=evaluations)
    except KeyError as error:
        raise ConfigError(f"cluster {cluster} is not the plan's: it has no {error}") from error


def learn(rates: Sequence[float], horizon: int, season: int, train_s: float) -> float | None:
    """A task: what an LSTM expects."""
    from hexgen2.forecast_lstm import forecast

    return forecast(rates, horizon, season, train_s)
