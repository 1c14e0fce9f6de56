"""Routing: the plan's proportions when nobody is slow, and away from what is slow, absent or excluded."""

from collections import Counter
from dataclasses import replace

from hypothesis import example, given, settings
from hypothesis import strategies as st

from hexgen2.plan import Load, Plan, Replica, ReplicaState, ReplicaStatus, Role, Route
from hexgen2.routing import RouteKey, Router, pick, pick_colocated, route_key, short_enough, usable_routes

NO_LOAD: dict[RouteKey, int] = {}


def replica(replica_id: str) -> Replica:
    role = Role.PREFILL if replica_id.startswith("p") else Role.DECODE
    return Replica(replica_id, role, f"{replica_id}:1", "m", b"m" * 32, "i", 1024, "tcp")


def make_plan(flows: dict[RouteKey, float]) -> Plan:
    ids = sorted({end for key in flows for end in key})
    return Plan(1, tuple(map(replica, ids)), tuple(Route(p, d, flow) for (p, d), flow in flows.items()))


def all_ready(plan: Plan, **states: ReplicaState) -> dict[str, ReplicaStatus]:
    return {
        r.replica_id: ReplicaStatus(r.replica_id, states.get(r.replica_id, ReplicaState.READY), Load())
        for r in plan.replicas
    }


keys = st.tuples(st.integers(0, 4).map("p{}".format), st.integers(0, 4).map("d{}".format))
plans = st.dictionaries(keys, st.floats(0.001, 1000.0), min_size=1, max_size=25).map(make_plan)


@settings(deadline=None, max_examples=40)
@given(plan=plans, before=st.integers(0, 300))
@example(plan=make_plan({(f"p{i}", f"d{j}"): 2.0**-i * 3.0**-j for i in range(8) for j in range(8)}), before=0)
def test_any_thousand_picks_are_within_two_percent_of_the_plans_proportions(plan: Plan, before: int) -> None:
    router, statuses = Router(), all_ready(plan)
    for _ in range(before):
        router.pick(plan, statuses, NO_LOAD)
    picks = Counter(router.pick(plan, statuses, NO_LOAD) for _ in range(1000))
    total = sum(route.flow for route in plan.routes)
    for route in plan.routes:
        assert abs(picks[route] / 1000 - route.flow / total) <= 0.02


@given(plan=plans, count=st.integers(1, 40))
def test_the_same_history_gives_the_same_picks(plan: Plan, count: int) -> None:
    one, other, statuses = Router(), Router(), all_ready(plan)
    for _ in range(count):
        assert one.pick(plan, statuses, NO_LOAD) == other.pick(plan, statuses, NO_LOAD)


states = st.sampled_from(ReplicaState)


@given(data=st.data(), plan=plans)
def test_only_ready_replicas_that_are_not_excluded_are_picked(data: st.DataObject, plan: Plan) -> None:
    ids = [r.replica_id for r in plan.replicas]
    known = data.draw(st.dictionaries(st.sampled_from(ids), states))
    statuses = {key: ReplicaStatus(key, state, Load()) for key, state in known.items()}
    exclude = data.draw(st.frozensets(st.sampled_from(ids)))
    in_flight = data.draw(st.dictionaries(keys, st.integers(0, 50)))

    def fine(replica_id: str) -> bool:
        return known.get(replica_id) is ReplicaState.READY and replica_id not in exclude

    router = Router()
    for _ in range(5):
        route = router.pick(plan, statuses, in_flight, exclude)
        if route is None:
            assert not any(all(map(fine, route_key(each))) for each in plan.routes)
        else:
            assert route in plan.routes
            assert all(map(fine, route_key(route)))
    colocated = pick_colocated(plan, statuses, {}, exclude)
    decodes = [r.replica_id for r in plan.replicas if r.role is Role.DECODE and fine(r.replica_id)]
    assert (colocated in decodes) if decodes else colocated is None


few = st.dictionaries(keys, st.integers(1, 3).map(float), min_size=1, max_size=6).map(make_plan)


@settings(deadline=None, max_examples=50)
@given(plan=few, data=st.data())
def test_what_is_in_flight_converges_to_the_plans_proportions_from_any_start(plan: Plan, data: st.DataObject) -> None:
    router, statuses = Router(), all_ready(plan)
    flow = sum(route.flow for route in plan.routes)
    shares = {route_key(route): route.flow / flow for route in plan.routes}
    in_flight = Counter(data.draw(st.dictionaries(st.sampled_from(sorted(shares)), st.integers(0, 20))))
    # As many as it takes to bring every route level with the fullest, if none of them ends.
    level = max(in_flight[key] / share for key, share in shares.items())
    for _ in range(int(level) - in_flight.total() + 20):
        route = router.pick(plan, statuses, in_flight)
        assert route is not None
        in_flight[route_key(route)] += 1
    total = in_flight.total()
    assert all(abs(in_flight[key] - share * total) <= 4 for key, share in shares.items())


