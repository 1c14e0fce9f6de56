"""Strategies against each other and against exhaustive search, with the same costs and links."""

import pytest

from hexgen2.errors import ConfigError
from hexgen2.scheduler.exhaustive import exhaustive, states
from hexgen2.scheduler.located import located_bound
from hexgen2.scheduler.problem import SPLIT
from hexgen2.scheduler.quality import compare, instances, summary
from hexgen2.scheduler.schedule import solve
from hexgen2.scheduler.search import STRATEGIES
from tests.scheduler.problems import problem

MIXED_BAG = [("A100-SXM", 2, 1.25), ("L40", 2, 1.25), ("A6000", 2, 1.25)]


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "distserve"])
def test_every_strategy_plans_and_stays_under_its_bound(name: str) -> None:
    found = solve(problem(MIXED_BAG), name, evaluations=200)
    assert found.throughput_rps > 0
    assert found.strategy == name
    assert found.bound_rps is None or found.throughput_rps <= found.bound_rps


def test_distserve_wants_one_kind_of_gpu() -> None:
    with pytest.raises(ConfigError, match="distserve: plans for one kind of GPU"):
        solve(problem(MIXED_BAG), "distserve")
    assert solve(problem([("A100-SXM", 4, 12.5)]), "distserve").kind == "disaggregated"


def test_plans_of_ten_small_clusters_are_near_the_best_there_is() -> None:
    rows = [compare(*each) for each in instances(10, most_states=3000)]
    told = summary(rows)
    assert told["median_gap"] <= 0.03
    assert told["worst_gap"] <= 0.10
    assert told["bound_below_optimum"] == 0
    assert sum(row.slow_nics for row in rows) >= 3


def test_exhaustive_search_counts_each_placement_once() -> None:
    # Two GPUs that each hold the model: alone in either role, both in one group, or one group each.
    case = problem([("H100-SXM", 2, 12.5)])
    found = list(states(case.judge, case.limits, SPLIT, 1000))
    # One GPU: P, D; both: P, D; two groups: PP, PD, DD.
    assert len(found) == 7
    # On two machines that are alike nothing more can be told apart.
    apart = problem([("H100-SXM", 1, 12.5), ("H100-SXM", 1, 12.5)])
    assert len(list(states(apart.judge, apart.limits, SPLIT, 1000))) == 7
    best, flow = exhaustive(case.judge, case.limits, SPLIT)
    assert {group.role for group in best.groups} == {"prefill", "decode"}
    assert flow == pytest.approx(case.judge.ceiling(best))


def test_exhaustive_search_refuses_large_clusters() -> None:
    case = problem([("H100-SXM", 8, 12.5), ("A100-SXM", 8, 12.5)])
    with pytest.raises(ConfigError, match="small clusters"):
        exhaustive(case.judge, case.limits, SPLIT, 500)


@pytest.mark.parametrize("workload", ["hpld", "lphd"])
@pytest.mark.parametrize(
    "machines",
    [
        [("A100-SXM", 2, 0.25), ("L40", 2, 0.25)],
        [("A100-SXM", 1, 1.25), ("L40", 2, 0.25), ("A6000", 1, 0.25)],
        [("L40", 2, 0.25), ("L40", 1, 0.25), ("H100-SXM", 1, 1.25)],
    ],
)
def test_the_program_on_machines_is_a_bound_and_knows_slow_cards(
    machines: list[tuple[str, int, float]], workload: str
) -> None:
    case = problem(machines, workload=workload)
    _, optimum = exhaustive(case.judge, case.limits, SPLIT)
    ceiling = case.bound(SPLIT).rps
    bound, plan = located_bound(case.judge, case.limits, SPLIT, ceiling, 0.0, 500)
    assert optimum <= bound < 0.9 * ceiling
    assert plan is not None
    assert case.judge.verified(plan) <= optimum * (1 + 1e-6)
    # Columns that are in no better plan than a known one may be left out.
    again, _ = located_bound(case.judge, case.limits, SPLIT, ceiling, optimum, 500)
    assert optimum <= again <= bound * (1 + 1e-3)


@pytest.mark.parametrize(
    ("machines", "workload", "known_rps", "loose"),
    [
        # The first answer's layers do not match: it carries a fifth less than the program says.
        ([("L40", 1, 0.6), ("A100-SXM", 4, 1.25), ("A6000", 2, 1.25)], "hphd", 3.04, 1e-3),
        # Without matching them the program says 76 % too much.
        ([("L40", 3, 0.6), ("L40", 2, 0.25), ("A100-SXM", 1, 1.25), ("A6000", 1, 0.25)], "lphd", 4.38, 0.03),
    ],
)
def test_a_plan_that_carries_less_than_the_program_says_is_refuted_and_another_asked_for(
    machines: list[tuple[str, int, float]], workload: str, known_rps: float, loose: float
) -> None:
    case = problem(machines, "opt-30b", workload)
    bound, plan = located_bound(case.judge, case.limits, SPLIT, case.bound(SPLIT).rps, known_rps, 500)
    assert plan is not None
    found = case.judge.verified(plan)
    assert known_rps < found <= bound <= found * (1 + loose)
