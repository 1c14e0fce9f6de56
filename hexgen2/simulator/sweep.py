"""What if: a plan under other rates, networks, prices, mixes and codecs, or other clusters and models planned anew."""

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from hexgen2 import llm as llms
from hexgen2.cluster_file import find_cluster
from hexgen2.config_file import did_you_mean
from hexgen2.errors import ConfigError
from hexgen2.kv.codecs import CODECS
from hexgen2.placement import Placement
from hexgen2.scheduler.problem import Problem
from hexgen2.scheduler.schedule import solve
from hexgen2.scheduler.search import STRATEGIES
from hexgen2.simulator.report import Report
from hexgen2.simulator.run import Demand, other, prepare, simulate, widened
from hexgen2.workload_file import find_workload

#: What may be swept, and what its values are.
AXES: Mapping[str, str] = {
    "rate": "requests per second",
    "bandwidth": "of network cards and links between machines, as a factor",
    "price": "as a factor",
    "mix": "a built-in workload or a workload.yaml",
    "codec": "of all KV",
    "model": "planned anew",
    "cluster": "planned anew",
    "strategy": "planned anew",
}
NUMBERS = ("rate", "bandwidth", "price")
PLANNED_ANEW = ("model", "cluster", "strategy")


@dataclass(frozen=True, slots=True)
class Axis:
    """One thing that changes, and its values as they were written."""

    name: str
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Point:
    """One combination and what came of it; ``error`` where nothing could be planned or simulated."""

    values: tuple[str, ...]
    placement: Placement | None
    report: Report | None
    error: str = ""


def axis(text: str) -> Axis:
    """``rate=2,4,8``. Raises ConfigError."""
    name, _, values = text.partition("=")
    if name not in AXES:
        raise ConfigError(f"--sweep {text}: no axis `{name}`; {did_you_mean(name, list(AXES))}")
    found = tuple(value for value in values.split(",") if value)
    if not found:
        raise ConfigError(f"--sweep {text}: no values; write --sweep {name}=A,B: {AXES[name]}")
    known = {"codec": tuple(CODECS), "strategy": tuple(STRATEGIES)}.get(name)
    for value in found:
        if known is not None and value not in known:
            raise ConfigError(f"--sweep {name}: `{value}`; {did_you_mean(value, known)}")
        if name in NUMBERS:
            _positive(name, value)
    return Axis(name, found)


def sweep(
    axes: Sequence[Axis],
    problem: Problem,
    placement: Placement | None,
    demand: Demand,
    *,
    replan: bool = False,
    evaluations: int = 1000,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Point]:
    """Every combination, one after the other. Without ``placement``, or with ``replan``, each is planned for itself."""
    rows = list(product(*(each.values for each in axes)))
    for number, values in enumerate(rows):
        if progress is not None:
            progress(number, len(rows))
        yield _point(
            {a.name: v for a, v in zip(axes, values, strict=True)},
            values,
            problem,
            placement,
            demand,
            replan,
            evaluations,
        )


def _point(
    chosen: Mapping[str, str],
    values: tuple[str, ...],
    problem: Problem,
    placement: Placement | None,
    demand: Demand,
    replan: bool,
    evaluations: int,
) -> Point:
    plan = None if replan or any(name in chosen for name in PLANNED_ANEW) else placement
    try:
        cluster = find_cluster(chosen["cluster"]) if "cluster" in chosen else problem.cluster
        if "bandwidth" in chosen:
            cluster = widened(cluster, _positive("bandwidth", chosen["bandwidth"]))
        model = llms.find(chosen["model"]) if "model" in chosen else problem.llm
        workload = find_workload(chosen["mix"]) if "mix" in chosen else problem.workload
        changed = other(problem, cluster=cluster, llm=model, workload=workload)
        if plan is None:
            plan = solve(changed, chosen.get("strategy", "hexgen2"), evaluations=evaluations)
        if "rate" in chosen:
            demand = replace(demand, rate=_positive("rate", chosen["rate"]), scale=None, offline=False)
        blueprint = prepare(plan, changed, demand, codec=chosen.get("codec"))
        price = cluster.price_per_hour
        if price is not None:
            price *= _positive("price", chosen.get("price", "1"))
        return Point(values, plan, simulate(blueprint, demand, price))
    except ConfigError as error:
        return Point(values, None, None, str(error))


def _positive(name: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise ConfigError(f"--sweep {name}: `{value}` is not a positive number")
    return number


#: Columns beside the axes, and where their values come from.
COLUMNS: Mapping[str, Callable[[Placement, Report], object]] = {
    "planned_rps": lambda plan, _: plan.throughput_rps,
    "offered_rps": lambda _, found: found.offered_rps,
    "throughput_rps": lambda _, found: found.throughput_rps,
    "goodput_rps": lambda _, found: found.goodput_rps,
    "slo_attainment": lambda _, found: found.slo_attainment,
    "ttft_p50_s": lambda _, found: found.ttft.p50_s,
    "ttft_p99_s": lambda _, found: found.ttft.p99_s,
    "tpot_p50_s": lambda _, found: found.tpot.p50_s,
    "tpot_p99_s": lambda _, found: found.tpot.p99_s,
    "e2e_p50_s": lambda _, found: found.e2e.p50_s,
    "output_tokens_per_s": lambda _, found: found.output_tokens_per_s,
    "price_per_hour": lambda _, found: found.price_per_hour,
    "price_per_million_output_tokens": lambda _, found: found.price_per_million_output_tokens,
}


def cells(point: Point) -> list[object]:
    """A row of the table, after the axes."""
    if point.report is None or point.placement is None:
        return [""] * len(COLUMNS)
    return [column(point.placement, point.report) for column in COLUMNS.values()]


def write_csv(path: Path, axes: Sequence[Axis], points: Sequence[Point]) -> None:
    """Raises OSError."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*(each.name for each in axes), *COLUMNS, "error"])
        for point in points:
            writer.writerow([*point.values, *cells(point), point.error])
