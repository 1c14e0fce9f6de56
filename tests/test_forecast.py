"""What is expected, and who expected it better."""

import math

import pytest

from hexgen2.forecast import LSTM, SEASONAL, Contest, seasonal
from hexgen2.forecast_lstm import CONTEXT, ENOUGH, forecast


def test_without_a_season_it_goes_on_as_it_is() -> None:
    assert seasonal([], 3, 10) == 0.0
    assert seasonal([1.0, 5.0, 7.0], 2, 10) == 6.0


def test_with_a_season_it_goes_as_it_went_then_scaled_by_now() -> None:
    day = [1.0, 1.0, 4.0, 4.0]
    assert seasonal([*day, 1.0, 1.0], 2, 4) == 4.0
    assert seasonal([*day, 2.0, 2.0], 2, 4) == 8.0
    # A hundred times as many as then is more likely an outlier than tomorrow.
    assert seasonal([*day, 100.0, 100.0], 2, 4) == 12.0


def test_whoever_was_better_lately_is_used() -> None:
    contest = Contest(horizon_s=60.0)
    assert contest.best == ""
    contest.say(SEASONAL, 10.0, 0.0)
    contest.say(LSTM, 20.0, 0.0)
    assert contest.best == SEASONAL
    assert not contest.due(59.0)
    assert contest.due(60.0)
    contest.settle(18.0, 60.0)
    assert contest.best == LSTM
    found = contest.forecasts
    assert found[SEASONAL].error == pytest.approx(8 / 18)
    assert found[LSTM].error == pytest.approx(2 / 18)
    contest.say(SEASONAL, 18.0, 60.0)
    for start in range(60, 900, 60):
        contest.say(SEASONAL, 18.0, start)
        contest.say(LSTM, 30.0, start)
    contest.settle(18.0, 1000.0)
    assert contest.best == SEASONAL


def test_an_lstm_learns_a_wave_that_the_baseline_cannot_know() -> None:
    period = 24
    rates = [10 + 8 * math.sin(2 * math.pi * i / period) for i in range(144)]
    horizon = 6
    truth = sum(10 + 8 * math.sin(2 * math.pi * i / period) for i in range(144, 144 + horizon)) / horizon
    said = forecast(rates, horizon, season=8640, train_s=60.0)
    assert said is not None
    # The baseline has less than a season and goes on as it is.
    assert abs(said - truth) < abs(seasonal(rates, horizon, 8640) - truth)


def test_an_lstm_says_nothing_of_too_little() -> None:
    assert forecast([1.0] * (CONTEXT + ENOUGH), 2, 100, 1.0) is None
