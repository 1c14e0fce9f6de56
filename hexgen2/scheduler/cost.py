"""What a model's steps cost on one kind of GPU: seconds of prefill and decode, bytes of KV and memory, by plain names.

The way in to the cost model. ``CostModel`` answers the same for any row of unlike stages (``cost_model``).

    >>> round(prefill_seconds("llama-2-70b", "H100-SXM", tensor_parallel_size=4, prompt_tokens=2048), 1)
    0.2
    >>> kv_bytes("llama-2-70b", 1)
    327680
"""

from hexgen2 import llm as llms
from hexgen2.cluster import GpuType
from hexgen2.cluster_file import catalog_gpu
from hexgen2.llm import Llm
from hexgen2.scheduler.cost_model import MEMORY_UTILIZATION, OVERHEAD_BYTES, STAGING_BYTES, even_stages
from hexgen2.scheduler.cost_model import CostModel as CostModel
from hexgen2.scheduler.cost_model import Stage as Stage
from hexgen2.scheduler.cost_model import Stages as Stages
from hexgen2.scheduler.efficiency import engine
from hexgen2.scheduler.rates import Rate as Rate
from hexgen2.workload import LengthClass, Workload


def _setting(
    model: str | Llm, gpu: str | GpuType, tensor_parallel_size: int, pipeline_parallel_size: int, profile: str | None
) -> tuple[CostModel, Stages]:
    llm = llms.find(model) if isinstance(model, str) else model
    kind = catalog_gpu(gpu) if isinstance(gpu, str) else gpu
    one = Workload(lengths=(LengthClass(prompt_tokens=1, output_tokens=1, weight=1.0),))
    chosen = engine(profile) if profile else engine()
    stages = even_stages(llm, kind, tensor_parallel_size, pipeline_parallel_size)
    return CostModel(llm, one, (kind,), chosen), stages


def prefill_seconds(
    model: str | Llm,
    gpu: str | GpuType,
    *,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    prompt_tokens: int,
    batch: int = 1,
    engine: str | None = None,
) -> float:
    """Seconds until ``batch`` prompts of ``prompt_tokens`` each, in one step, have their first tokens.

    ``model`` and ``gpu`` are catalog names or objects; ``engine`` names a profile. Unknown names raise ConfigError.
    """
    costs, stages = _setting(model, gpu, tensor_parallel_size, pipeline_parallel_size, engine)
    return costs.prefill_s(stages, prompt_tokens, batch)


def decode_step_seconds(
    model: str | Llm,
    gpu: str | GpuType,
    *,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    batch: int = 1,
    context_tokens: float,
    engine: str | None = None,
) -> float:
    """Seconds of one decode step: one token for each of ``batch`` requests with ``context_tokens`` cached each."""
    costs, stages = _setting(model, gpu, tensor_parallel_size, pipeline_parallel_size, engine)
    return costs.decode_step_s(stages, batch, context_tokens)


def kv_bytes(model: str | Llm, tokens: int, batch: int = 1) -> int:
    """Bytes of keys and values of ``batch`` requests with ``tokens`` each, all layers and heads."""
    llm = llms.find(model) if isinstance(model, str) else model
    return llm.kv_bytes_per_token * tokens * batch


def memory_bytes(
    model: str | Llm,
    *,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    batch: int = 1,
    tokens: int = 0,
) -> float:
    """Bytes that the fullest GPU of a replica needs: weights, KV of ``batch`` requests of ``tokens``, overheads.

    Compare with 0.9 of what the driver reports (``MEMORY_UTILIZATION``).
    """
    llm = llms.find(model) if isinstance(model, str) else model
    costs, stages = _setting(llm, "H100-SXM", tensor_parallel_size, pipeline_parallel_size, None)
    share = min(tensor_parallel_size, llm.num_kv_heads)
    kv = batch * tokens * llm.kv_bytes_per_token_layer / share
    return (
        OVERHEAD_BYTES
        + STAGING_BYTES
        + max(costs.weight_bytes_per_gpu(stages, number) + stage.num_layers * kv for number, stage in enumerate(stages))
    )


def fits(
    model: str | Llm,
    gpu: str | GpuType,
    *,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    batch: int = 1,
    tokens: int = 0,
) -> bool:
    """Whether the model, split so, and KV of ``batch`` requests of ``tokens`` each fit into the GPUs' memory."""
    llm = llms.find(model) if isinstance(model, str) else model
    kind = catalog_gpu(gpu) if isinstance(gpu, str) else gpu
    needed = memory_bytes(
        llm,
        tensor_parallel_size=tensor_parallel_size,
        pipeline_parallel_size=pipeline_parallel_size,
        batch=batch,
        tokens=tokens,
    )
    return llm.allows_tensor_parallel_size(tensor_parallel_size) and needed <= kind.memory_bytes * MEMORY_UTILIZATION
