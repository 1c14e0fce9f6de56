"""One cell of the evaluation: a system on a cluster, with a model and a workload; offline, then online."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import cycle
from pathlib import Path
from random import Random
from time import process_time
from typing import Any

from hexgen2 import llm as llms
from hexgen2.arrival_trace import Row, read_arrivals
from hexgen2.cluster_file import catalog_gpu, find_cluster
from hexgen2.errors import ConfigError
from hexgen2.placement import Placement
from hexgen2.scheduler.cost_model import CostModel, even_stages
from hexgen2.scheduler.problem import Problem
from hexgen2.scheduler.schedule import solve
from hexgen2.simulator.blueprint import Arrival
from hexgen2.simulator.outcome import Slo
from hexgen2.simulator.report import report
from hexgen2.simulator.run import Demand, Source, make, prepare, widened
from hexgen2.workload_file import find_workload

TRACE = "azure2023_conv.csv.gz"
#: Of the built-in workloads: which requests of the trace they stand for, by (more than 512 prompt, 128 output tokens).
CLASSES: Mapping[str, tuple[bool, bool] | None] = {
    "HPLD": (True, False),
    "HPHD": (True, True),
    "LPHD": (False, True),
    "LPLD": (False, False),
    "azure-conversation": None,
}
#: Online load, as a share of what was measured offline.
LOAD = 0.75
#: Requests offline at most.
MOST = 20_000
#: Multiples of the reference latencies at which attainment is told.
SCALES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0)


@dataclass(frozen=True, slots=True)
class Cell:
    """What is asked. ``bandwidth``: factor of the network; ``mixes``: chunked prefill whatever the engine has."""

    model: str
    workload: str
    cluster: str
    system: str
    codec: str | None = None
    bandwidth: float = 1.0
    mixes: bool | None = None

    @property
    def key(self) -> str:
        """A file's name."""
        extras = [self.codec or "", f"x{self.bandwidth:g}" if self.bandwidth != 1 else ""]
        extras += [] if self.mixes is None else ["chunked" if self.mixes else "whole"]
        return "_".join([self.model, self.workload, self.cluster, self.system, *filter(None, extras)])


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is done. ``folder`` holds the traces, if anybody has them."""

    folder: Path
    offline: int = 3000
    online: int = 1500
    evaluations: int = 1000
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came out. ``error``: why there is nothing. Rates are requests per second as simulated, but ``planned``."""

    cell: Cell
    source: str = ""
    kind: str = ""
    planned_rps: float = 0.0
    offline_rps: float = 0.0
    output_tokens_per_s: float = 0.0
    price_per_hour: float = 0.0
    price_per_million: float = 0.0
    online_rate: float = 0.0
    ttft_p50_s: float = 0.0
    ttft_p99_s: float = 0.0
    tpot_p50_s: float = 0.0
    tpot_p99_s: float = 0.0
    e2e_p50_s: float = 0.0
    e2e_p99_s: float = 0.0
    attainment: tuple[float, ...] = ()
    reference_ttft_s: float = 0.0
    reference_tpot_s: float = 0.0
    #: Of the requests offline: longer than the memory of the replicas that they were sent to.
    refused_share: float = 0.0
    preemptions: int = 0
    cpu_s: float = 0.0
    error: str = ""
    replicas: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Its fields."""
        return asdict(self)


def work(cell: Cell, effort: Effort) -> Outcome:
    """Plan, simulate offline, then at 75 % of that."""
    began = process_time()
    try:
        cluster = find_cluster(cell.cluster)
        if cell.bandwidth != 1:
            cluster = widened(cluster, cell.bandwidth)
        problem = Problem(cluster, llms.find(cell.model), find_workload(cell.workload.lower()))
        plan = solve(problem, cell.system, evaluations=effort.evaluations, seed=effort.seed)
        source, told = lengths(cell.workload, effort)
        slo = reference(problem)
        count = enough(plan, problem, effort.offline)
        demand = Demand(_over_and_over(source, count), offline=True, num_requests=count, seed=effort.seed)
        blueprint = prepare(plan, problem, demand, codec=cell.codec, mixes=cell.mixes)
        offline = make(blueprint, demand)
        offline.run()
        found = report(offline, cluster.price_per_hour)
        rate = LOAD * found.steady_rps
        online_demand = replace(
            demand,
            source=_over_and_over(source, effort.online),
            offline=False,
            rate=rate,
            num_requests=effort.online,
            slo=slo,
        )
        online = make(prepare(plan, problem, online_demand, codec=cell.codec, mixes=cell.mixes), online_demand)
        online.run()
    except ConfigError as error:
        return Outcome(cell, error=str(error))
    seen = report(online, cluster.price_per_hour)
    tokens = found.steady_rps * found.output_tokens_per_s / found.throughput_rps
    price = cluster.price_per_hour or 0.0
    return Outcome(
        cell=cell,
        source=told,
        kind=plan.kind,
        planned_rps=plan.throughput_rps,
        offline_rps=found.steady_rps,
        output_tokens_per_s=tokens,
        price_per_hour=price,
        price_per_million=price / 3600 / tokens * 1e6,
        online_rate=rate,
        ttft_p50_s=seen.ttft.p50_s,
        ttft_p99_s=seen.ttft.p99_s,
        tpot_p50_s=seen.tpot.p50_s,
        tpot_p99_s=seen.tpot.p99_s,
        e2e_p50_s=seen.e2e.p50_s,
        e2e_p99_s=seen.e2e.p99_s,
        attainment=tuple(online.outcome.slack.share_below(scale) for scale in SCALES),
        reference_ttft_s=slo.ttft_s,
        reference_tpot_s=slo.tpot_s,
        refused_share=sum(found.failed.values()) / found.requests,
        preemptions=sum(each.preemptions for each in found.replicas),
        cpu_s=process_time() - began,
        replicas=tuple(
            f"{each.role}: {', '.join(f'{count} {gpu}' for (_, gpu), count in each.gpus.items())}"
            for each in plan.replicas
        ),
    )


def enough(plan: Placement, problem: Problem, least: int) -> int:
    """Requests that keep a plan busy for four times as long as its longest answers take (but one in a hundred)."""
    share, tokens = 0.0, 1
    for point in sorted(problem.workload.lengths, key=lambda point: point.output_tokens):
        share += point.weight
        tokens = point.output_tokens
        if share >= 0.99:
            break
    return min(MOST, max(least, int(4 * plan.throughput_rps * plan.tpot_s * tokens)))


def lengths(workload: str, effort: Effort) -> tuple[Source | None, str]:
    """Requests of the trace that belong to the workload, over and over; None: the built-in distribution."""
    path = effort.folder / TRACE
    if not path.is_file():
        return None, "built-in distribution"
    wanted = CLASSES[workload]
    rows = [row for row in read_arrivals(path) if wanted is None or (row[1] > 512, row[2] > 128) == wanted]
    count = min(len(rows), max(effort.offline, effort.online))
    # Evenly spread over it, then in any order: the trace's lengths change with the time of day.
    picked = [_arrival(rows[number * len(rows) // count]) for number in range(count)]
    Random(effort.seed).shuffle(picked)
    return Source(picked, count, 0.0, max(row[1] for row in rows)), "trace"


def _over_and_over(source: Source | None, count: int) -> Source | None:
    return source and replace(source, arrivals=cycle(source.arrivals), count=count)


def _arrival(row: Row) -> Arrival:
    return Arrival(0.0, row.prompt_tokens, row.output_tokens)


def reference(problem: Problem) -> Slo:
    """Latencies of a lone mean request on 4 H100: what the limits are multiples of, on every cluster alike."""
    gpu = catalog_gpu("H100-SXM")
    stages = even_stages(problem.llm, gpu, 4)
    cost = CostModel(problem.llm, problem.workload, (gpu,))
    return Slo(
        cost.prefill_s(stages, problem.workload.mean_prompt_tokens),
        cost.decode_step_s(stages, 1, problem.workload.mean_context_tokens),
    )
