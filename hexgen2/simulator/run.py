"""One simulation of a plan under a load, from its parts to its report: what the command, sweeps and studies share."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from math import inf

from hexgen2.cluster import Cluster
from hexgen2.errors import ConfigError
from hexgen2.placement import Placement
from hexgen2.scheduler.problem import Problem
from hexgen2.simulator.arrivals import at_once, poisson, redrawn, scaled
from hexgen2.simulator.blueprint import Arrival
from hexgen2.simulator.fleet import Settings, Simulation
from hexgen2.simulator.happenings import Happening
from hexgen2.simulator.outcome import NO_SLO, Slo
from hexgen2.simulator.planned import Planned, planned
from hexgen2.simulator.report import Report, report
from hexgen2.workload import Workload

#: Requests of a built-in distribution when nobody says how many.
NUM_REQUESTS = 5_000


@dataclass(frozen=True, slots=True)
class Source:
    """Requests of a trace, which may be gone through several times. ``longest_prompt`` in tokens."""

    arrivals: Iterable[Arrival]
    count: int
    rate: float
    longest_prompt: int


@dataclass(frozen=True, slots=True)
class Demand:
    """What a plan is asked. At most one of ``rate``, ``scale`` and ``offline``; none: the trace as it was, or 75 %.

    Without a trace, lengths are the workload's and times random.
    """

    source: Source | None = None
    rate: float | None = None
    scale: float | None = None
    offline: bool = False
    num_requests: int | None = None
    seed: int = 0
    slo: Slo = NO_SLO
    warmup_s: float = 0.0
    max_queued: int = 1_000_000
    happenings: tuple[Happening, ...] = ()

    def count(self) -> int:
        """Requests in all."""
        if self.source is None:
            return self.num_requests or NUM_REQUESTS
        return min(self.source.count, self.num_requests or self.source.count)

    def arrivals(self, workload: Workload, usual_rate: float) -> Iterator[Arrival]:
        """In order of time."""
        count = self.count()
        if self.source is None:
            if self.offline:
                return at_once(workload, count, self.seed)
            return poisson(workload, self.rate or (self.scale or 1.0) * usual_rate, count, self.seed)
        rows = (Arrival(*row) for row, _ in zip(self.source.arrivals, range(count), strict=False))
        if self.offline:
            return (row._replace(time_s=0.0) for row in rows)
        if self.rate is not None:
            return redrawn(rows, self.rate, self.seed)
        return scaled(rows, self.scale or 1.0)


def simulate(
    blueprint: Planned,
    demand: Demand,
    price_per_hour: float | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> Report:
    """Run it. The same arguments give the same report."""
    simulation = make(blueprint, demand)
    simulation.run(progress)
    return report(simulation, price_per_hour)


def make(blueprint: Planned, demand: Demand) -> Simulation:
    """The simulation of a plan under a demand, not yet run."""
    plan, workload = blueprint.placement, blueprint.problem.workload
    settings = Settings(demand.slo, demand.warmup_s, demand.max_queued)
    return Simulation(blueprint, demand.arrivals(workload, plan.load_rps), settings, demand.happenings)


def prepare(
    placement: Placement,
    problem: Problem,
    demand: Demand,
    *,
    codec: str | None = None,
    pool_tokens: int | None = None,
    mixes: bool | None = None,
) -> Planned:
    """The blueprint that a demand needs. ``mixes``: chunked prefill, whatever the engine has. Raises ConfigError."""
    longest = problem.workload.longest_prompt_tokens
    if demand.source is not None:
        longest = demand.source.longest_prompt
    chunked = problem.cost.engine.chunked_prefill if mixes is None else mixes
    return planned(placement, problem, longest, codec=codec, pool_tokens=pool_tokens, mixes=chunked)


def widened(cluster: Cluster, factor: float) -> Cluster:
    """The cluster with network cards and links between machines ``factor`` times as fast. Raises ConfigError."""
    if not 0 < factor < inf:
        raise ConfigError(f"bandwidth: {factor} is no factor")
    links = {
        name: tuple(
            each.model_copy(update={"bandwidth_bytes_per_s": each.bandwidth_bytes_per_s * factor})
            for each in getattr(cluster, name)
        )
        for name in ("site_links", "machine_links")
    }
    machines = tuple(
        each.model_copy(update={"nic_bandwidth_bytes_per_s": each.nic_bandwidth_bytes_per_s * factor})
        for each in cluster.machines
    )
    return cluster.model_copy(update={"machines": machines, **links})


def other(problem: Problem, **parts: object) -> Problem:
    """The problem with another cluster, model or workload."""
    return replace(problem, **parts)  # type: ignore[arg-type]
