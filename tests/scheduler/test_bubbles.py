"""Bubbles that prompts leave in pipelines: the Poisson sums, and limits that must hold."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import poisson

from hexgen2.scheduler.bubbles import prompts_s, round_s, trains

means = st.floats(1e-6, 60)


@given(means, st.just(1.0) | st.floats(1.05, 40))
def test_shares_and_fullness_are_those_of_a_poisson_number_of_prompts(mean: float, most: float) -> None:
    share, full = trains(np.array([mean]), most)
    assert share[0] == pytest.approx(1 - np.exp(-mean), rel=1e-9)
    counts = np.arange(1, 400)
    longest = np.minimum(counts, most) @ poisson.pmf(counts, mean) / poisson.sf(0, mean)
    assert full[0] == pytest.approx((longest - 1) / (most - 1) if most > 1 else 0.0, abs=1e-6)


def test_very_many_prompts_fill_their_steps() -> None:
    share, full = trains(np.array([1e12]), 8.0)
    assert (share[0], full[0]) == (1.0, 1.0)


@given(st.floats(1e-3, 1), st.floats(0, 10), st.floats(0, 10), st.floats(0, 1), st.integers(2, 8))
def test_prompts_never_make_a_round_shorter(
    slowest: float, prompts: float, behind: float, share: float, stages: int
) -> None:
    apart = np.array([stages * slowest])
    found = round_s(apart, np.array([slowest]), np.array([prompts]), np.array([behind]), np.array([share]), stages)
    assert found[0] >= apart[0] + prompts - 1e-9
    assert found[0] <= apart[0] + prompts + behind + 1e-9


@given(st.floats(1e-3, 60), st.just(1.0) | st.floats(1.05, 40), st.floats(0.1, 1))
def test_prompts_that_come_in_together_share_steps(mean: float, most: float, gain: float) -> None:
    share, full = trains(np.array([mean]), most)
    alone, shared = np.array([1.0]), np.array([max(gain, 1 / most)])
    found = prompts_s(np.array([mean]), share, full, np.array([most]), alone, shared)[0]
    # Few are alone in their steps, many fill them, but for the last step.
    assert mean * shared[0] - 1e-9 <= found <= mean + 1e-9
    assert found <= mean * shared[0] + 1
