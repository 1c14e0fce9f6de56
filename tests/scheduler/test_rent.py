"""What to rent: prices kept, targets held, and the reasons when neither can be."""

import dataclasses

import pytest

from hexgen2.cluster import Machine
from hexgen2.errors import ConfigError
from hexgen2.placement import Placement
from hexgen2.scheduler.problem import Problem
from hexgen2.scheduler.rent import UTILISATION, cheapest, offers, within_budget
from tests.scheduler.problems import problem

MACHINES = [("A100-SXM", 2, 12.5), ("L40", 2, 12.5), ("L40", 2, 12.5), ("A6000", 2, 12.5)]


def case() -> Problem:
    return problem(MACHINES)


def price(plan: Placement) -> float:
    assert plan.price_per_hour is not None
    return plan.price_per_hour


def test_a_budget_is_kept_and_more_money_does_no_less() -> None:
    plans = [within_budget(case(), budget, evaluations=200) for budget in (2.0, 4.0, 8.0)]
    assert [price(plan) <= budget for plan, budget in zip(plans, (2.0, 4.0, 8.0), strict=True)] == [True] * 3
    rates = [plan.throughput_rps for plan in plans]
    assert rates == sorted(rates)
    assert rates[0] > 0


def test_a_target_is_held_at_utilisation_and_costs_no_more_than_everything() -> None:
    everything = case().cluster.price_per_hour
    assert everything is not None
    small, large = (cheapest(case(), rate, evaluations=200) for rate in (1.0, 6.0))
    assert small.throughput_rps * UTILISATION >= 1.0 * (1 - 1e-6)
    assert large.throughput_rps * UTILISATION >= 6.0 * (1 - 1e-6)
    assert price(small) <= price(large) <= everything


def test_machines_that_are_alike_are_one_offer() -> None:
    assert sorted(len(offer.machines) for offer in offers(case().cluster)) == [1, 1, 2]


def test_what_cannot_be_had_is_told() -> None:
    with pytest.raises(ConfigError, match="no machines of cluster test for so little"):
        within_budget(case(), 0.01)
    with pytest.raises(ConfigError, match="all of cluster test has at most"):
        cheapest(case(), 1e6)


def test_a_machine_without_a_price_is_named() -> None:
    found = case()
    priceless: tuple[Machine, ...] = found.cluster.machines
    types = tuple(gpu.model_copy(update={"price_per_hour": None}) for gpu in found.cluster.gpu_types)
    cluster = found.cluster.model_copy(update={"gpu_types": types, "machines": priceless})
    with pytest.raises(ConfigError, match="machine m0 has no price"):
        within_budget(dataclasses.replace(found, cluster=cluster), 5.0)
