"""Counting what clients ask."""

from hypothesis import given
from hypothesis import strategies as st

from hexgen2.observed import NUM_CLASSES, Counter, Series, Slo, Tally, added, class_of, mean_lengths, since


def counted(requests: list[tuple[int, int]], slo: Slo | None = None) -> Counter:
    counter = Counter()
    counter.slo = slo or Slo()
    for prompt, output in requests:
        counter.arrived()
        counter.ended(prompt, output, ttft_s=prompt / 1000, tpot_s=0.01)
    return counter


@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_every_request_has_a_class(prompt: int, output: int) -> None:
    assert 0 <= class_of(prompt, output) < NUM_CLASSES


@given(st.lists(st.tuples(st.integers(1, 9000), st.integers(1, 900))), st.data())
def test_what_comes_between_two_counts_adds_up(requests: list[tuple[int, int]], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(requests)))
    first, whole = counted(requests[:cut]).tally, counted(requests).tally
    assert added([first, since(whole, first)]) == whole


def test_a_gateway_that_begins_anew_counts_from_nothing() -> None:
    old, new = counted([(10, 10)] * 5).tally, counted([(10, 10)] * 2).tally
    assert since(new, old) == new


def test_good_is_what_keeps_the_limits() -> None:
    counter = counted([(100, 5), (900, 5)], Slo(ttft_s=0.5, tpot_s=0.1))
    counter.failed()
    assert (counter.tally.num_ended, counter.tally.num_good, counter.tally.num_failed) == (2, 1, 1)
    assert not Slo(tpot_s=0.1).met(9.0, 0.2)
    assert Slo(tpot_s=0.1).met(9.0, 0.1)


def test_a_series_has_the_arrivals_of_all_gateways_by_the_time_that_they_came() -> None:
    series = Series(bucket_s=10.0)
    a, b = Counter(), Counter()
    for counter, name in ((a, "a"), (b, "b")):
        series.report(name, counter.tally, 100.0)
    for _ in range(30):
        a.arrived()
    a.ended(100, 10, 0.1, 0.1)
    series.report("a", a.tally, 105.0)
    b.arrived()
    series.report("b", b.tally, 109.0)
    series.report("b", b.tally, 109.5)
    assert series.advance(125.0) == 2
    assert series.rates == [3.1, 0.0]
    window = series.window(20.0, 125.0)
    assert (window.seconds, window.tally.num_arrived) == (25.0, 31)
    assert window.lengths == ((100.0, 10.0, 1),)
    assert window.attainment == 1.0
    # Of a gateway that was there before this series, the first count is no news.
    series.report("c", Tally(num_arrived=1000), 126.0)
    assert series.window(20.0, 127.0).tally.num_arrived == 31


def test_a_series_is_bounded() -> None:
    series = Series(bucket_s=1.0, max_buckets=5)
    series.advance(0.0)
    series.advance(1e6)
    assert len(series.buckets) == 5


def test_mean_lengths_are_weighted() -> None:
    assert mean_lengths([(100.0, 10.0, 1), (400.0, 40.0, 2)]) == (300.0, 30.0)
    assert mean_lengths([]) == (0.0, 0.0)
