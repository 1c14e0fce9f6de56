"""Whatever happens, every request ends once and nothing is left over."""

from hypothesis import given, settings
from hypothesis import strategies as st

from hexgen2.simulator.blueprint import Arrival
from hexgen2.simulator.fleet import Settings, Simulation
from hexgen2.simulator.happenings import Happening
from tests.simulator.fleets import fleet

ROLES = st.sampled_from(
    [
        {"a": "colocated"},
        {"p": "prefill", "d": "decode"},
        {"p": "prefill", "q": "prefill", "d": "decode", "e": "decode"},
        {"p": "prefill", "d": "decode", "e": "decode", "c": "colocated"},
    ]
)
ARRIVALS = st.lists(
    st.tuples(st.floats(0, 2), st.integers(1, 1500), st.sampled_from([1, 2, 3, 40, 300])), min_size=1, max_size=40
).map(lambda rows: [Arrival(*row) for row in sorted(rows)])


@st.composite
def happenings(draw: st.DrawFn, names: list[str]) -> list[Happening]:
    found = []
    for at_s in sorted(draw(st.lists(st.floats(0, 4), max_size=6))):
        what = draw(st.sampled_from(["lost", "back", "flip"]))
        role = draw(st.sampled_from(["prefill", "decode", "colocated"])) if what == "flip" else None
        name = draw(st.sampled_from(names))
        found.append(Happening(at_s=at_s, what=what, replica=name, role=role, takes_s=0.5 if role else 0.0))
    return found


@settings(max_examples=100, deadline=None)
@given(st.data(), ROLES, ARRIVALS, st.integers(1, 3), st.sampled_from([1800, 2500, 40_000]), st.integers(0, 3))
def test_every_request_ends_once_and_nothing_is_left(
    data: st.DataObject, roles: dict[str, str], arrivals: list[Arrival], num_lanes: int, kv_tokens: int, queued: int
) -> None:
    events = data.draw(happenings(list(roles)))
    blueprint = fleet(roles, kv_tokens=kv_tokens, num_lanes=num_lanes)
    simulation = Simulation(blueprint, arrivals, Settings(max_queued=queued or 1000), events)
    before = 0.0
    while simulation.clock.step():
        assert simulation.clock.now >= before
        before = simulation.clock.now
        for replica in simulation.replicas.values():
            assert 0 <= replica.engine.kv_used <= kv_tokens
    outcome = simulation.outcome
    assert outcome.num_arrived == len(arrivals)
    assert outcome.num_finished + outcome.failed_total == len(arrivals)
    assert not simulation.in_flight
    assert simulation.links.num_open == 0
    for replica in simulation.replicas.values():
        assert not replica.involved
        assert replica.engine.kv_used == replica.engine.num_running == replica.engine.num_waiting == 0
        assert replica.send.num_used == replica.send.num_waiting == 0
        assert replica.staging.num_used == replica.staging.num_waiting == 0


@settings(max_examples=30, deadline=None)
@given(ROLES, ARRIVALS)
def test_without_losses_every_request_that_fits_is_served(roles: dict[str, str], arrivals: list[Arrival]) -> None:
    outcome = Simulation(fleet(roles, kv_tokens=2500), arrivals, Settings()).run()
    assert outcome.failed_total == 0
    assert outcome.output_tokens == sum(arrival.output_tokens for arrival in arrivals)
