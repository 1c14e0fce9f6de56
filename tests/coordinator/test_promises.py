"""The plan in force against what workers measure."""

import pytest

from hexgen2.calibration import ENOUGH, Calibration, Sample, Term
from hexgen2.coordinator.promises import Promises, times_of
from hexgen2.placement import Placement, TimesPlan, to_json
from tests.placements import mixed

TIMES = TimesPlan(prefill={100: 0.1, 1000: 1.0}, busiest=0.5, decode={1: 0.01, 8: 0.02})


def plan() -> Placement:
    made = mixed()
    replicas = tuple(each.model_copy(update={"times": TIMES}) for each in made.replicas)
    return made.model_copy(update={"replicas": replicas, "mean_prompt_tokens": 100.0})


def test_a_plan_foretells_prompts_steps_and_transfers() -> None:
    times = times_of(plan())
    assert times["p"].prefill == {100: 0.05, 1000: 0.5}
    assert times["d"].decode == {1: 0.01, 8: 0.02}
    assert times["d"].transfer == {"p": pytest.approx(0.0001)}
    assert times_of(mixed())["p"].predicted_s(Sample(Term.PREFILL, 1.0, (5,))) == 0


def test_it_says_once_when_it_becomes_off_and_when_it_is_so_no_more() -> None:
    promises = Promises()
    promises.follow(to_json(plan()))

    def report(seconds: float) -> bool:
        return promises.add("d", [Sample(Term.TRANSFER, seconds, (100,), peer="host:1")] * ENOUGH, {"host:1": "p"})

    assert report(0.05)
    assert promises.calibration.why.startswith("transfer of d takes 5.00 times as long as planned")
    assert not report(0.05)
    assert [report(0.01) for _ in range(4)].count(True) == 1
    assert not promises.calibration.off


def test_another_plan_begins_without_errors_and_none_has_none() -> None:
    promises = Promises()
    promises.follow(to_json(plan()))
    promises.add("d", [Sample(Term.DECODE, 9.0, (1,), 1.0)] * ENOUGH, {})
    assert promises.calibration.off
    promises.follow(to_json(plan()))
    assert promises.calibration.off
    promises.follow(to_json(mixed()))
    assert promises.calibration == Calibration()
    promises.follow("")
    assert not promises.add("d", [Sample(Term.DECODE, 9.0, (1,), 1.0)] * ENOUGH, {})
