"""Membership and the plan that follows from it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from hexgen2.errors import InvalidRequest, ReplicaConflict
from hexgen2.fleet_state import Change, FleetState
from hexgen2.plan import Load, Replica, ReplicaState, Role, Route

READY, DRAINING, STARTING, LOST = (
    ReplicaState.READY,
    ReplicaState.DRAINING,
    ReplicaState.STARTING,
    ReplicaState.LOST,
)
IDLE = Load()


def replica(replica_id: str, **changes: Any) -> Replica:
    role = Role.PREFILL if replica_id.startswith("p") else Role.DECODE
    port = 1000 + sum(map(ord, replica_id))
    return replace(
        Replica(replica_id, role, f"127.0.0.1:{port}", "m", b"m" * 32, "first", 1024, "ucx (tcp)"), **changes
    )


def fleet(*ids: str) -> FleetState:
    state = FleetState(100, lost_after_s=5)
    for each in ids:
        state.report(replica(each), READY, IDLE, 0.0)
    state.replan()
    return state


def states(state: FleetState) -> Mapping[str, ReplicaState]:
    return {status.replica_id: status.state for status in state.statuses}


def pairs(state: FleetState) -> set[tuple[str, str]]:
    return {(route.prefill_replica_id, route.decode_replica_id) for route in state.plan.routes}


def test_every_prefill_is_joined_with_every_decode_replica() -> None:
    state = fleet("p1", "p2", "d1", "d2")
    assert state.plan.epoch == 101
    assert state.plan.routes == tuple(Route(p, d, 1.0) for p in ("p1", "p2") for d in ("d1", "d2"))


def test_every_route_has_the_codec_of_the_fleet() -> None:
    state = FleetState(100, lost_after_s=5, codec="int8")
    for each in ("p1", "d1", "d2"):
        state.report(replica(each), READY, IDLE, 0.0)
    assert {route.codec for route in state.replan().routes} == {"int8"}


def test_replicas_of_another_model_or_transport_are_not_joined() -> None:
    state = fleet("p1", "d1")
    state.report(replica("d2", model_sha256=b"x" * 32), READY, IDLE, 0.0)
    state.report(replica("d3", transport="tcp"), READY, IDLE, 0.0)
    state.report(replica("d4", transport="ucx (shm)"), READY, IDLE, 0.0)
    state.replan("00-aa-bb-01")
    assert pairs(state) == {("p1", "d1"), ("p1", "d4")}
    assert state.plan.traceparent == "00-aa-bb-01"


def test_only_membership_changes_the_plan() -> None:
    state = fleet("p1", "d1")
    d1 = replica("d1")
    assert state.report(d1, READY, IDLE, 1.0) is Change.NOTHING
    assert state.report(d1, READY, Load(num_requests_running=1), 1.0) is Change.LOAD
    assert state.report(d1, DRAINING, IDLE, 1.0) is Change.STATE
    assert state.report(replica("d2"), STARTING, IDLE, 1.0) is Change.MEMBERS
    assert state.report(replace(d1, incarnation="second"), STARTING, IDLE, 1.0) is Change.MEMBERS
    assert state.report(replace(d1, incarnation="second", role=Role.PREFILL), READY, IDLE, 1.0) is Change.MEMBERS


def test_a_silent_replica_is_lost_then_forgotten_and_its_return_is_a_join() -> None:
    state = fleet("p1", "d1")
    state.report(replica("p1"), READY, IDLE, 3.0)
    assert state.next_deadline() == 5.0
    assert state.expire(4.9) is Change.NOTHING
    assert state.expire(5.0) is Change.MEMBERS
    state.replan()
    assert states(state) == {"p1": READY, "d1": LOST}
    assert pairs(state) == set()
    assert [each.replica_id for each in state.plan.replicas] == ["d1", "p1"]
    assert state.next_deadline() == 8.0
    assert state.report(replica("d1"), READY, IDLE, 6.0) is Change.MEMBERS
    state.report(replica("p1"), READY, IDLE, 6.0)
    state.replan()
    assert pairs(state) == {("p1", "d1")}
    state.expire(11.0)
    assert state.next_deadline() == 66.0
    assert state.expire(66.0) is Change.MEMBERS
    assert states(state) == {}
    assert state.next_deadline() is None


def test_time_in_which_the_coordinator_did_not_listen_is_not_silence() -> None:
    state = fleet("p1")
    state.forgive(30.0)
    assert state.expire(34.9) is Change.NOTHING
    assert state.expire(35.0) is Change.MEMBERS


def test_a_draining_replica_stays_listed_and_gets_no_new_routes() -> None:
    state = fleet("p1", "d1")
    state.report(replica("d1"), DRAINING, IDLE, 0.0)
    state.report(replica("p2"), READY, IDLE, 0.0)
    state.report(replica("d2"), READY, IDLE, 0.0)
    state.replan()
    assert pairs(state) == {("p1", "d1"), ("p1", "d2"), ("p2", "d2")}
    assert states(state)["d1"] is DRAINING


def test_an_id_is_refused_from_another_address_until_its_owner_is_lost() -> None:
    state = fleet("d1")
    elsewhere = replica("d1", address="10.0.0.2:7", incarnation="second")
    with pytest.raises(ReplicaConflict, match=r"'d1' is alive at 127\.0\.0\.1:\d+, and now also .* 10\.0\.0\.2:7"):
        state.report(elsewhere, READY, IDLE, 1.0)
    assert state.plan.replicas == (replica("d1"),)
    state.expire(5.0)
    assert state.report(elsewhere, READY, IDLE, 5.0) is Change.MEMBERS


def test_an_address_is_refused_to_another_id_until_its_owner_is_lost() -> None:
    state = fleet("d1")
    other = replica("d2", address=replica("d1").address)
    with pytest.raises(ReplicaConflict, match="is the address of replica 'd1', which is alive, and now also of 'd2'"):
        state.report(other, READY, IDLE, 1.0)
    state.expire(5.0)
    assert state.report(other, READY, IDLE, 5.0) is Change.MEMBERS


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"replica_id": ""}, "replica.replica_id"),
        ({"replica_id": "a" * 65}, "replica.replica_id"),
        ({"replica_id": "a\nb"}, "replica.replica_id"),
        ({"replica_id": "a/b"}, "replica.replica_id"),
        ({"address": ""}, "replica.address"),
        ({"address": "10.0.0.1"}, "replica.address"),
        ({"address": "10.0.0.1:0"}, "replica.address"),
        ({"address": "10.0.0.1:99999"}, "replica.address"),
        ({"address": "0.0.0.0:50060"}, "replica.address"),
        ({"address": "[::]:50060"}, "replica.address"),
        ({"incarnation": ""}, "replica.incarnation"),
        ({"model_sha256": b""}, "replica.model_sha256"),
        ({"max_model_len": 0}, "replica.max_model_len"),
    ],
)
def test_a_replica_that_nobody_could_use_is_refused(changes: dict[str, Any], field: str) -> None:
    state = fleet()
    with pytest.raises(InvalidRequest) as caught:
        state.report(replace(replica("p1"), **changes), READY, IDLE, 0.0)
    assert caught.value.field == field
    assert state.statuses == ()


def test_a_worker_that_starts_is_listed_and_joined_once_it_knows_its_model() -> None:
    state = fleet("p1")
    starting = replica("d1", model_sha256=b"", max_model_len=0, transport="")
    assert state.report(starting, STARTING, IDLE, 0.0) is Change.MEMBERS
    state.replan()
    assert (states(state)["d1"], pairs(state)) == (STARTING, set())
    assert state.report(replica("d1"), READY, IDLE, 1.0) is Change.MEMBERS
    state.replan()
    assert pairs(state) == {("p1", "d1")}


def test_a_replica_does_not_report_itself_lost() -> None:
    with pytest.raises(InvalidRequest, match=r"^state: "):
        fleet().report(replica("p1"), LOST, IDLE, 0.0)


ids = st.sampled_from(["p1", "p2", "d1", "d2"])


class Life(RuleBasedStateMachine):
    """Workers come, go and come back in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.state = FleetState(0, lost_after_s=5)
        self.now_s = 0.0
        self.alive_since: dict[str, float] = {}

    def follow(self, change: Change) -> None:
        before = self.state.plan
        if change is Change.MEMBERS:
            assert self.state.replan().epoch == before.epoch + 1

    @rule(key=ids, state=st.sampled_from([STARTING, READY, DRAINING]), incarnation=st.sampled_from("ab"))
    def report(self, key: str, state: ReplicaState, incarnation: str) -> None:
        self.follow(self.state.report(replica(key, incarnation=incarnation), state, IDLE, self.now_s))
        self.alive_since[key] = self.now_s

    @rule(seconds=st.floats(0.1, 80.0))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        self.follow(self.state.expire(self.now_s))

    @invariant()
    def lost_is_who_was_silent(self) -> None:
        for status in self.state.statuses:
            silent = self.now_s - self.alive_since[status.replica_id] >= 5
            assert (status.state is LOST) == silent

    @invariant()
    def the_plan_lists_whom_the_statuses_list(self) -> None:
        assert [r.replica_id for r in self.state.plan.replicas] == [s.replica_id for s in self.state.statuses]

    @invariant()
    def routes_join_the_living(self) -> None:
        known = states(self.state)
        for route in self.state.plan.routes:
            assert LOST not in (known[route.prefill_replica_id], known[route.decode_replica_id])
            assert route.prefill_replica_id.startswith("p")
            assert route.decode_replica_id.startswith("d")
        ready = [key for key, state in known.items() if state is READY]
        wanted = {(p, d) for p in ready for d in ready if p.startswith("p") and d.startswith("d")}
        assert wanted <= pairs(self.state)


Life.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestLife = Life.TestCase
