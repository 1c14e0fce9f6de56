"""What a worker measures of its engine: sums of what one phase did by itself."""

import pytest

from hexgen2.calibration import Sample, Term
from hexgen2.worker.meter import MAX_SAMPLES, Meter


def test_prompts_count_for_the_time_that_the_engine_was_busy_with_them() -> None:
    meter = Meter()
    # One alone, a pause, then two that come together and are done one after the other.
    meter.began("prefill", 10.0)
    meter.prefilled(100, 10.1)
    meter.ended("prefill", 10.1)
    for _ in range(2):
        meter.began("prefill", 20.0)
    meter.prefilled(200, 20.2)
    meter.ended("prefill", 20.2)
    meter.prefilled(300, 20.5)
    meter.ended("prefill", 20.5)
    (sample,) = meter.take()
    assert (sample.term, sample.tokens) == (Term.PREFILL, (100, 200, 300))
    assert sample.seconds == pytest.approx(0.6)
    assert meter.take() == ()


def test_prompts_of_one_step_count_as_one() -> None:
    meter = Meter()
    for _ in range(2):
        meter.began("prefill", 0.0)
    for at_s in (0.2, 0.2001):
        meter.prefilled(100, at_s)
        meter.ended("prefill", at_s)
    (sample,) = meter.take()
    assert sample.tokens == (200,)


def test_a_prompt_that_failed_takes_its_time_with_it() -> None:
    meter = Meter()
    meter.began("prefill", 0.0)
    meter.ended("prefill", 5.0)
    meter.began("prefill", 6.0)
    meter.prefilled(100, 6.5)
    meter.ended("prefill", 6.5)
    assert meter.take() == (Sample(Term.PREFILL, 0.5, (100,)),)


def test_steps_know_how_many_shared_them() -> None:
    meter = Meter()
    meter.began("decode", 0.0)
    one = meter.stepping(1.0)
    meter.began("decode", 1.0)
    # From 2 to 4 there are two, of the three seconds of the first.
    other = meter.stepping(2.0)
    meter.stepped(one, 30, 4.0)
    meter.ended("decode", 4.0)
    meter.stepped(other, 25, 4.5)
    meter.ended("decode", 4.5)
    first, second = meter.take()
    assert [(each.seconds, each.tokens) for each in (first, second)] == [(3.0, (30,)), (2.5, (25,))]
    assert [first.batch, second.batch] == pytest.approx([5 / 3, 4.5 / 2.5])


@pytest.mark.parametrize("other", ["whole", "prefill"])
def test_what_another_phase_disturbed_is_left_out(other: str) -> None:
    meter = Meter()
    meter.began("decode", 0.0)
    answer = meter.stepping(1.0)
    meter.began(other, 2.0)  # type: ignore[arg-type]
    meter.ended(other, 3.0)  # type: ignore[arg-type]
    meter.stepped(answer, 30, 4.0)
    meter.ended("decode", 4.0)
    # The next one is not.
    meter.began("decode", 4.0)
    meter.stepped(meter.stepping(5.0), 10, 6.0)
    meter.ended("decode", 6.0)
    assert meter.take() == (Sample(Term.DECODE, 1.0, (10,), batch=1.0),)


def test_a_transfer_that_was_there_at_once_took_next_to_no_time() -> None:
    meter = Meter()
    meter.transferred(500, 0.0, "host:1")
    (sample,) = meter.take()
    assert (sample.tokens, sample.peer) == ((500,), "host:1")
    assert 0 < sample.seconds < 1e-3


def test_memory_is_bounded() -> None:
    meter = Meter()
    for _ in range(10 * MAX_SAMPLES):
        meter.transferred(1, 1.0, "host:1")
    assert len(meter.take()) == MAX_SAMPLES
