"""From measured times to what the cost model asks of a device: rates, efficiencies and fixed times. Pure.

The planner then foretells what was measured; how nearly is told (``error``) with every profile.
"""

from dataclasses import dataclass

import numpy as np

from hexgen2.cluster import GpuType, HostTimes, Reached
from hexgen2.cluster_file import catalog_gpu
from hexgen2.errors import ConfigError
from hexgen2.llm import Llm
from hexgen2.profile.device import DeviceFigures
from hexgen2.profile.engine import EngineFigures
from hexgen2.scheduler.cost_model import CostModel, even_stages
from hexgen2.scheduler.efficiency import Efficiency, efficiency, engine
from hexgen2.workload import LengthClass, Workload

#: The engine profile that adds nothing to a device's own figures.
PROFILE = "as-measured"
#: Matrix products of one layer, as the cost model counts them.
PRODUCTS = 4
#: A part of a rate that is not seen in the times (a short context, a tiny model) is taken to be so many times it.
UNSEEN = 100.0


@dataclass(frozen=True, slots=True)
class Fitted:
    """A device as the planner takes it, and the largest and median relative error on what it was fitted to."""

    flops: float
    memory_bandwidth_bytes_per_s: float
    reached: Reached
    host: HostTimes
    largest_error: float
    median_error: float


def from_device(figures: DeviceFigures, catalog_name: str | None) -> tuple[Reached, HostTimes]:
    """Without an engine: what was measured counts in full, attention as far behind products as the catalog has it."""
    known = _catalog_efficiency(catalog_name)
    reached = Reached(
        gemm_s=figures.launch_s,
        blend=known.blend,
        attention_compute=known.attention_compute / known.compute,
        attention_s=figures.launch_s,
        attention_memory=min(1.0, known.attention_memory / known.memory),
        cached_attention_s=figures.launch_s,
    )
    return reached, HostTimes()


def from_engine(figures: DeviceFigures, times: EngineFigures, llm: Llm, kind: GpuType) -> Fitted:
    """With the engine: what it takes for prompts and steps, beside what it must read of the device's memory."""
    tokens = np.array([each.tokens for each in times.prompts], float)
    seconds = np.array([each.seconds for each in times.prompts])
    _, token_s, square_s = _positive(np.stack([np.ones_like(tokens), tokens, tokens**2], axis=1), seconds)
    batch = np.array([each.batch for each in times.steps], float)
    context = np.array([each.context_tokens for each in times.steps])
    step_seconds = np.array([each.seconds for each in times.steps])
    step_s, _, cached_s = _positive(np.stack([np.ones_like(batch), batch, batch * context], axis=1), step_seconds)
    layers, hidden = llm.num_layers, llm.hidden_size
    # Products as the cost model counts them; what tokens take in prompts, products are taken to be the cause of.
    active = llm.attention_elements + llm.num_experts_per_token * llm.expert_elements
    flops = 2.0 * layers * active / max(token_s, 1e-12)
    attention_flops = 2.0 * layers * llm.num_heads * llm.head_dim
    bandwidth = figures.memory_bandwidth_bytes_per_s
    read_s = (layers * llm.layer_bytes + llm.vocab_size * hidden * 2.0) / bandwidth
    fixed_s = max(0.0, step_s - read_s)
    reached = Reached(
        # A step that is quicker than its weights could be read from memory reads them from a cache.
        memory=max(1.0, read_s / step_s) if step_s > 0 else UNSEEN,
        gemm_s=fixed_s / (PRODUCTS * layers + 1),
        blend=1.0,
        attention_compute=min(UNSEEN, attention_flops / (flops * square_s)) if square_s > 0 else UNSEEN,
        attention_memory=min(UNSEEN, llm.kv_bytes_per_token / (bandwidth * cached_s)) if cached_s > 0 else UNSEEN,
    )
    host = HostTimes()
    fitted = kind.model_copy(
        update={"flops": flops, "memory_bandwidth_bytes_per_s": bandwidth, "reached": reached, "host": host}
    )
    errors = _errors(fitted, times, llm)
    return Fitted(flops, bandwidth, reached, host, float(np.max(errors)), float(np.median(errors)))


def _errors(kind: GpuType, times: EngineFigures, llm: Llm) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    """Relative, of every time that was measured."""
    one = Workload(lengths=(LengthClass(prompt_tokens=1, output_tokens=1, weight=1.0),))
    cost, stages = CostModel(llm, one, (kind,), engine(PROFILE)), even_stages(llm, kind)
    pairs = [(cost.prefill_s(stages, each.tokens), each.seconds) for each in times.prompts]
    pairs += [(cost.decode_step_s(stages, each.batch, each.context_tokens), each.seconds) for each in times.steps]
    return np.array([abs(told / seen - 1.0) for told, seen in pairs])


def _positive(
    columns: "np.ndarray[tuple[int, int], np.dtype[np.float64]]",
    seconds: "np.ndarray[tuple[int], np.dtype[np.float64]]",
) -> list[float]:
    """Least squares of the relative error, no figure below zero."""
    from scipy.optimize import nnls

    weights = 1.0 / seconds
    found, _ = nnls(columns * weights[:, None], np.ones(len(weights)))
    return [float(each) for each in found]


def _catalog_efficiency(name: str | None) -> Efficiency:
    """Of a GPU of the catalog, or of its usual one."""
    try:
        return efficiency(catalog_gpu(name or "L40S"))
    except ConfigError:
        return efficiency(catalog_gpu("L40S"))
