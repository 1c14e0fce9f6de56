"""The simulator against what can be said with pencil and paper: queues of one server, full pipelines, a full link."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import log1p
from random import Random

from hexgen2 import llm as llms
from hexgen2.cluster_file import catalog_gpu
from hexgen2.plan import Route
from hexgen2.scheduler.cost import CostModel, Stage, Stages
from hexgen2.simulator.arrivals import at_once
from hexgen2.simulator.blueprint import Arrival, Given, ReplicaSpec
from hexgen2.simulator.engine import Limits
from hexgen2.simulator.fleet import Settings, Simulation
from hexgen2.simulator.links import Path
from hexgen2.simulator.outcome import Outcome
from hexgen2.simulator.step_times import Figures, PipelineTimes
from hexgen2.workload import LengthClass, Workload

#: An engine that takes no time.
INSTANT = Figures(0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Check:
    """A closed form beside what was simulated."""

    what: str
    unit: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Relative."""
        return self.measured / self.predicted - 1


def checks(num_requests: int = 200_000) -> Iterator[Check]:
    """All of them; the queues are simulated for ``num_requests`` each, the rest for a hundredth."""
    for load in (0.3, 0.5):
        yield deterministic_queue(load, num_requests)
        yield exponential_queue(load, num_requests)
    for prompt_tokens in (400, 1500):
        yield full_prefill(prompt_tokens, max(200, num_requests // 100))
    for batch in (8, 96):
        yield full_decode(batch, 10 * batch)
    yield full_link(max(200, num_requests // 100))
    yield from shared_links(max(400, num_requests // 50))


def deterministic_queue(load: float, num_requests: int) -> Check:
    """M/D/1: mean time to the first token D (1 + load / (2 (1 - load))) of a server that takes D."""
    service_s = 0.1
    outcome = _alone(Figures(0.0, service_s, 0.0), _poisson(load / service_s, [1] * num_requests))
    predicted = service_s * (1 + load / (2 * (1 - load)))
    return Check(f"M/D/1 queue at {load:.0%}: time in it", "s", predicted, outcome.ttft.mean)


def exponential_queue(load: float, num_requests: int) -> Check:
    """M/M/1: mean time to the first token D / (1 - load) of a server that takes D in the mean."""
    service_s, tokens = 0.1, 10_000

    lengths = [max(1, round(tokens * each)) for each in _exponential(num_requests, 2)]
    outcome = _alone(Figures(service_s / tokens, 0.0, 0.0), _poisson(load / service_s, lengths))
    return Check(f"M/M/1 queue at {load:.0%}: time in it", "s", service_s / (1 - load), outcome.ttft.mean)


def full_prefill(prompt_tokens: int, num_requests: int) -> Check:
    """A pipeline of unlike stages that never lacks prompts: the cost model's rate of its slowest stage."""
    workload = _constant(prompt_tokens, 1)
    cost, stages = _pipeline(workload)
    limits = Limits(shared_tokens=cost.shared_tokens(stages), num_lanes=2 * len(stages) - 1)
    outcome = _alone(PipelineTimes(cost, stages, 4096), at_once(workload, num_requests, 0), limits)
    what = f"prefill of {prompt_tokens} tokens over {len(stages)} stages, full: prompts"
    return Check(what, "1/s", cost.prefill_rate(stages), _rate(outcome))


def full_decode(batch: int, num_requests: int) -> Check:
    """A pipeline that always decodes ``batch`` of them: batch / (tokens x the time of one token for each)."""
    workload = _constant(500, 201)
    cost, stages = _pipeline(workload)
    lanes = len(stages)
    limits = Limits(num_lanes=lanes, max_num_seqs=batch // lanes)
    fleet = _pair(
        ReplicaSpec(INSTANT, Limits(max_num_batched_tokens=1_000_000)),
        ReplicaSpec(PipelineTimes(cost, stages, 4096), limits),
    )
    outcome = Simulation(fleet, at_once(workload, num_requests, 0), Settings()).run()
    # While 200 tokens are made the prompt's 500 grow by 1 to 200; the model is linear in them.
    parts = [cost.decode_step_s((stage,), batch // lanes, 500 + 99.5) for stage in stages]
    through = cost.decode_step_s(stages, batch // lanes, 500 + 99.5)
    predicted = batch / (200 * max(through, lanes * max(parts)))
    # All of a batch begin and end together, so there are whole batches and no edges.
    measured = num_requests / outcome.last_end_s
    return Check(f"decode of {batch} at a time over {lanes} stages, full: answers", "1/s", predicted, measured)


def full_link(num_requests: int) -> Check:
    """A link between two replicas that take no time: its bandwidth over a prompt's bytes."""
    bandwidth, tokens, per_token = 1e9, 1000, 327_680
    fleet = _pair(
        ReplicaSpec(INSTANT, Limits(max_num_batched_tokens=1_000_000), send_pages=32),
        ReplicaSpec(INSTANT, Limits(), staging_pages=24),
        Path((("wire", 1.0),)),
        {"wire": bandwidth},
        per_token,
    )
    outcome = Simulation(fleet, at_once(_constant(tokens, 2), num_requests, 0), Settings()).run()
    return Check("a full link: prompts", "1/s", bandwidth / (tokens * per_token), _rate(outcome))


def shared_links(num_requests: int) -> Iterator[Check]:
    """Two receivers behind one card, one of them on a slow link: that one gets its link, the other what is left."""
    tokens, per_token = 1000, 100_000
    fast, slow = 1e9, 0.25e9
    instant = ReplicaSpec(INSTANT, Limits(max_num_batched_tokens=1_000_000), staging_pages=32)
    fleet = Given(
        roles={"p": "prefill", "near": "decode", "far": "decode"},
        specs={("p", "prefill"): instant, ("near", "decode"): instant, ("far", "decode"): instant},
        routes=(Route("p", "near", 3.0), Route("p", "far", 1.0)),
        bandwidths={"card": fast, "wan": slow},
        paths={("p", "near"): Path((("card", 1.0),)), ("p", "far"): Path((("card", 1.0), ("wan", 1.0)))},
        kv_bytes_per_token=per_token,
    )
    simulation = Simulation(fleet, at_once(_constant(tokens, 2), num_requests, 0), Settings())
    outcome = simulation.run()
    seconds = outcome.last_end_s
    yield Check(
        "a card and a slow link that share: card", "B/s", fast, simulation.links.carried_bytes["card"] / seconds
    )
    yield Check("a card and a slow link that share: link", "B/s", slow, simulation.links.carried_bytes["wan"] / seconds)


def _alone(times: "Figures | PipelineTimes", arrivals: Iterator[Arrival], limits: Limits | None = None) -> Outcome:
    """One engine, one answer token each."""
    limits = limits or Limits(max_prompts=1, max_num_batched_tokens=1_000_000)
    fleet = Given(
        roles={"one": "colocated"},
        specs={("one", "colocated"): ReplicaSpec(times, limits)},
        routes=(Route("one", "one", 1.0),),
    )
    return Simulation(fleet, arrivals, Settings()).run()


def _pair(
    prefill: ReplicaSpec,
    decode: ReplicaSpec,
    path: Path = Path(),  # noqa: B008
    bandwidths: dict[str, float] | None = None,
    kv_bytes_per_token: float = 0.0,
) -> Given:
    return Given(
        roles={"p": "prefill", "d": "decode"},
        specs={("p", "prefill"): prefill, ("d", "decode"): decode},
        routes=(Route("p", "d", 1.0),),
        bandwidths=dict(bandwidths or {}),
        paths={("p", "d"): path},
        kv_bytes_per_token=kv_bytes_per_token,
    )


def _pipeline(workload: Workload) -> tuple[CostModel, Stages]:
    llm = llms.find("llama-2-70b")
    gpus = [catalog_gpu(name) for name in ("H100-SXM", "A100-SXM")]
    stages = (
        Stage("H100-SXM", 2, 50, 450e9, 1e-6, 5e9, 1e-5),
        Stage("A100-SXM", 2, 30, 300e9, 1e-6),
    )
    return CostModel(llm, workload, gpus), stages


def _constant(prompt_tokens: int, output_tokens: int) -> Workload:
    return Workload(lengths=(LengthClass(prompt_tokens=prompt_tokens, output_tokens=output_tokens, weight=1.0),))


def _poisson(rate: float, lengths: list[int]) -> Iterator[Arrival]:
    time_s = 0.0
    for gap, length in zip(_exponential(len(lengths), 1), lengths, strict=True):
        time_s += gap / rate
        yield Arrival(time_s, length, 1)


def _exponential(count: int, seed: int) -> list[float]:
    """Quantiles of an exponential distribution of mean 1 in random order: a sample without error in its moments."""
    values = [-log1p(-(number + 0.5) / count) for number in range(count)]
    Random(seed).shuffle(values)
    return values


def _rate(outcome: Outcome) -> float:
    """Answers per second without the beginning and the end."""
    return outcome.ended.rate(0.1 * outcome.last_end_s, 0.9 * outcome.last_end_s)
