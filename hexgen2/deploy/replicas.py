"""A planned replica as vLLM is told of it: parallel sizes, batch, which GPUs, how many layers in which stage. Pure."""

from collections.abc import Sequence
from pathlib import Path

from hexgen2.config import VllmEngineConfig
from hexgen2.errors import ConfigError
from hexgen2.placement import ReplicaPlan


def planned_engine(
    engine: VllmEngineConfig, replica: ReplicaPlan, num_layers: int, plan: Path | None
) -> VllmEngineConfig:
    """A replica's engine as planned. Raises ConfigError where vLLM cannot, or the model has other layers."""
    sizes = [stage.tensor_parallel_size for stage in replica.stages]
    if len(set(sizes)) > 1:
        raise ConfigError(
            f"{plan}: replica {replica.id}: stages of {', '.join(map(str, sizes))} GPUs: vLLM takes one "
            "tensor_parallel_size for all stages"
        )
    layers = sum(stage.num_layers for stage in replica.stages)
    if layers != num_layers:
        raise ConfigError(
            f"{plan}: replica {replica.id} has {layers} layers, and {engine.model} has {num_layers}: give the model "
            "that was planned for (--model)"
        )
    update: dict[str, int] = {"tensor_parallel_size": sizes[0], "pipeline_parallel_size": len(sizes)}
    wanted: dict[str, int | None] = {"max_num_seqs": replica.batch}
    if (plan_engine := replica.engine) is not None:
        wanted = plan_engine.model_dump(include={"kv_cache_bytes", "max_num_seqs", "max_num_batched_tokens"})
    for name, value in wanted.items():
        # What the caller sets wins over the plan.
        if value and name not in engine.model_fields_set:
            update[name] = value
    return engine.model_copy(update=update)


def planned_environment(replica: ReplicaPlan, gpus: Sequence[int]) -> dict[str, str]:
    """vLLM's own variables: which GPUs, and how many layers each stage has."""
    found = {}
    if gpus:
        # CUDA would count from its fastest GPU, the driver and its tools count by the bus.
        found["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
        found["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
    if len(replica.stages) > 1:
        found["VLLM_PP_LAYER_PARTITION"] = ",".join(str(stage.num_layers) for stage in replica.stages)
    return found
