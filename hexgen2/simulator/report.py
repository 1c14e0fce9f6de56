"""What a simulation says at its end: one record, as a table for people and as JSON."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import inf
from typing import Any

from hexgen2.simulator.fleet import Simulation
from hexgen2.simulator.sketch import Sketch

QUANTILES = (0.5, 0.9, 0.95, 0.99)


@dataclass(frozen=True, slots=True)
class Times:
    """Of one kind of time, in seconds."""

    mean_s: float
    p50_s: float
    p90_s: float
    p95_s: float
    p99_s: float

    @staticmethod
    def of(sketch: Sketch) -> "Times":
        """Of what was counted."""
        return Times(sketch.mean, *(sketch.quantile(share) for share in QUANTILES))


@dataclass(frozen=True, slots=True)
class ReplicaUse:
    """``busy``: share of the time that its busiest stage works; KV in tokens."""

    replica_id: str
    role: str
    num_gpus: int
    busy: float
    mean_kv_tokens: float
    kv_tokens: float
    preemptions: int


@dataclass(frozen=True, slots=True)
class WireUse:
    """``busy``: share of its bandwidth that KV took."""

    name: str
    bytes_per_s: float
    busy: float


@dataclass(frozen=True, slots=True)
class Report:
    """See the module. Rates are per second of the whole run; ``steady_rps`` leaves out how it begins and ends."""

    requests: int
    finished: int
    failed: Mapping[str, int]
    retried: int
    moved: int
    seconds: float
    offered_rps: float
    throughput_rps: float
    steady_rps: float
    output_tokens_per_s: float
    prompt_tokens_per_s: float
    goodput_rps: float
    slo_attainment: float
    ttft: Times
    tpot: Times
    e2e: Times
    price_per_hour: float | None
    price_per_million_output_tokens: float | None
    replicas: tuple[ReplicaUse, ...]
    wires: tuple[WireUse, ...]
    num_events: int

    def to_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self)


def report(simulation: Simulation, price_per_hour: float | None = None) -> Report:
    """Of a simulation that was run."""
    outcome = simulation.outcome
    begin = outcome.first_arrival_s if outcome.num_arrived else 0.0
    seconds = max(outcome.last_end_s - begin, 1e-9)
    end = begin + seconds
    offered = (outcome.last_arrival_s - begin) or inf
    measured = outcome.ttft.count
    good = outcome.num_good / measured if measured else 0.0
    lost = outcome.num_arrived - outcome.num_finished
    attained = good * outcome.num_finished / max(1, outcome.num_finished + lost)
    tokens = outcome.output_tokens / seconds
    # Until shortly before the last first token there was work for all (not all prefill ends at the same time); long
    # answers need some time before they end as often as begin.
    full = max(outcome.last_first_s - begin, 0.0)
    steady = outcome.ended.rate(begin + 0.4 * full, begin + 0.9 * full)
    return Report(
        requests=outcome.num_arrived,
        finished=outcome.num_finished,
        failed=dict(sorted(outcome.failed.items())),
        retried=outcome.num_retried,
        moved=outcome.num_moved,
        seconds=seconds,
        offered_rps=outcome.num_arrived / offered if offered < inf else 0.0,
        throughput_rps=outcome.num_finished / seconds,
        steady_rps=steady,
        output_tokens_per_s=tokens,
        prompt_tokens_per_s=outcome.prompt_tokens / seconds,
        goodput_rps=good * outcome.num_finished / seconds,
        slo_attainment=attained,
        ttft=Times.of(outcome.ttft),
        tpot=Times.of(outcome.tpot),
        e2e=Times.of(outcome.e2e),
        price_per_hour=price_per_hour,
        price_per_million_output_tokens=price_per_hour / 3600 / tokens * 1e6 if price_per_hour and tokens else None,
        replicas=tuple(
            ReplicaUse(
                name,
                each.role,
                each.spec.num_gpus,
                (each.busy_s + max(each.engine.busy_s)) / end if each.alive else each.busy_s / end,
                each.engine.mean_kv_tokens,
                each.spec.limits.kv_tokens,
                each.num_preemptions + (each.engine.num_preemptions if each.alive else 0),
            )
            for name, each in simulation.replicas.items()
        ),
        wires=tuple(
            WireUse(str(wire), carried / seconds, carried / seconds / simulation.links.bandwidths[wire])
            for wire, carried in simulation.links.carried_bytes.items()
            if carried
        ),
        num_events=simulation.clock.num_events,
    )