def test_a_slow_decode_replica_gets_less() -> None:
    plan = make_plan({("p", "fast"): 1.0, ("p", "slow"): 1.0})
    plan = Plan(1, (replica("p"), replica("fast"), replica("slow")), plan.routes)
    router, statuses = Router(), all_ready(plan)
    in_flight: Counter[RouteKey] = Counter()
    picks: Counter[str] = Counter()
    for step in range(1000):
        route = router.pick(plan, statuses, in_flight)
        assert route is not None
        picks[route.decode_replica_id] += 1
        in_flight[route_key(route)] += 1
        in_flight["p", "fast"] = 0  # each ends before the next begins
        if step % 10 == 0:
            in_flight["p", "slow"] = max(0, in_flight["p", "slow"] - 1)
    assert picks["slow"] <= 120
    assert in_flight["p", "slow"] <= 6


def test_a_route_that_was_away_does_not_claim_what_it_missed() -> None:
    plan = make_plan({("p", "d1"): 1.0, ("p", "d2"): 1.0})
    router = Router()
    for _ in range(100):
        router.pick(plan, all_ready(plan, d2=ReplicaState.LOST), NO_LOAD)
    back = [router.pick(plan, all_ready(plan), NO_LOAD) for _ in range(10)]
    assert Counter(route.decode_replica_id for route in back if route) == {"d1": 5, "d2": 5}


def test_without_memory_the_plans_first_largest_route_is_picked() -> None:
    plan = make_plan({("p", "d1"): 1.0, ("p", "d2"): 2.0, ("p", "d3"): 2.0})
    assert pick(plan, all_ready(plan), NO_LOAD) == Route("p", "d2", 2.0)


def test_a_route_whose_kv_memory_is_full_is_passed_over_until_the_others_are_as_busy() -> None:
    plan = make_plan({("p", "d1"): 1.0, ("p", "d2"): 1.0})
    full = {"d1": ReplicaStatus("d1", ReplicaState.READY, Load(kv_pool_bytes_used=100, kv_pool_bytes_total=100))}
    router, in_flight = Router(), Counter[RouteKey]()
    for _ in range(4):
        route = router.pick(plan, all_ready(plan) | full, in_flight)
        assert route is not None
        in_flight[route_key(route)] += 1
    assert in_flight == {("p", "d2"): 4}
    # Nobody is starved for good: what d2 has in flight weighs as much in the end.
    for _ in range(20):
        route = router.pick(plan, all_ready(plan) | full, in_flight)
        assert route is not None
        in_flight[route_key(route)] += 1
    assert in_flight["p", "d1"] > 4


@given(plan=plans, used=st.integers(0, 75))
def test_kv_memory_with_room_changes_nothing(plan: Plan, used: int) -> None:
    some = {
        key: ReplicaStatus(key, ReplicaState.READY, Load(kv_pool_bytes_used=used, kv_pool_bytes_total=100))
        for key in all_ready(plan)
    }
    one, other = Router(), Router()
    for _ in range(10):
        assert one.pick(plan, all_ready(plan), NO_LOAD) == other.pick(plan, some, NO_LOAD)


def test_what_serves_whole_requests_has_its_share_like_any_route() -> None:
    members = (replica("p"), replica("d"), replace(replica("c"), role=Role.COLOCATED))
    plan = Plan(1, members, (Route("p", "d", 3.0), Route("c", "c", 1.0)))
    router, statuses = Router(), all_ready(plan)
    picks = Counter(router.pick(plan, statuses, NO_LOAD) for _ in range(1000))
    assert picks == {plan.routes[0]: 750, plan.routes[1]: 250}
    assert pick_colocated(plan, statuses, {"d": 1}) == "c"


def test_only_prompts_within_the_plans_limit_are_short() -> None:
    plan = replace(make_plan({("p", "d"): 1.0}), colocate_max_prompt_tokens=64)
    assert [short_enough(plan, tokens) for tokens in (1, 64, 65)] == [True, True, False]
    assert not short_enough(make_plan({("p", "d"): 1.0}), 1)


def test_a_route_without_flow_is_never_picked() -> None:
    plan = make_plan({("p", "d1"): 0.0})
    assert usable_routes(plan, all_ready(plan)) == ()
    assert pick(plan, all_ready(plan), NO_LOAD) is None


def test_a_colocated_request_goes_where_least_runs() -> None:
    plan = make_plan({("p", "d1"): 1.0, ("p", "d2"): 1.0, ("p", "d3"): 1.0})
    statuses = all_ready(plan) | {"d1": ReplicaStatus("d1", ReplicaState.READY, Load(num_requests_running=3))}
    assert pick_colocated(plan, statuses, {}) == "d2"
    assert pick_colocated(plan, statuses, {"d2": 1}) == "d3"
    assert pick_colocated(plan, statuses, {"d2": 1, "d3": 1}) == "d1"
