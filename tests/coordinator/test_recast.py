"""Other roles for the replicas that are there."""

from itertools import product
from pathlib import Path

import pytest

from hexgen2.coordinator.recast import ROLES, recast
from tests.coordinator.slow_four import planned, problem, workload


def roles_of(placement: object) -> dict[str, str]:
    return {each.id: each.role for each in placement.replicas}  # type: ignore[attr-defined]


def test_long_answers_turn_prefill_replicas_into_decode_replicas_where_they_stand(tmp_path: Path) -> None:
    base = planned(tmp_path)
    before = roles_of(base)
    assert sorted(before.values()) == ["decode", "prefill", "prefill", "prefill"]
    found = recast(base, problem(tmp_path, workload(64, 96)), before, evaluations=200)
    after = roles_of(found.placement)
    assert sorted(after.values()) == ["decode", "decode", "decode", "prefill"]
    assert set(found.flipped) == {name for name in before if before[name] != after[name]}
    assert found.rps > 2.5 * found.current_rps
    assert [each.stages for each in found.placement.replicas] == [each.stages for each in base.replicas]
    # Its routes carry what it promises.
    assert sum(route.flow_rps for route in found.placement.routes) == pytest.approx(found.rps)
    for replica in found.placement.replicas:
        assert replica.flow_rps <= replica.capacity_rps * (1 + 1e-6)


def test_a_replica_whose_pool_is_too_small_for_another_role_keeps_its_own(tmp_path: Path) -> None:
    base = planned(tmp_path)
    small = [each.id for each in base.replicas if each.role == "prefill"][:2]
    replicas = tuple(
        each.model_copy(update={"engine": each.engine.model_copy(update={"staging_tokens": 128})})
        if each.id in small and each.engine
        else each
        for each in base.replicas
    )
    tight = base.model_copy(update={"replicas": replicas})
    # Prompts that it would take now are the measure, whatever is asked.
    for longest in (1000, 5000):
        work = workload(64, 96).model_copy(update={"max_prompt_tokens": longest, "max_total_tokens": longest})
        found = recast(tight, problem(tmp_path, work), roles_of(base), evaluations=200)
        after = roles_of(found.placement)
        assert "decode" not in {after[name] for name in small}
        assert found.rps > found.current_rps, "others change"
    # Short prompts fit.
    found = recast(tight, problem(tmp_path, workload(64, 96)), roles_of(base), evaluations=200)
    assert sorted(roles_of(found.placement).values()) == ["decode", "decode", "decode", "prefill"]


def test_a_replica_whose_engine_holds_a_prompt_and_no_answer_stays_with_prefill(tmp_path: Path) -> None:
    base = planned(tmp_path)
    small = [each.id for each in base.replicas if each.role == "prefill"][:2]
    work = workload(64, 96).model_copy(update={"max_prompt_tokens": 1000, "max_total_tokens": 3000})
    of = problem(tmp_path, work)
    memory = {"kv_cache_bytes": int(1400 * of.llm.kv_bytes_per_token)}
    replicas = tuple(
        each.model_copy(update={"engine": each.engine.model_copy(update=memory)})
        if each.id in small and each.engine
        else each
        for each in base.replicas
    )
    found = recast(base.model_copy(update={"replicas": replicas}), of, roles_of(base), evaluations=200)
    assert {roles_of(found.placement)[name] for name in small} == {"prefill"}
    assert found.rps > found.current_rps, "others change"


def test_what_is_served_now_counts_though_longer_requests_are_asked_for(tmp_path: Path) -> None:
    base = planned(tmp_path)
    work = workload(1000, 8).model_copy(update={"max_prompt_tokens": 4000, "max_total_tokens": 4050})
    replicas = tuple(
        each.model_copy(update={"engine": each.engine.model_copy(update={"send_tokens": 1100, "staging_tokens": 1100})})
        for each in base.replicas
        if each.engine
    )
    found = recast(
        base.model_copy(update={"replicas": replicas}), problem(tmp_path, work), roles_of(base), evaluations=200
    )
    assert found.flipped == ()
    assert found.current_rps == pytest.approx(base.throughput_rps)


def test_roles_that_are_best_stay(tmp_path: Path) -> None:
    base = planned(tmp_path)
    found = recast(base, problem(tmp_path, workload(1000, 8)), roles_of(base), evaluations=200)
    assert found.flipped == ()
    assert found.rps == pytest.approx(found.current_rps) == pytest.approx(base.throughput_rps)


def test_without_its_only_decode_replica_another_takes_over(tmp_path: Path) -> None:
    base = planned(tmp_path)
    there = {name: role for name, role in roles_of(base).items() if role == "prefill"}
    found = recast(base, problem(tmp_path, workload(1000, 8)), there, evaluations=200)
    assert found.current_rps == 0.0
    assert found.rps > 0
    assert {each.id for each in found.placement.replicas} == set(there)


def test_climbing_finds_what_looking_at_everything_finds(tmp_path: Path) -> None:
    base = planned(tmp_path)
    for work in (workload(1000, 8), workload(64, 96), workload(400, 30)):
        of = problem(tmp_path, work)
        found = recast(base, of, roles_of(base), evaluations=500, flip_cost=0.0)
        names = [each.id for each in base.replicas]
        best = max(
            recast(base, of, dict(zip(names, choice, strict=True)), evaluations=1).current_rps
            for choice in product(ROLES, repeat=len(names))
        )
        assert found.rps == pytest.approx(best, rel=0.02)


def test_evaluations_are_bounded(tmp_path: Path) -> None:
    base = planned(tmp_path)
    found = recast(base, problem(tmp_path, workload(64, 96)), roles_of(base), evaluations=5)
    assert found.evaluations <= 6
