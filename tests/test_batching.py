"""Limits that follow what requests see: bounded, quick to fall, slow to rise, still in between."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexgen2.batching import HOLD, Batching, Limits, Pace, Seen, Targets

MOST, LEAST = Limits(64, 1024), Limits(2, 32)
TARGETS = Targets(ttft_s=2.0, tpot_s=0.1)


def batching(seqs: int = 32, tokens: int = 256) -> Batching:
    return Batching(TARGETS, Limits(seqs, tokens), MOST, LEAST)


def test_tokens_that_come_too_slowly_cut_what_runs() -> None:
    assert batching().next(Seen(tpot_s=0.2, num_running=20)) == Limits(17, 256)


def test_prompts_in_the_same_steps_are_cut_into_smaller_parts_first() -> None:
    made = batching(tokens=256)
    assert made.next(Seen(tpot_s=0.2, num_running=20, prefilling=True)) == Limits(32, 179)
    at_the_least = batching(tokens=32)
    assert at_the_least.next(Seen(tpot_s=0.2, num_running=20, prefilling=True)) == Limits(17, 32)


def test_a_cut_has_time_to_show() -> None:
    made, slow = batching(), Seen(tpot_s=0.2, num_running=32)
    seen = [made.next(slow).max_num_seqs for _ in range(HOLD + 1)]
    assert seen == [27] * HOLD + [22]


def test_room_to_spare_is_given_to_those_who_wait_and_only_then() -> None:
    assert batching().next(Seen(tpot_s=0.05, num_running=32, num_waiting=3)) == Limits(33, 294)
    assert batching().next(Seen(tpot_s=0.05, num_running=10)) == Limits(32, 256)
    hurried = batching().next(Seen(tpot_s=0.05, ttft_s=5.0, num_running=32, num_waiting=3))
    assert hurried == Limits(34, 332)


@pytest.mark.parametrize("tpot_s", [0.086, 0.1])
def test_nothing_changes_near_the_limit(tpot_s: float) -> None:
    assert batching().next(Seen(tpot_s=tpot_s, num_running=32, num_waiting=9)) == Limits(32, 256)


def test_without_a_limit_nothing_is_ever_cut() -> None:
    made = Batching(Targets(), Limits(8, 64), MOST, LEAST)
    assert made.next(Seen(tpot_s=99.0, num_running=8)) == Limits(8, 64)


SEEN = st.builds(Seen, st.floats(0, 1), st.floats(0, 9), st.integers(0, 99), st.integers(0, 9), st.booleans())


@given(st.lists(SEEN, max_size=60))
def test_limits_stay_within_their_bounds(intervals: list[Seen]) -> None:
    made = batching()
    for seen in intervals:
        found = made.next(seen)
        assert LEAST.max_num_seqs <= found.max_num_seqs <= MOST.max_num_seqs
        assert LEAST.max_num_batched_tokens <= found.max_num_batched_tokens <= MOST.max_num_batched_tokens


@given(st.integers(5, 60), st.integers(2, 64))
def test_it_settles_where_the_limit_is_met(fits: int, start: int) -> None:
    """Steps take as long as there are requests in them, so that ``fits`` of them just meet the limit."""
    made = Batching(TARGETS, Limits(start, 256), MOST, LEAST)
    found = [0]
    for _ in range(300):
        running = made.limits.max_num_seqs
        found.append(made.next(Seen(0.1 * running / fits, 0.1, running, num_waiting=5)).max_num_seqs)
    assert all(0.7 * fits - 2 <= each <= fits for each in found[-50:])


def test_a_pace_is_told_once_by_its_mean_gap() -> None:
    pace = Pace()
    pace.gap(0.03, 1)
    pace.gap(0.06, 2)
    pace.gap(0.06, 1)
    pace.first(1.5)
    seen = pace.take(7, 2)
    assert seen.tpot_s == pytest.approx(0.15 / 4)
    assert (seen.ttft_s, seen.num_running, seen.num_waiting, seen.prefilling) == (1.5, 7, 2, True)
    assert pace.take(7, 2) == Seen(num_running=7, num_waiting=2)
