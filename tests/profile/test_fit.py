"""From an engine's times to a device that the planner foretells them with."""

import pytest

from hexgen2.cluster import GpuType
from hexgen2.llm import Llm
from hexgen2.profile.device import DeviceFigures
from hexgen2.profile.engine import EngineFigures, PromptTime, StepTime
from hexgen2.profile.fit import from_device, from_engine

LLM = Llm(
    name="small",
    num_layers=30,
    hidden_size=576,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    intermediate_size=1536,
    vocab_size=49152,
    max_position_embeddings=8192,
    weight_dtype="float32",
    kv_dtype="float32",
)
DEVICE = DeviceFigures("cpu", "cpu", 8 << 30, flops=5e10, memory_bandwidth_bytes_per_s=1e10, launch_s=4e-6)
KIND = GpuType(
    name="cpu",
    flops=DEVICE.flops,
    memory_bytes=DEVICE.memory_bytes,
    memory_bandwidth_bytes_per_s=1e10,
    link_bandwidth_bytes_per_s=1e9,
    link_latency_s=0.0,
)


def times(token_s: float, square_s: float, step_s: float, cached_s: float) -> EngineFigures:
    """Of an engine whose steps are a fixed time, one for each token, and one for what its attention reads."""
    prompts = tuple(PromptTime(n, step_s + token_s * n + square_s * n * n) for n in (16, 64, 128, 256, 512, 1024, 2048))
    steps = tuple(
        StepTime(b, c, step_s + token_s * b + cached_s * b * c)
        for b, c in ((1, 43.0), (4, 43.0), (8, 43.0), (16, 43.0), (1, 523.0), (8, 523.0))
    )
    return EngineFigures(prompts, steps)


@pytest.mark.parametrize("square_s", [0.0, 1e-7])
@pytest.mark.parametrize("step_s", [0.06, 0.12])
def test_the_planner_foretells_what_was_measured(step_s: float, square_s: float) -> None:
    found = from_engine(DEVICE, times(5e-4, square_s, step_s, 1e-6), LLM, KIND)
    assert found.largest_error < 0.1
    assert found.flops == pytest.approx(2 * 30 * (LLM.attention_elements + LLM.expert_elements) / 5e-4, rel=1e-6)


def test_a_step_quicker_than_memory_is_read_from_a_cache() -> None:
    found = from_engine(DEVICE, times(5e-4, 0.0, 0.02, 1e-6), LLM, KIND)
    assert found.reached.memory > 1.5
    assert found.largest_error < 0.15


def test_without_an_engine_what_was_measured_counts_in_full() -> None:
    reached, _ = from_device(DEVICE, None)
    assert (reached.compute, reached.memory, reached.gemm_s) == (1.0, 1.0, DEVICE.launch_s)
