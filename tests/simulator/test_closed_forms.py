"""The simulator agrees with queueing theory, with the cost model's own rates and with the arithmetic of links."""

import pytest

from hexgen2.simulator.closed_forms import checks


def test_every_closed_form_is_met_within_one_percent() -> None:
    found = list(checks(40_000))
    assert len(found) > 8
    for check in found:
        assert check.measured == pytest.approx(check.predicted, rel=0.01), check.what
