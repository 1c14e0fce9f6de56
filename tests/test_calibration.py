"""The error of a plan's times, from samples."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexgen2.calibration import ENOUGH, WINDOW, Calibration, Calibrator, Sample, Term, Times, at

TIMES = Times(prefill={100: 0.1, 1000: 1.0}, decode={1: 0.01, 9: 0.05}, transfer={"p:1": 0.001})


def prefill(seconds: float, *tokens: int) -> Sample:
    return Sample(Term.PREFILL, seconds, tokens)


def decode(seconds: float, steps: int, batch: float) -> Sample:
    return Sample(Term.DECODE, seconds, (steps,), batch)


def test_a_curve_is_straight_between_its_points_and_beyond_them() -> None:
    curve = {10: 1.0, 20: 2.0, 40: 6.0}
    assert [at(curve, x) for x in (10, 15, 20, 30, 40, 50)] == pytest.approx([1.0, 1.5, 2.0, 4.0, 6.0, 8.0])
    assert at(curve, 0) == 0.0
    assert at({7: 3.0}, 100) == 3.0


def test_samples_are_held_against_what_the_plan_foretold_of_them() -> None:
    calibrator = Calibrator({"p": TIMES})
    # Two prompts of 100 and 500 tokens: 0.6 s by the plan, 0.9 s in truth.
    for _ in range(ENOUGH):
        assert calibrator.add("p", [prefill(0.9, 100, 500)])
        # Ten steps of a batch of five: 0.03 s each.
        assert calibrator.add("p", [decode(0.33, 10, 5.0)])
        assert calibrator.add("p", [Sample(Term.TRANSFER, 0.05, (100,), peer="p:1")])
    found = calibrator.calibration()
    assert found.factor("p", Term.PREFILL) == pytest.approx(1.5)
    assert found.factor("p", Term.DECODE) == pytest.approx(1.1)
    assert found.factor("p", Term.TRANSFER) == pytest.approx(0.5)
    assert found.factor("elsewhere", Term.DECODE) == 1.0


def test_nothing_is_said_before_there_are_enough_samples() -> None:
    calibrator = Calibrator({"p": TIMES})
    calibrator.add("p", [prefill(9.0, 100)] * (ENOUGH - 1))
    assert calibrator.calibration() == Calibration()
    calibrator.add("p", [prefill(9.0, 100)])
    assert calibrator.calibration().off


def test_what_cannot_be_compared_is_not_counted() -> None:
    calibrator = Calibrator({"p": TIMES, "silent": Times()})
    assert not calibrator.add("unknown", [prefill(1.0, 100)])
    assert not calibrator.add("silent", [prefill(1.0, 100), decode(1.0, 5, 2.0)])
    assert not calibrator.add("p", [Sample(Term.TRANSFER, 1.0, (10,), peer="elsewhere"), prefill(0.0, 100)])
    assert calibrator.calibration() == Calibration()


def test_it_is_off_beyond_the_limit_either_way_and_says_which() -> None:
    slow, fast = Calibrator({"p": TIMES}, limit=1.5), Calibrator({"p": TIMES}, limit=1.5)
    slow.add("p", [prefill(0.16, 100)] * ENOUGH)
    fast.add("p", [prefill(0.06, 100)] * ENOUGH)
    assert slow.calibration().why == f"prefill of p takes 1.60 times as long as planned (median of {ENOUGH})"
    assert fast.calibration().off


def test_a_transfer_that_hides_behind_prefill_is_not_off() -> None:
    calibrator = Calibrator({"d": TIMES})
    calibrator.add("d", [Sample(Term.TRANSFER, 0.001, (100,), peer="p:1")] * ENOUGH)
    assert not calibrator.calibration().off


def test_a_term_at_the_limit_does_not_flicker() -> None:
    calibrator = Calibrator({"p": TIMES}, limit=1.5, window=ENOUGH)
    seen = []
    for ratio in (1.51, 1.49, 1.51, 1.49, 1.3):
        calibrator.add("p", [prefill(0.1 * ratio, 100)] * ENOUGH)
        seen.append(calibrator.calibration().off)
    assert seen == [True, True, True, True, False]


@given(st.lists(st.floats(0.01, 100), min_size=ENOUGH, max_size=3 * WINDOW), st.integers(0, ENOUGH // 2 - 1))
def test_a_few_odd_samples_move_nothing(ratios: list[float], odd: int) -> None:
    calibrator = Calibrator({"p": TIMES})
    calibrator.add("p", [prefill(0.1, 100)] * (WINDOW - odd))
    calibrator.add("p", [prefill(0.1 * ratio, 100) for ratio in ratios[:odd]])
    assert calibrator.calibration().factor("p", Term.PREFILL) == pytest.approx(1.0)


@given(st.lists(st.floats(0.01, 100), min_size=WINDOW, max_size=3 * WINDOW))
def test_memory_is_bounded_by_the_window_whose_newest_samples_count(ratios: list[float]) -> None:
    calibrator, fresh = Calibrator({"p": TIMES}), Calibrator({"p": TIMES})
    calibrator.add("p", [prefill(0.1 * ratio, 100) for ratio in ratios])
    fresh.add("p", [prefill(0.1 * ratio, 100) for ratio in ratios[-WINDOW:]])
    assert calibrator.calibration().ratios == fresh.calibration().ratios
