"""The cost model: its limits, its orders, and figures that can be checked in the head."""

import dataclasses
import math
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexgen2 import llm
from hexgen2.cluster_file import catalog_gpu
from hexgen2.errors import ConfigError
from hexgen2.scheduler.cost import decode_step_seconds, fits, kv_bytes, memory_bytes, prefill_seconds
from hexgen2.scheduler.cost_model import (
    MEMORY_UTILIZATION,
    OVERHEAD_BYTES,
    STAGING_BYTES,
    CostModel,
    Stage,
    even_stages,
)
from hexgen2.scheduler.efficiency import engine
from hexgen2.scheduler.kernels import blended_max
from hexgen2.scheduler.stage_costs import batch_grid
from hexgen2.workload import LengthClass, Workload
from hexgen2.workload_file import find_workload

MODEL = "llama-2-70b"
GPUS = ("H100-SXM", "A100-SXM", "L40", "A6000")


def model(*points: tuple[int, int], tpot_s: float | None = None, name: str = MODEL) -> CostModel:
    lengths = tuple(LengthClass(prompt_tokens=p, output_tokens=o, weight=1.0) for p, o in points or ((1000, 200),))
    work = Workload(lengths=lengths, tpot_s=tpot_s)
    return CostModel(llm.find(name), work, [catalog_gpu(gpu) for gpu in GPUS])


def replica(gpu: str = "H100-SXM", tp: int = 4, pp: int = 1, name: str = MODEL) -> tuple[Stage, ...]:
    return even_stages(llm.find(name), catalog_gpu(gpu), tp, pp)


sizes = st.sampled_from([1, 2, 4, 8])
gpus = st.sampled_from(GPUS)


@settings(max_examples=50, deadline=None)
@given(gpus, sizes, st.integers(1, 8000), st.integers(1, 8))
def test_prefill_is_no_faster_than_the_nominal_speeds_allow(gpu: str, tp: int, prompt: int, batch: int) -> None:
    kind, shape = catalog_gpu(gpu), llm.find(MODEL)
    seconds = prefill_seconds(MODEL, gpu, tensor_parallel_size=tp, prompt_tokens=prompt, batch=batch)
    assert seconds > 2 * prompt * batch * shape.num_layers * shape.layer_bytes / 2 / tp / kind.flops
    assert seconds > shape.num_layers * shape.layer_bytes / tp / kind.memory_bandwidth_bytes_per_s


@settings(max_examples=50, deadline=None)
@given(gpus, sizes, st.integers(1, 200), st.integers(1, 8000))
def test_a_decode_step_reads_all_weights_and_all_cached_tokens(gpu: str, tp: int, batch: int, context: int) -> None:
    kind, shape = catalog_gpu(gpu), llm.find(MODEL)
    seconds = decode_step_seconds(MODEL, gpu, tensor_parallel_size=tp, batch=batch, context_tokens=context)
    read = shape.num_layers * shape.layer_bytes + kv_bytes(MODEL, context, batch)
    assert seconds > read / tp / kind.memory_bandwidth_bytes_per_s


@settings(max_examples=50, deadline=None)
@given(gpus, sizes, st.integers(1, 4000), st.integers(1, 64))
def test_more_work_takes_no_less_time(gpu: str, tp: int, tokens: int, batch: int) -> None:
    def prefill(prompt: int, together: int) -> float:
        return prefill_seconds(MODEL, gpu, tensor_parallel_size=tp, prompt_tokens=prompt, batch=together)

    def decode(context: int, together: int) -> float:
        return decode_step_seconds(MODEL, gpu, tensor_parallel_size=tp, context_tokens=context, batch=together)

    for time in (prefill, decode):
        assert time(tokens, batch) <= time(tokens * 2, batch) * 1.0000001
        assert time(tokens, batch) <= time(tokens, batch * 2) * 1.0000001


def test_twice_the_gpus_are_faster_but_not_twice_as_fast() -> None:
    for prompt in (2048, 8192):
        times = [prefill_seconds(MODEL, "A100-SXM", tensor_parallel_size=tp, prompt_tokens=prompt) for tp in (2, 4, 8)]
        assert times[0] > times[1] > times[2] > times[0] / 4


