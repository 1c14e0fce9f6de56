"""Membership and the plan that follows from it."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from hexgen2.coordinator.assignment import Assignment, Shape
from hexgen2.coordinator.state import Change, FleetState
from hexgen2.errors import InvalidRequest, ReplicaConflict, ReplicaMismatch
from hexgen2.plan import Load, Prediction, Replica, ReplicaState, Role, Route
from hexgen2.routing import route_key

READY, DRAINING, STARTING, LOST, STOPPED = (
    ReplicaState.READY,
    ReplicaState.DRAINING,
    ReplicaState.STARTING,
    ReplicaState.LOST,
    ReplicaState.STOPPED,
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


def test_replicas_of_another_transport_are_not_joined() -> None:
    state = fleet("p1", "d1")
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


def test_a_replica_whose_machine_goes_drains_whatever_it_still_says_until_it_begins_anew() -> None:
    state = fleet("p1", "d1", "d2")
    assert state.preempt("d1", 30.0, 1.0) is Change.STATE
    assert states(state) == {"p1": READY, "d1": DRAINING, "d2": READY}
    # It has not heard of it yet.
    assert state.report(replica("d1"), READY, IDLE, 2.0) is Change.NOTHING
    assert states(state)["d1"] is DRAINING
    assert state.leave_within_s("d1", 11.0) == 20.0
    assert state.leave_within_s("d1", 99.0) == 0.0
    assert state.leave_within_s("d2", 2.0) is None
    state.report(replica("d1"), STOPPED, IDLE, 12.0)
    assert state.report(replica("d1", incarnation="second"), READY, IDLE, 13.0) is Change.MEMBERS
    assert states(state)["d1"] is READY
    assert state.leave_within_s("d1", 13.0) is None
    with pytest.raises(InvalidRequest, match="'x' is not here; there are: d1, d2, p1"):
        state.preempt("x", 30.0, 1.0)
    with pytest.raises(InvalidRequest, match="grace_s: 0 is not a time greater than 0"):
        state.preempt("d1", 0.0, 1.0)


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


def test_a_worker_of_another_model_is_refused_with_what_differs_until_the_others_are_gone() -> None:
    state = fleet("p1")
    other = replica("d1", model="n", model_sha256=b"x" * 32)
    told = r"'d1' serves n \(787878787878\), this fleet serves m \(6d6d6d6d6d6d, 'p1'\): start it with the same"
    with pytest.raises(ReplicaMismatch, match=told):
        state.report(other, READY, IDLE, 1.0)
    assert [status.replica_id for status in state.statuses] == ["p1"]
    state.expire(5.0)
    assert state.report(other, READY, IDLE, 5.0) is Change.MEMBERS


def test_a_worker_of_another_version_is_refused_with_both() -> None:
    state = FleetState(1, 5.0, version="2.0.3")
    with pytest.raises(ReplicaMismatch, match=r"'p1' runs hexgen2 2\.1\.3, this coordinator 2\.0\.3: they work"):
        state.report(replica("p1", version="2.1.3"), STARTING, IDLE, 0.0)
    with pytest.raises(ReplicaMismatch, match="of an unknown version"):
        state.report(replica("p1"), STARTING, IDLE, 0.0)
    # A fleet is upgraded host by host.
    assert state.report(replica("p1", version="2.0.4"), STARTING, IDLE, 0.0) is Change.MEMBERS


def test_two_processes_with_one_id_and_address_are_told_apart_by_incarnation() -> None:
    state = fleet("p1")
    second = replica("p1", incarnation="second")
    assert state.report(second, READY, IDLE, 1.0) is Change.MEMBERS
    with pytest.raises(ReplicaConflict, match="was started anew since this process began, and both report: stop one"):
        state.report(replica("p1"), READY, IDLE, 2.0)
    assert state.replan().replicas == (second,)


def test_one_that_was_replaced_is_there_again_once_its_successor_is_lost() -> None:
    state = fleet("p1", "d1")
    assert state.report(replica("p1", incarnation="second"), READY, IDLE, 1.0) is Change.MEMBERS
    state.expire(10.0)
    for now_s in (11.0, 12.0):
        state.report(replica("p1"), READY, IDLE, now_s)
    assert states(state)["p1"] is READY
    with pytest.raises(ReplicaConflict):
        state.report(replica("p1", incarnation="second"), READY, IDLE, 13.0)


def test_a_worker_that_stops_leaves_at_once_and_only_by_its_own_word() -> None:
    state = fleet("p1", "d1")
    assert state.report(replica("d1", incarnation="before"), STOPPED, IDLE, 1.0) is Change.NOTHING
    assert state.report(replica("d9"), STOPPED, IDLE, 1.0) is Change.NOTHING
    assert state.report(replica("d1"), STOPPED, IDLE, 1.0) is Change.MEMBERS
    assert [each.replica_id for each in state.replan().replicas] == ["p1"]
    assert state.plan.routes == ()


# With a plan


def assignment(colocate: int = 0, **roles: Role) -> Assignment:
    prefills = [key for key, role in roles.items() if role is Role.PREFILL]
    decodes = [key for key, role in roles.items() if role is Role.DECODE]
    wholes = [Route(key, key, 5.0) for key, role in roles.items() if role is Role.COLOCATED]
    routes = [Route(p, d, 1.0 + n, "int8") for n, (p, d) in enumerate(zip(prefills, decodes, strict=True))]
    return Assignment(
        MappingProxyType(roles),
        (*routes, *wholes),
        Prediction(9.0, 90.0, 4.0, 0.5, 0.05),
        colocate,
        MappingProxyType(dict.fromkeys(roles, 6.0)),
    )


P, D, C = Role.PREFILL, Role.DECODE, Role.COLOCATED


def planned(given: Assignment, *members: Replica) -> FleetState:
    state = FleetState(100, 5.0, assignment=given)
    for each in members:
        state.report(each, READY, IDLE, 0.0)
    state.replan()
    return state


def test_a_plan_gives_flexible_replicas_their_roles_and_routes_their_flow_and_codec() -> None:
    given = assignment(64, w1=P, w2=D, w3=C)
    state = planned(given, *(replica(key, flexible=True, role=C) for key in ("w1", "w2", "w3")))
    assert [(each.replica_id, each.role) for each in state.plan.replicas] == [("w1", P), ("w2", D), ("w3", C)]
    assert state.plan.routes == (Route("w1", "w2", 1.0, "int8"), Route("w3", "w3", 5.0))
    assert (state.plan.colocate_max_prompt_tokens, state.plan.prediction) == (64, given.prediction)
    # What it reports of its role is what it heard last; the plan decides.
    assert state.report(replica("w1", flexible=True, role=D), READY, IDLE, 1.0) is Change.NOTHING


def test_a_replica_that_is_not_flexible_must_have_the_plans_role() -> None:
    state = planned(assignment(p1=D, p2=P))
    with pytest.raises(ReplicaMismatch, match="'p1' can only do prefill, and the plan has it decode: start it with"):
        state.report(replica("p1"), STARTING, IDLE, 0.0)
    state = planned(assignment(d1=C))
    assert state.report(replica("d1"), READY, IDLE, 0.0) is Change.MEMBERS
    assert state.replan().routes == (Route("d1", "d1", 5.0),)


def test_a_prefill_replica_whose_decode_is_lost_goes_to_the_others() -> None:
    state = planned(assignment(p1=P, p2=P, d1=D, d2=D), *map(replica, ("p1", "p2", "d1", "d2")))
    assert state.plan.routes == (Route("p1", "d1", 1.0, "int8"), Route("p2", "d2", 2.0, "int8"))
    state.report(replica("d1"), STOPPED, IDLE, 1.0)
    assert state.replan().routes == (Route("p2", "d2", 2.0, "int8"), Route("p1", "d2", 6.0))


def test_another_plan_changes_roles_in_the_next_epoch_and_says_since_when() -> None:
    members = [replica(key, flexible=True, role=C) for key in ("w1", "w2", "w3", "w4")]
    state = planned(assignment(w1=P, w2=D, w3=P, w4=D), *members)
    before = state.plan
    state.assign(assignment(w1=P, w2=D, w3=D, w4=P))
    after = state.replan()
    assert after.epoch == before.epoch + 1
    assert {route_key(route) for route in after.routes} == {("w1", "w2"), ("w4", "w3")}
    since = {key: member.role_epoch for key in ("w1", "w3") if (member := state.member(key))}
    assert since["w1"] <= before.epoch < since["w3"] == after.epoch


def test_a_restart_goes_on_with_the_same_epoch_and_waits_for_everybody_anew() -> None:
    given = assignment(w1=P, w2=D)
    members = [replica(key, flexible=True, role=C) for key in ("w1", "w2")]
    state = planned(given, *members)
    state.report(members[1], DRAINING, IDLE, 1.0)
    again = FleetState(1, 5.0, assignment=given)
    assert again.restore(state.snapshot, 1000.0) is Change.NOTHING
    assert (again.plan, states(again)) == (state.plan, {"w1": READY, "w2": DRAINING})
    assert again.report(members[0], READY, IDLE, 1001.0) is Change.NOTHING
    assert again.expire(1004.9) is Change.NOTHING
    assert again.expire(1005.0) is Change.MEMBERS
    other = FleetState(1, 5.0, assignment=assignment(w1=D, w2=P))
    other.restore(state.snapshot, 1000.0)
    other.report(members[0], READY, IDLE, 1001.0)
    assert other.replan().epoch == state.plan.epoch + 1


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
        self.incarnations: dict[str, str] = {}

    def follow(self, change: Change) -> None:
        before = self.state.plan
        if change is Change.MEMBERS:
            assert self.state.replan().epoch == before.epoch + 1

    @rule(key=ids, state=st.sampled_from([STARTING, READY, DRAINING]), incarnation=st.sampled_from("ab"))
    def report(self, key: str, state: ReplicaState, incarnation: str) -> None:
        try:
            change = self.state.report(replica(key, incarnation=incarnation), state, IDLE, self.now_s)
        except ReplicaConflict:
            # The one that was replaced.
            assert self.incarnations[key] != incarnation
            return
        self.follow(change)
        self.alive_since[key] = self.now_s
        self.incarnations[key] = incarnation

    @rule(key=ids, incarnation=st.sampled_from("ab"))
    def stop(self, key: str, incarnation: str) -> None:
        change = self.state.report(replica(key, incarnation=incarnation), STOPPED, IDLE, self.now_s)
        self.follow(change)
        member = self.state.member(key)
        assert (change is Change.MEMBERS) <= (member is None)
        assert member is None or self.incarnations[key] != incarnation

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


def shaped(*sizes: int, layers: tuple[int, ...], device: str) -> Assignment:
    shape = Shape(sizes, layers, (device,) * len(sizes))
    return Assignment(
        MappingProxyType({"p": Role.PREFILL}),
        (),
        Prediction(1.0, 1.0, 1.0, None, 1.0),
        0,
        shapes=MappingProxyType({"p": shape}),
    )


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"tensor_parallel_size": 4}, "tensor_parallel_size 2 in the plan, 4 in the worker"),
        ({"stage_layers": (20, 20)}, "stages of 40 layers in the plan, of 20,20 in the worker"),
        ({"device": "NVIDIA H100 80GB HBM3"}, "A100-SXM in the plan, NVIDIA H100 80GB HBM3 in the worker"),
        ({"device": "cpu"}, "A100-SXM in the plan, cpu in the worker"),
    ],
)
def test_a_plan_for_other_hardware_than_is_there_is_refused_with_what_differs(
    changes: dict[str, Any], told: str
) -> None:
    as_planned = {"tensor_parallel_size": 2, "stage_layers": (40,), "device": "NVIDIA A100-SXM4-80GB"}
    planned = shaped(2, layers=(40,), device="A100-SXM")
    state = FleetState(100, lost_after_s=5)
    state.report(replica("p", **as_planned | changes), READY, IDLE, 0.0)
    with pytest.raises(ReplicaMismatch, match=told):
        state.assign(planned)
    # A worker that comes after the plan is refused as well, and the right one is taken.
    late = FleetState(100, lost_after_s=5, assignment=planned)
    with pytest.raises(ReplicaMismatch, match=told):
        late.report(replica("p", **as_planned | changes), READY, IDLE, 0.0)
    late.report(replica("p", **as_planned), READY, IDLE, 0.0)


def test_a_worker_that_does_not_tell_its_hardware_is_taken() -> None:
    state = FleetState(100, lost_after_s=5, assignment=shaped(2, layers=(40,), device="A100-SXM"))
    state.report(replica("p"), READY, IDLE, 0.0)
    cpu = FleetState(100, lost_after_s=5, assignment=shaped(1, layers=(30,), device="cpu-0.25"))
    cpu.report(replica("p", device="cpu", stage_layers=(30,), tensor_parallel_size=1), READY, IDLE, 0.0)
