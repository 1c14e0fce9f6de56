"""How fast plans are made: clusters of 64 to 1,024 GPUs, each planned once from nothing, costs of groups included."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from hexgen2 import llm as llms
from hexgen2.cluster_file import find_cluster
from hexgen2.scheduler.problem import Problem
from hexgen2.scheduler.schedule import EVALUATIONS, solve
from hexgen2.workload_file import find_workload

SIZES = (64, 128, 256, 320, 1024)


@dataclass(frozen=True, slots=True)
class Row:
    """One plan. ``gap``: (bound - throughput) / bound."""

    num_gpus: int
    seconds: float
    throughput_rps: float
    bound_rps: float | None
    gap: float | None

    def to_json(self) -> dict[str, Any]:
        """Its fields."""
        return asdict(self)


def rows(
    sizes: tuple[int, ...] = SIZES,
    model: str = "llama-2-70b",
    workload: str = "hphd",
    strategy: str = "hexgen2",
    evaluations: int = EVALUATIONS,
    jobs: int = 1,
) -> Iterator[Row]:
    """One row after the other, for the catalog's clusters ``multi-site-N``. Raises ConfigError."""
    for size in sizes:
        cluster, llm, work = find_cluster(f"multi-site-{size}"), llms.find(model), find_workload(workload)
        start = time.perf_counter()
        plan = solve(Problem(cluster, llm, work), strategy, evaluations=evaluations, jobs=jobs)
        seconds = time.perf_counter() - start
        yield Row(size, seconds, plan.throughput_rps, plan.bound_rps, plan.gap)
