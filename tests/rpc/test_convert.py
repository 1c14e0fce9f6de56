"""Wire <-> domain and the limits of what clients may ask for."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexgen2.engine.base import FinishReason, Logprob, SampledToken, Sampling
from hexgen2.errors import InvalidRequest
from hexgen2.plan import (
    GatewayLoad,
    KvReceived,
    Load,
    Measured,
    Plan,
    Prediction,
    Replica,
    ReplicaPrediction,
    ReplicaState,
    ReplicaStatus,
    Role,
    Route,
    RouteLoad,
)
from hexgen2.rpc import convert, plan_convert
from hexgen2.v1 import types_pb2 as pb

uint32, uint64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
samplings = st.builds(
    Sampling,
    max_tokens=st.integers(100, 2**31 - 1),
    min_tokens=st.integers(0, 100),
    temperature=st.floats(0, 100),
    top_p=st.floats(0, 1, exclude_min=True),
    top_k=st.integers(-1, 2**31 - 1),
    seed=st.none() | st.integers(0, 2**63 - 1),
    ignore_eos=st.booleans(),
    stop_token_ids=st.lists(uint32, max_size=4).map(tuple),
    logprobs=st.none() | st.integers(0, 20),
    min_p=st.floats(0, 1),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    repetition_penalty=st.floats(0, 10, exclude_min=True),
    json_schema=st.none() | st.just("{}"),
)
tokens = st.builds(
    SampledToken,
    uint32,
    st.none() | st.floats(allow_nan=False),
    st.lists(st.builds(Logprob, uint32, st.floats(allow_nan=False), uint32), max_size=3).map(tuple),
)
replicas = st.builds(
    Replica,
    st.text(),
    st.sampled_from(Role),
    st.text(),
    st.text(),
    st.binary(),
    st.text(),
    uint32,
    st.text(),
    st.text(),
    st.booleans(),
    st.text(),
)
received = st.builds(KvReceived, uint64, st.floats(0, 1e9), uint32, uint32, uint64)
loads = st.builds(Load, uint32, uint32, uint64, uint64, received)


@given(samplings)
def test_sampling_comes_back_as_it_went(sampling: Sampling) -> None:
    wire = pb.SamplingParams.FromString(convert.sampling_to_proto(sampling).SerializeToString())
    assert convert.sampling_from_proto(wire) == sampling


@given(tokens)
def test_a_token_comes_back_as_it_went(token: SampledToken) -> None:
    assert convert.token_from_proto(convert.token_to_proto(token)) == token


@given(st.none() | st.sampled_from(FinishReason))
def test_a_finish_reason_comes_back_as_it_went(reason: FinishReason | None) -> None:
    assert convert.finish_from_proto(convert.finish_to_proto(reason)) is reason


@given(st.builds(ReplicaStatus, st.text(), st.sampled_from(ReplicaState), loads))
def test_a_status_comes_back_as_it_went(status: ReplicaStatus) -> None:
    assert plan_convert.status_from_proto(plan_convert.status_to_proto(status)) == status


numbers = st.floats(0, 1e9)
counts = st.integers(0, 2**32 - 1)
measured = st.builds(Measured, numbers, counts, counts, counts, numbers, numbers, numbers, numbers)
route_loads = st.lists(st.builds(RouteLoad, st.text(), st.text(), counts, counts), max_size=3).map(tuple)


@given(st.builds(GatewayLoad, st.text(min_size=1), route_loads, measured))
def test_what_a_gateway_sees_comes_back_as_it_went(load: GatewayLoad) -> None:
    assert plan_convert.gateway_from_proto(plan_convert.gateway_to_proto(load)) == load


predictions = st.builds(
    Prediction,
    *(numbers, numbers, numbers, st.none() | numbers, numbers),
    st.lists(st.builds(ReplicaPrediction, st.text(), numbers, numbers), max_size=3).map(tuple),
)


@given(uint64, st.lists(replicas, unique_by=lambda each: each.replica_id, max_size=5), st.floats(0, 1e9), predictions)
def test_a_plan_comes_back_as_it_went(epoch: int, members: list[Replica], flow: float, promised: Prediction) -> None:
    routes = [
        Route(p.replica_id, d.replica_id, flow)
        for p in members
        for d in members
        if (p.role, d.role) == (Role.PREFILL, Role.DECODE)
    ]
    routes += [Route(c.replica_id, c.replica_id, flow) for c in members if c.role is Role.COLOCATED]
    plan = Plan(epoch, tuple(members), tuple(routes), "00-ab", 64, promised)
    assert plan_convert.plan_from_proto(plan_convert.plan_to_proto(plan)) == plan


def test_unset_sampling_takes_vllms_defaults() -> None:
    assert convert.sampling_from_proto(pb.SamplingParams()) == Sampling(max_tokens=16)
    assert convert.sampling_from_proto(pb.SamplingParams(), default_max_tokens=100) == Sampling(max_tokens=100)


def test_temperature_zero_is_not_unset() -> None:
    assert convert.sampling_from_proto(pb.SamplingParams(temperature=0.0)).temperature == 0.0


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("max_tokens", [0, -1, 2**31]),
        ("min_tokens", [-1, 17]),
        ("temperature", [-0.1, NAN, INF]),
        ("top_p", [0.0, -1.0, 1.1, NAN]),
        ("top_k", [-2, 2**31]),
        ("seed", [-1, 2**63]),
        ("stop_token_ids", [(-1,), (2**32,)]),
        ("logprobs", [-1, 21]),
        ("min_p", [-0.1, 1.1, NAN]),
        ("presence_penalty", [-2.1, 2.1, NAN]),
        ("frequency_penalty", [-2.1, 2.1, NAN]),
        ("repetition_penalty", [0.0, -1.0, NAN, INF]),
        ("json_schema", ["", "[]", "{", "[" * 100_000]),
    ],
)
def test_a_value_outside_its_limits_names_its_field(field: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(InvalidRequest) as caught:
            convert.check_sampling(replace(Sampling(max_tokens=16), **{field: value}))
        assert caught.value.field == f"sampling.{field}"
        assert len(str(caught.value)) < 200
        with pytest.raises(InvalidRequest, match=f"^{field}: "):
            convert.check_sampling(replace(Sampling(max_tokens=16), **{field: value}), prefix="")


@pytest.mark.parametrize(
    ("plan", "field"),
    [
        (pb.Plan(replicas=[pb.Replica(replica_id="p")]), "plan.replicas[0].role"),
        (pb.Plan(routes=[pb.Route(prefill_replica_id="p")]), "plan.routes[0].prefill_replica_id"),
        (
            pb.Plan(
                replicas=[
                    pb.Replica(replica_id="p", role=pb.ROLE_PREFILL),
                    pb.Replica(replica_id="d", role=pb.ROLE_DECODE),
                ],
                routes=[pb.Route(prefill_replica_id="p", decode_replica_id="d", flow=-1)],
            ),
            "plan.routes[0].flow",
        ),
    ],
)
def test_a_plan_that_contradicts_itself_is_refused(plan: pb.Plan, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        plan_convert.plan_from_proto(plan)
    assert caught.value.field == field


def test_unknown_enum_values_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="finish_reason: unknown value 9"):
        convert.finish_from_proto(9)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="state: must be a known state, is 0"):
        plan_convert.state_from_proto(pb.REPLICA_STATE_UNSPECIFIED)