def test_a_pipeline_of_one_machine_takes_as_long_as_one_gpu_and_serves_more() -> None:
    costs = model((2000, 100), name="llama-3.1-8b")
    one, four = (replica("L40", 1, pp, "llama-3.1-8b") for pp in (1, 4))
    assert costs.prefill_s(four, 2000) == pytest.approx(costs.prefill_s(one, 2000), rel=0.15)
    assert costs.prefill_rate(four) > 3 * costs.prefill_rate(one)


def test_a_slow_link_between_stages_bounds_the_rate() -> None:
    costs = model()
    first, last = replica(pp=2)
    slow = (first._replace(next_bandwidth_bytes_per_s=1e8, next_latency_s=0.0), last)
    assert costs.prefill_rate(slow) == pytest.approx(1e8 / (1000 * 8192 * 2))
    assert costs.decode_rate(slow).tpot_s > costs.decode_rate((first, last)).tpot_s


def test_a_rate_is_one_over_the_mean_time_never_the_time_of_the_mean() -> None:
    mixed, mean = model((256, 100), (8000, 100)), model((4128, 100))
    assert mixed.prefill_rate(replica()) < mean.prefill_rate(replica())
    times = [mixed.prefill_s(replica(), prompt) for prompt in (256, 8000)]
    assert mixed.prefill_rate(replica()) >= 1 / (sum(times) / 2)


def test_short_prompts_share_a_step() -> None:
    costs = model((64, 10))
    assert costs.prefill_rate(replica()) > 2 / costs.prefill_s(replica(), 64)


def test_decode_takes_the_largest_batch_that_memory_and_the_limit_allow() -> None:
    free, limited = model(), model(tpot_s=0.05)
    assert free.decode_rate(replica()).batch <= free.max_batch(replica())
    assert limited.decode_rate(replica()).tpot_s <= 0.05
    assert 0 < limited.decode_rate(replica()).rate < free.decode_rate(replica()).rate
    assert model(tpot_s=0.001).decode_rate(replica()) == (0.0, 0, 0.0)


def test_decode_rate_is_batch_over_answer_time() -> None:
    costs = model()
    rate, batch, tpot_s = costs.decode_rate(replica())
    assert tpot_s == pytest.approx(costs.decode_step_s(replica(), batch, costs.workload.mean_context_tokens))
    assert rate == pytest.approx(batch / (199 * tpot_s))


def test_steps_of_both_phases_cost_more_than_decode_and_less_than_one_of_each() -> None:
    costs = model((1000, 201))
    kernels = costs.kernels(replica()[0])
    # 32 requests decode; 160 tokens of prompts keep up with them, a sixth of a prompt.
    both = kernels.mixed_layer_s(32, 1100, 160, 0.16 * 1000**2, 0, 0)
    assert kernels.decode_layer_s(32, 1100) < both
    assert both < kernels.decode_layer_s(32, 1100) + kernels.prefill_layer_s(160, 1) * 1000 / 160
    # Later chunks read what earlier ones wrote.
    assert kernels.mixed_layer_s(32, 1100, 160, 0.16 * 1000**2, 400, 0) > both


@pytest.mark.parametrize("chunked", [False, True])
def test_a_colocated_replica_serves_less_than_either_phase_alone(chunked: bool) -> None:
    profile = dataclasses.replace(engine("assumed-cuda-graphs"), chunked_prefill=chunked)
    work = Workload(lengths=(LengthClass(prompt_tokens=1000, output_tokens=200, weight=1.0),))
    costs = CostModel(llm.find(MODEL), work, [catalog_gpu("H100-SXM")], profile)
    apart = 1 / (1 / costs.prefill_rate(replica()) + 1 / costs.decode_rate(replica()).rate)
    both = costs.colocated_rate(replica())
    assert both.rate < min(costs.prefill_rate(replica()), costs.decode_rate(replica()).rate)
    # Alone, prefill has more prompts to share its steps.
    assert both.rate == pytest.approx(apart, rel=0.1)
    assert chunked or both.rate < apart
    assert both.tpot_s > costs.decode_rate(replica()).tpot_s


