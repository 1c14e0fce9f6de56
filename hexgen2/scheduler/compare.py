"""Strategies against each other: the same problem and as many evaluations, several seeds, shares of the bound.

All plan prefill and decode apart, so that what differs is the search alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

from hexgen2 import llm as llms
from hexgen2.cluster_file import find_cluster
from hexgen2.scheduler.multi_start import Effort
from hexgen2.scheduler.problem import SPLIT, Problem
from hexgen2.scheduler.search import STRATEGIES
from hexgen2.workload_file import find_workload

CLUSTERS = (
    *(f"paper-setting-{number}" for number in range(1, 6)),
    *(f"multi-site-{size}" for size in (64, 128, 256, 320)),
)
WORKLOADS = ("hpld", "hphd", "lphd", "lpld")
#: The default's rivals, and what its starts alone do.
COMPARED = ("hexgen2", "genetic", "annealing", "hill-climb", "random-swap", "no-refinement", "lp-start")
#: These draw nothing: one seed says it all.
FIXED = ("no-refinement", "lp-start")
EVALUATIONS, SEEDS = 2000, 5


@dataclass(frozen=True, slots=True)
class Row:
    """One cluster and workload. ``shares``: by strategy, the mean over the seeds of flow / bound."""

    cluster: str
    workload: str
    num_gpus: int
    bound_rps: float
    shares: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """Its fields."""
        return asdict(self)

    def lead(self, rival: str) -> float:
        """How much more the default carries than a rival, as a share of the rival's flow."""
        return self.shares["hexgen2"] / self.shares[rival] - 1 if self.shares[rival] > 0 else float("inf")


def rows(
    clusters: Sequence[str] = CLUSTERS,
    workloads: Sequence[str] = WORKLOADS,
    model: str = "llama-2-70b",
    evaluations: int = EVALUATIONS,
    seeds: int = SEEDS,
) -> Iterator[Row]:
    """One row after the other. Raises ConfigError."""
    for cluster in clusters:
        for workload in workloads:
            problem = Problem(find_cluster(cluster), llms.find(model), find_workload(workload))
            problem.check()
            bound = problem.bound(SPLIT).rps
            shares = {}
            for name in COMPARED:
                drawn = range(1 if name in FIXED else seeds)
                found = (STRATEGIES[name](problem, Effort(evaluations, seed=seed, roles=SPLIT)) for seed in drawn)
                shares[name] = mean(each.flow / bound for each in found)
            yield Row(cluster, workload, problem.fabric.num_gpus, bound, shares)


def summary(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """By rival: the default's smallest and mean lead over it."""
    return {
        rival: {
            "least_lead": min(row.lead(rival) for row in rows),
            "mean_lead": mean(row.shares["hexgen2"] for row in rows) / mean(row.shares[rival] for row in rows) - 1,
        }
        for rival in COMPARED[1:]
    }
