"""What is measured of the last minute."""

from hexgen2.gateway.measure import Ended, Measures
from hexgen2.plan import Measured


def test_the_window_holds_what_happened_in_it() -> None:
    measures = Measures(100.0, window_s=60.0)
    assert measures.measured(100.0) == Measured()
    for at_s in (101.0, 110.0, 120.0):
        measures.arrived(at_s)
    measures.ended(Ended(110.0, 100, 1, 0.5, 0.0, ("p", "d")))
    measures.ended(Ended(120.0, 300, 11, 1.5, 0.02, ("p", "d")))
    measures.failed(130.0)
    assert measures.measured(140.0) == Measured(40.0, 3, 2, 1, 200.0, 6.0, 1.0, 0.02)
    assert measures.by_route(140.0) == {("p", "d"): 2}
    assert measures.measured(175.0) == Measured(60.0, 1, 1, 1, 300.0, 11.0, 1.5, 0.02)
    assert measures.by_route(175.0) == {("p", "d"): 1}
    assert measures.measured(300.0) == Measured(60.0)
    assert not measures.by_route(300.0)
