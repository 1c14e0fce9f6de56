"""A planned placement: which GPUs form which replica, how it is parallel, what flows where, and how good that is.

``plan.yaml`` as `hexgen2 plan` writes it. The plan that runs (``plan.Plan``) has addresses and epochs; this one has
machines and GPUs, before anything runs.
"""

from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hexgen2.config_file import load
from hexgen2.errors import InvalidRequest
from hexgen2.kv.codecs import Codec

ReplicaRole = Literal["prefill", "decode", "colocated"]


class Part(BaseModel):
    """Base: unknown fields are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class StagePlan(Part):
    """A pipeline stage: ``num_layers`` from ``first_layer`` on GPUs of one type in one machine."""

    machine: str
    gpu: str
    tensor_parallel_size: int = Field(ge=1)
    first_layer: int = Field(ge=0)
    num_layers: int = Field(ge=1)


class EnginePlan(Part):
    """What a replica's engine and hand-over may use: settings of each of its ranks."""

    kv_cache_bytes: int = Field(ge=1, description="of the engine's KV cache, per GPU")
    max_num_seqs: int = Field(ge=1)
    max_num_batched_tokens: int = Field(ge=1)
    send_tokens: int = Field(ge=1, description="prompt tokens whose KV the send buffer holds")
    staging_tokens: int = Field(ge=1, description="prompt tokens whose KV staging holds")
    slo_ttft_s: float | None = Field(None, gt=0, description="the workload's limits, which batches adapt to")
    slo_tpot_s: float | None = Field(None, gt=0)


class TimesPlan(Part):
    """What the cost model foretells of a replica, to be held against what it measures. Seconds."""

    prefill: dict[int, float] = Field(description="to the first token, by prompt tokens, alone in the engine")
    busiest: float = Field(1.0, gt=0, le=1, description="part of that in which the next prompt cannot begin")
    decode: dict[int, float] = Field(description="of a step, by requests in it, at the workload's mean context")


class ReplicaPlan(Part):
    """One whole copy of the model. Rates are in requests per second."""

    id: str
    role: ReplicaRole
    stages: tuple[StagePlan, ...] = Field(min_length=1)
    capacity_rps: float = Field(ge=0, description="what it could serve")
    flow_rps: float = Field(ge=0, description="what the plan gives it")
    utilisation: float = Field(ge=0)
    prefill_s: float | None = Field(None, description="mean seconds to the first token of a request that is alone")
    tpot_s: float | None = Field(None, description="time per output token with `batch` requests in flight")
    batch: int | None = Field(None, description="requests in flight at capacity")
    engine: EnginePlan | None = Field(None, description="settings; absent: the engine's own")
    times: TimesPlan | None = Field(None, description="what its steps should take")

    @property
    def num_gpus(self) -> int:
        """In all stages."""
        return sum(stage.tensor_parallel_size for stage in self.stages)

    @property
    def gpus(self) -> dict[tuple[str, str], int]:
        """GPUs by (machine, type)."""
        counts: dict[tuple[str, str], int] = {}
        for stage in self.stages:
            place = (stage.machine, stage.gpu)
            counts[place] = counts.get(place, 0) + stage.tensor_parallel_size
        return counts


class RoutePlan(Part):
    """Requests per second that a prefill replica hands over to a decode replica."""

    prefill: str
    decode: str
    flow_rps: float = Field(gt=0)
    transfer_s: float = Field(ge=0, description="a mean prompt's KV, when nobody else uses the links")
    codec: Codec = Field("none", description="what the KV travels in")


class LinkPlan(Part):
    """A network card or a link that carries KV or hidden states."""

    name: str
    bytes_per_s: float = Field(ge=0)
    bandwidth_bytes_per_s: float = Field(gt=0)
    utilisation: float = Field(ge=0)


class IdlePlan(Part):
    """GPUs without work: more of them would not raise the flow."""

    machine: str
    gpu: str
    count: int = Field(ge=1)


class RunnerUp(Part):
    """Another plan that was found, and what it carries."""

    kind: str
    throughput_rps: float
    replicas: tuple[str, ...] = Field(description="each as `role: GPUs`")


class Placement(Part):
    """A plan.yaml."""

    version: Literal[1] = 1
    cluster: str
    model: str
    workload: str
    kind: Literal["disaggregated", "colocated", "mixed"]
    why: str
    throughput_rps: float = Field(ge=0, description="the largest flow, at utilisation 1")
    bottleneck: str
    bound_rps: float | None = Field(None, description="no plan with groups as these carries more")
    bound_method: str | None = None
    gap: float | None = Field(None, description="(bound - throughput) / bound")
    ttft_s: float | None = Field(description="mean time to first token at `load_rps`, waiting included; null: too much")
    tpot_s: float = Field(description="mean time per output token with the batches of the replicas")
    load_rps: float = Field(description="the workload's rate, or 75 % of the throughput")
    output_tokens_per_s: float
    mean_prompt_tokens: float | None = Field(None, description="of the workload; `transfer_s` of routes is for so many")
    price_per_hour: float | None = None
    price_per_million_output_tokens: float | None = None
    colocate_max_prompt_tokens: int = Field(
        0, ge=0, description="prompts of up to so many tokens are answered sooner by a decode replica alone"
    )
    strategy: str
    seed: int
    evaluations: int
    replicas: tuple[ReplicaPlan, ...]
    routes: tuple[RoutePlan, ...]
    links: tuple[LinkPlan, ...]
    idle: tuple[IdlePlan, ...]
    rdma: tuple[str, ...] = Field(
        (),
        description="machines whose network cards were planned as RDMA: workers that hand over to or from another "
        "machine do not start there without it",
    )
    runners_up: tuple[RunnerUp, ...] = ()

    @property
    def machines(self) -> tuple[str, ...]:
        """Those that replicas are on, in the order of the replicas."""
        return tuple(dict.fromkeys(stage.machine for replica in self.replicas for stage in replica.stages))

    def needs_rdma(self, replica_id: str) -> bool:
        """Whether the replica hands over to, or from, another machine, with RDMA planned at both ends."""
        on = {replica.id: {stage.machine for stage in replica.stages} for replica in self.replicas}
        pairs = [(each.prefill, each.decode) for each in self.routes if replica_id in (each.prefill, each.decode)]
        return any(on[p] != on[d] and on[p] | on[d] <= set(self.rdma) for p, d in pairs)


def to_yaml(placement: Placement) -> str:
    """The text of a plan.yaml. The same placement gives the same bytes."""
    return yaml.safe_dump(placement.model_dump(mode="json"), sort_keys=False, width=120, allow_unicode=True)


def to_json(placement: Placement) -> str:
    """The same on one line, as it goes to the coordinator and into its file."""
    return placement.model_dump_json()


def from_json(text: str, field: str = "plan_json") -> Placement:
    """The inverse of ``to_json``. Raises InvalidRequest naming the first bad field."""
    try:
        return Placement.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidRequest(".".join(map(str, (field, *first["loc"]))), first["msg"]) from None


def load_placement(path: Path) -> Placement:
    """Read a plan.yaml. Raises ConfigError with file, line and field of every problem."""
    return load(path, Placement)
