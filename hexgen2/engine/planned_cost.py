"""What an emulated engine needs to take as long as planned GPUs would: a file for each replica, made from a plan."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from hexgen2 import llm as llms
from hexgen2.cluster import GpuType
from hexgen2.config_file import load
from hexgen2.scheduler.cost import CostModel, Stage
from hexgen2.simulator.step_times import PipelineTimes
from hexgen2.workload import Workload


class Part(BaseModel):
    """Base: unknown fields are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class StageCost(Part):
    """As ``scheduler.cost_model.Stage``; no link after the last stage."""

    gpu: str
    tensor_parallel_size: int = Field(ge=1)
    num_layers: int = Field(ge=1)
    tp_bandwidth_bytes_per_s: float = Field(gt=0)
    tp_latency_s: float = Field(ge=0)
    next_bandwidth_bytes_per_s: float | None = Field(None, gt=0)
    next_latency_s: float = Field(0.0, ge=0)


class PlannedCost(Part):
    """One replica of a plan: model, workload, GPUs and stages, and what its engine may do at once."""

    model: str
    weight_dtype: str | None = None
    kv_dtype: str | None = None
    workload: Workload
    gpu_types: tuple[GpuType, ...]
    stages: tuple[StageCost, ...] = Field(min_length=1)
    kv_tokens: float = Field(gt=0)
    max_num_seqs: int = Field(ge=1)
    max_num_batched_tokens: int = Field(ge=1)
    num_lanes: int = Field(1, ge=1)

    @property
    def times(self) -> PipelineTimes:
        """Of its steps. Raises ConfigError for a model that is not known here."""
        llm = llms.find(self.model, weight_dtype=self.weight_dtype, kv_dtype=self.kv_dtype)
        stages = tuple(Stage(**stage.model_dump(exclude_none=True)) for stage in self.stages)
        cost = CostModel(llm, self.workload, self.gpu_types)
        return PipelineTimes(cost, stages, self.max_num_batched_tokens + self.max_num_seqs * self.num_lanes)


def load_planned_cost(path: Path) -> PlannedCost:
    """Read a file. Raises ConfigError with file, line and field of every problem."""
    return load(path, PlannedCost)