def test_prompts_that_share_no_step_take_a_colocated_replica_their_time_each() -> None:
    # 1,500 tokens: two of them are more than the largest step.
    costs = model((1500, 200))
    apart = 1 / (1 / costs.prefill_rate(replica()) + 1 / costs.decode_rate(replica()).rate)
    assert costs.colocated_rate(replica()).rate == pytest.approx(apart, rel=1e-9)


def test_replicas_have_the_same_figures_alone_and_among_others() -> None:
    rows = [replica(tp=tp, pp=pp) for tp in (2, 4, 8) for pp in (1, 2, 4)] + [replica("L40", 8), replica("L40", 1, 3)]
    together = model().figures(rows)
    assert together == [model().figures([row])[0] for row in rows]
    assert together[-1].prefill_rps == 0.0


def test_micro_batches_keep_a_pipeline_busy() -> None:
    costs = model()
    rate, batch, tpot_s = costs.decode_rate(replica(pp=2))
    one_batch = costs.decode_step_s(replica(pp=2), batch, costs.workload.mean_context_tokens)
    assert rate >= batch / (199 * one_batch)
    assert tpot_s > 0


def test_three_gpus_of_48_gb_do_not_hold_llama_70b_and_four_do() -> None:
    costs = model()
    assert not costs.fits(replica("L40", 1, 3))
    assert costs.fits(replica("L40", 4, 1))
    assert costs.prefill_rate(replica("L40", 1, 3)) == 0.0
    assert costs.decode_rate(replica("L40", 1, 3)).rate == 0.0


def test_what_fits_is_told_by_model_gpu_and_degrees() -> None:
    assert not fits(MODEL, "L40", pipeline_parallel_size=3)
    assert fits(MODEL, "L40", pipeline_parallel_size=4)
    assert fits(MODEL, "A100-SXM", tensor_parallel_size=2)
    assert not fits(MODEL, "A100-SXM", tensor_parallel_size=2, batch=64, tokens=2048)
    assert not fits(MODEL, "H200-SXM", tensor_parallel_size=3)


def test_the_pages_examples_run() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "cost-model.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    found: dict[str, object] = {}
    exec(
        "\n".join(
            f"last = {line}" if line[:1].islower() and "import" not in line else line for line in example.splitlines()
        ),
        found,
    )
    assert found["last"] == memory_bytes(MODEL, tensor_parallel_size=4, batch=16, tokens=1024)


def test_a_degree_that_does_not_divide_the_heads_does_not_fit() -> None:
    assert not model().fits(replica("H100-SXM", 3))
    assert model().kv_tokens(replica("H100-SXM", 3)) == -math.inf


def test_memory_is_weights_cache_and_overheads() -> None:
    shape = llm.find(MODEL)
    assert memory_bytes(MODEL, tensor_parallel_size=4) == pytest.approx(
        shape.weight_bytes / 4 + OVERHEAD_BYTES + STAGING_BYTES
    )
    more = memory_bytes(MODEL, tensor_parallel_size=4, tokens=1000, batch=8) - memory_bytes(
        MODEL, tensor_parallel_size=4
    )
    assert more == pytest.approx(kv_bytes(MODEL, 1000, 8) / 4)
    beyond = memory_bytes(MODEL, tensor_parallel_size=16, tokens=1000) - memory_bytes(MODEL, tensor_parallel_size=16)
    assert beyond == pytest.approx(kv_bytes(MODEL, 1000) / 8), "16 GPUs keep two copies of 8 heads"


def test_tokens_that_fit_fill_the_fullest_gpu() -> None:
    costs, stages = model(), replica("A100-SXM", 2, 2)
    tokens = int(costs.kv_tokens(stages))
    used = memory_bytes(MODEL, tensor_parallel_size=2, pipeline_parallel_size=2, tokens=tokens)
    assert used == pytest.approx(catalog_gpu("A100-SXM").memory_bytes * MEMORY_UTILIZATION, rel=1e-4)


def test_pipelines_put_the_embedding_first_and_the_head_last() -> None:
    costs, shape = model(), llm.find(MODEL)
    stages = replica(tp=1, pp=4)
    weights = [costs.weight_bytes_per_gpu(stages, number) for number in range(4)]
    assert weights[0] == weights[3] == pytest.approx(20 * shape.layer_bytes + shape.embedding_bytes)
    assert weights[1] == weights[2] == pytest.approx(20 * shape.layer_bytes)


