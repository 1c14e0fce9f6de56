"""Which prompts do better without a hand-over."""

import pytest

from hexgen2 import llm
from hexgen2.cluster_file import find_cluster
from hexgen2.coordinator.assignment import assignment_of
from hexgen2.placement import Placement
from hexgen2.scheduler.problem import Problem
from hexgen2.simulator.planned import planned
from hexgen2.simulator.shortcut import SHORTEST, colocate_max_prompt_tokens
from hexgen2.workload_file import find_workload
from tests.placements import placement, planned_replica, stage


def limit(plan: Placement) -> int:
    problem = Problem(find_cluster(plan.cluster), llm.find(plan.model), find_workload(plan.workload))
    longest = problem.workload.longest_prompt_tokens
    return colocate_max_prompt_tokens(planned(plan, problem, longest))


def plan(transfer_s: float, *prefill: object) -> Placement:
    made = placement(
        planned_replica("p", "prefill", *prefill),  # type: ignore[arg-type]
        planned_replica("d", "decode", stage()),
        routes=(("p", "d", 1.0),),
    )
    (route,) = made.routes
    return made.model_copy(update={"routes": (route.model_copy(update={"transfer_s": transfer_s}),)})


def test_between_equals_with_a_fast_link_every_prompt_is_handed_over() -> None:
    assert limit(plan(0.0)) == 0


def test_the_slower_the_way_the_longer_the_prompts_that_do_without_it() -> None:
    slow = stage("A6000", 1, 0, 20, machine="a6000"), stage("A6000", 1, 20, 20, machine="a6000")
    limits = [limit(plan(transfer_s, *slow)) for transfer_s in (0.0, 2.0, 500.0)]
    assert limits == sorted(limits)
    assert limits[-1] >= SHORTEST
    assert limit(plan(1e6)) > 0


def test_a_plan_without_hand_overs_has_no_limit() -> None:
    assert limit(placement(planned_replica("c", "colocated"))) == 0


@pytest.mark.parametrize("tokens", [0, 64])
def test_the_limit_is_part_of_the_running_plan(tokens: int) -> None:
    given = plan(0.1).model_copy(update={"colocate_max_prompt_tokens": tokens})
    assert assignment_of(given).colocate_max_prompt_tokens == tokens
