"""How good plans are: small random clusters, each planned and searched exhaustively with the same costs and links."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from random import Random
from statistics import median
from typing import Any

from hexgen2 import llm as llms
from hexgen2.cluster import Cluster
from hexgen2.cluster_file import make_cluster
from hexgen2.errors import ConfigError
from hexgen2.scheduler.exhaustive import exhaustive, states
from hexgen2.scheduler.multi_start import Effort, hexgen2
from hexgen2.scheduler.problem import SPLIT, Problem
from hexgen2.workload_file import find_workload

#: Every third cluster has network cards of 1.25 GB/s or less.
SLOW_NICS, FAST_NICS = (1.25e9, 0.6e9, 0.25e9), (2.5e9, 5e9, 12.5e9)
GPUS = ("H100-SXM", "A100-SXM", "L40", "A6000")
MODELS = ("llama-3.1-8b", "opt-30b", "llama-2-70b")
WORKLOADS = ("hpld", "hphd", "lphd", "lpld")

#: Evaluations of each plan.
EVALUATIONS = 3000


@dataclass(frozen=True, slots=True)
class Row:
    """One instance. ``gap``: (optimum - found) / optimum; ``bound_rps`` is never below the optimum."""

    instance: int
    cluster: str
    model: str
    workload: str
    num_gpus: int
    slow_nics: bool
    states: int
    optimum_rps: float
    found_rps: float
    bound_rps: float
    gap: float

    def to_json(self) -> dict[str, Any]:
        """Its fields."""
        return asdict(self)


def instances(
    count: int, *, seed: int = 0, least_states: int = 20, most_states: int = 60_000, max_gpus: int = 7
) -> Iterator[tuple[int, bool, Problem, int]]:
    """(number, slow cards, problem, number of states) of clusters that hold the model twice.

    The same for ever, by ``seed``: clusters are drawn from the seeds that follow it.
    """
    number = 0
    while number < count:
        seed += 1
        slow = number % 3 == 0
        problem = _random(Random(seed), slow, max_gpus)
        try:
            problem.check()
            if problem.bound(SPLIT).rps <= 0:
                continue
            size = sum(1 for _ in states(problem.judge, problem.limits, SPLIT, most_states))
        except ConfigError:
            continue
        if size >= least_states:
            yield number, slow, problem, size
            number += 1


def compare(number: int, slow: bool, problem: Problem, size: int) -> Row:
    """Plan it, and search it exhaustively."""
    _, optimum = exhaustive(problem.judge, problem.limits, SPLIT)
    found = hexgen2(problem, Effort(EVALUATIONS, seed=number, roles=SPLIT))
    return Row(
        instance=number,
        cluster=", ".join(
            " + ".join(f"{count} {gpu}" for gpu, count in machine.gpus)
            + f" at {machine.nic_bandwidth_bytes_per_s / 1e9:g} GB/s"
            for machine in problem.cluster.machines
        ),
        model=problem.llm.name,
        workload=problem.workload.name,
        num_gpus=problem.fabric.num_gpus,
        slow_nics=slow,
        states=size,
        optimum_rps=optimum,
        found_rps=found.flow,
        bound_rps=min(found.bound_rps, problem.bound(SPLIT).rps),
        gap=(optimum - found.flow) / optimum if optimum > 0 else 0.0,
    )


def summary(rows: list[Row]) -> dict[str, float]:
    """Over all instances: gaps, and how far the bound is above the optimum."""
    gaps = [row.gap for row in rows]
    slack = [row.bound_rps / row.optimum_rps - 1 for row in rows if row.optimum_rps > 0]
    return {
        "instances": len(rows),
        "median_gap": median(gaps),
        "worst_gap": max(gaps),
        "at_optimum": sum(gap <= 1e-6 for gap in gaps),
        "bound_below_optimum": sum(each < -1e-6 for each in slack),
        "median_bound_slack": median(slack),
    }


def _random(chance: Random, slow: bool, max_gpus: int) -> Problem:
    return Problem(
        _cluster(chance, slow, max_gpus),
        llms.find(chance.choice(MODELS)),
        find_workload(chance.choice(WORKLOADS)),
    )


def _cluster(chance: Random, slow: bool, max_gpus: int) -> Cluster:
    machines, left = [], chance.randint(4, max_gpus)
    number = 0
    while left > 0:
        count = chance.randint(1, min(4, left))
        bandwidth = chance.choice(SLOW_NICS if slow else FAST_NICS)
        machines.append(
            {
                "name": f"m{number}",
                "gpus": {chance.choice(GPUS): count},
                "nic": {"bandwidth_bytes_per_s": bandwidth, "latency_s": 5e-5},
            }
        )
        left -= count
        number += 1
    return make_cluster({"name": "random", "machines": machines}, "random")