def test_experts_are_read_once_each_and_computed_where_chosen() -> None:
    dense, mixture = (
        decode_step_seconds(
            name, "A6000", tensor_parallel_size=4, batch=1, context_tokens=1, engine="assumed-cuda-graphs"
        )
        for name in ("llama-2-13b", "mixtral-8x7b")
    )
    crowd = decode_step_seconds(
        "mixtral-8x7b", "A6000", tensor_parallel_size=4, batch=64, context_tokens=1, engine="assumed-cuda-graphs"
    )
    assert mixture < 1.3 * dense, "two experts of eight: 13 of 47 billion parameters"
    assert crowd > 2.5 * mixture, "many tokens choose all experts"


def test_quantised_weights_make_decode_faster_and_leave_room() -> None:
    plain, small = llm.find("llama-2-13b"), llm.find("llama-2-13b", weight_dtype="int4")
    steps = [
        decode_step_seconds(each, "A6000", batch=1, context_tokens=500, engine="assumed-cuda-graphs")
        for each in (plain, small)
    ]
    assert steps[1] < steps[0] / 2.5
    assert memory_bytes(small) < memory_bytes(plain) / 2


def test_a_newer_engine_is_faster_where_its_host_matters() -> None:
    one, many = (
        [
            decode_step_seconds(MODEL, "H100-SXM", tensor_parallel_size=4, batch=batch, context_tokens=500, engine=name)
            for name in ("measured-2023", "assumed-cuda-graphs")
        ]
        for batch in (1, 64)
    )
    assert one[1] < 0.8 * one[0]
    assert many[1] < 0.8 * many[0]


def test_unknown_names_are_told_with_the_likely_ones() -> None:
    with pytest.raises(ConfigError, match="did you mean `H100-SXM`"):
        prefill_seconds(MODEL, "H100SXM", prompt_tokens=1)
    with pytest.raises(ConfigError, match="no profile `new`"):
        prefill_seconds(MODEL, "L40", prompt_tokens=1, engine="new")


def test_batches_to_choose_from_are_dense_and_end_at_the_limit() -> None:
    grid = batch_grid(256)
    assert grid[0] == 1
    assert grid[-1] == 256
    assert max(grid[1:] / grid[:-1]) <= 2
    assert all(1 < ratio <= 1.04 for ratio in grid[40:] / grid[39:-1])


@settings(deadline=None)
@given(st.floats(1e-6, 1e3), st.floats(1e-6, 1e3), st.floats(1.2, 8))
def test_a_blended_maximum_is_between_the_maximum_and_the_sum(one: float, other: float, blend: float) -> None:
    found = float(blended_max(one, other, blend))
    assert max(one, other) * 0.999999 <= found <= (one + other) * 1.000001


def test_the_same_question_has_the_same_answer_from_another_model_object() -> None:
    work = find_workload("HPHD")
    costs = [CostModel(llm.find(MODEL), work, [catalog_gpu("A100-SXM")]) for _ in range(2)]
    stages = replica("A100-SXM", 4, 2)
    assert costs[0].prefill_rate(stages) == costs[1].prefill_rate(stages)
    assert costs[0].decode_rate(stages) == costs[1].decode_rate(stages)
    assert costs[0].prefill_latency_s(stages) == costs[1].prefill_latency_s(stages)


def test_what_decode_is_handed_takes_its_place_in_memory() -> None:
    # Long prompts and short answers: much KV arrives for what is in flight.
    costs = model((4000, 20))
    stages = replica("A100-SXM", 2)
    rate, batch, _ = costs.decode_rate(stages)
    room = costs.kv_tokens(stages)
    assert 0 < batch * costs.workload.mean_context_tokens < 0.9 * room
    held = rate * costs.prefill_latency_s(stages) * 4000
    assert batch * costs.workload.mean_context_tokens + held <= room
    # Colocated replicas are handed nothing.
    assert costs.colocated_rate(stages).batch == int(room / costs.workload.mean_context_tokens)
