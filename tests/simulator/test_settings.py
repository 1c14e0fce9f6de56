"""What follows from a plan for its engines: memory that fits, pools that hold a prompt, times of the cost model."""

import pytest

from hexgen2 import llm as llms
from hexgen2.calibration import at
from hexgen2.cluster_file import find_cluster
from hexgen2.placement import Placement, from_json, to_json
from hexgen2.scheduler.cost_model import OVERHEAD_BYTES
from hexgen2.scheduler.problem import Problem
from hexgen2.scheduler.schedule import solve
from hexgen2.simulator.planned import Planned
from hexgen2.simulator.settings import LANDING_BYTES, completed
from hexgen2.workload_file import find_workload
from tests.placements import mixed, placement, planned_replica, stage


def problem(model: str = "llama-2-13b") -> Problem:
    return Problem(find_cluster("three-machines"), llms.find(model), find_workload("hphd"))


def planned(plan: Placement, model: str = "llama-2-13b") -> Planned:
    made = problem(model)
    return Planned(plan, made, made.workload.longest_prompt_tokens)


@pytest.mark.parametrize("size", [1, 2])
def test_weights_kv_and_pools_fill_the_memory_and_no_more(size: int) -> None:
    blueprint = planned(
        placement(
            planned_replica("p", "prefill", stage(size=size)),
            planned_replica("d", "decode", stage(size=size)),
            routes=(("p", "d", 1.0),),
        )
    )
    cost, llm = blueprint.problem.cost, blueprint.problem.llm
    for replica in completed(blueprint).replicas:
        assert replica.engine is not None
        engine, stages = replica.engine, blueprint.stages(replica.id)
        used = engine.kv_cache_bytes + cost.weight_bytes_per_gpu(stages, 0) + LANDING_BYTES + OVERHEAD_BYTES
        used += (engine.send_tokens + engine.staging_tokens) * llm.kv_bytes_per_token / size
        memory = cost.gpus["A100-SXM"].memory_bytes
        assert 0.88 * memory < used <= 0.9 * memory


def test_either_pool_holds_the_longest_prompt_and_the_roles_own_is_the_larger() -> None:
    blueprint = planned(mixed())
    engines = {replica.id: replica.engine for replica in completed(blueprint).replicas}
    for engine in engines.values():
        assert engine is not None
        assert min(engine.send_tokens, engine.staging_tokens) >= blueprint.longest_prompt
    assert engines["d"] is not None
    assert engines["d"].staging_tokens >= engines["d"].send_tokens


def test_times_are_the_cost_models() -> None:
    blueprint = planned(mixed())
    cost, workload = blueprint.problem.cost, blueprint.problem.workload
    times = completed(blueprint).replicas[1].times
    assert times is not None
    stages = blueprint.stages("d")
    assert at(times.decode, 8) == pytest.approx(cost.decode_step_s(stages, 8, workload.mean_context_tokens), rel=0.01)
    assert at(times.prefill, 1000) == pytest.approx(cost.prefill_s(stages, 1000), rel=0.1)


def test_it_comes_back_from_its_file() -> None:
    plan = completed(planned(mixed()))
    assert from_json(to_json(plan)) == plan


@pytest.mark.parametrize(("model", "longest"), [("llama-3.1-70b", 14_000), ("llama-3.1-8b", 100_000)])
def test_every_planned_replica_holds_the_longest_request(model: str, longest: int) -> None:
    """In its engine, and the prompt in the pool of its role as well: on tight GPUs the other pool is what is small."""
    work = find_workload("hphd").model_copy(update={"max_prompt_tokens": longest, "max_total_tokens": longest + 500})
    problem = Problem(find_cluster("paper-setting-1"), llms.find(model), work)
    blueprint = Planned(solve(problem, evaluations=100), problem, longest)
    plan = completed(blueprint)
    assert {replica.role for replica in plan.replicas} >= {"prefill", "decode"}
    for replica in plan.replicas:
        assert replica.engine is not None
        per_token = max(
            stage.num_layers * problem.llm.kv_bytes_per_token_layer / stage.tensor_parallel_size
            for stage in replica.stages
        )
        in_engine = replica.engine.kv_cache_bytes / per_token
        # And a block that is never used, and one that is rounded down.
        assert in_engine >= (longest if replica.role == "prefill" else longest + 500) + 256
        if replica.batch is not None:
            assert in_engine >= 0.8 * replica.batch * work.mean_context_tokens
        own = {"prefill": replica.engine.send_tokens, "decode": replica.engine.staging_tokens}
        assert own.get(replica.role, longest) >= longest
