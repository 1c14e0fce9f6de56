"""Engines whose steps hold one phase."""

import pytest

from hexgen2.simulator.blueprint import Arrival
from hexgen2.simulator.engine import Limits
from hexgen2.simulator.fleet import Settings, Simulation
from tests.simulator.fleets import fleet
from tests.simulator.test_engine import run


def test_prefill_goes_first_and_decode_waits_for_it() -> None:
    mixed, _ = run([(0.0, 10, 40), (0.01, 600, 2)], Limits(max_num_batched_tokens=600))
    apart, _ = run([(0.0, 10, 40), (0.01, 600, 2)], Limits(max_num_batched_tokens=600, mixes=False))
    # The prompt's step takes 62 ms; with mixed steps the other request gets a token out of it.
    assert apart.first_s["1"] <= mixed.first_s["1"]
    assert apart.done_s["0"] - mixed.done_s["0"] == pytest.approx(0.0021, rel=0.2)


def test_a_first_and_only_token_needs_no_hand_over() -> None:
    simulation = Simulation(fleet({"p": "prefill", "d": "decode"}), [Arrival(0.0, 500, 1)], Settings())
    assert simulation.run().num_finished == 1
    assert simulation.links.carried_bytes["wire"] == 0
