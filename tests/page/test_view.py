"""What the page says of a fleet."""

from dataclasses import replace

import pytest

from hexgen2.coordinator.page.draw import MOST_REPLICAS, MOST_ROUTES, flows, level
from hexgen2.coordinator.page.html import page
from hexgen2.coordinator.page.trend import MOST_POINTS, Trend, Trends
from hexgen2.coordinator.page.view import Fleet, view
from hexgen2.plan import KvReceived, Load, Plan, ReplicaState, ReplicaStatus, Role, Route
from tests.page.fleets import EVIL, evil, fleet, replica


def test_routes_are_measured_against_their_planned_flow() -> None:
    shown = view(fleet())
    routes = {(each.prefill, each.decode): each for each in shown.routes}
    hand_over, whole = routes["p", "d"], routes["c", "c"]
    assert (hand_over.planned_rps, hand_over.measured_rps, hand_over.utilisation) == (2.0, 1.0, 0.5)
    assert (whole.planned_rps, whole.measured_rps, whole.in_flight) == (1.0, 0.5, 1)
    assert shown.in_flight == 4


def test_times_are_compared_with_the_promise() -> None:
    shown = view(fleet())
    told = {each.name: (each.planned, each.measured, each.verdict) for each in shown.compared}
    assert told["Time to first token"] == (0.5, 0.55, "kept")
    assert told["Time per output token"] == (0.05, 0.08, "worse")
    assert told["Requests served"] == (2.0, 1.5, "")
    assert (shown.level, shown.troubles) == ("warn", ("time per output token is longer than planned",))


def test_gpus_stand_in_their_machines_and_replicas_outside_of_the_plan_at_their_address() -> None:
    made = fleet()
    extra = replica("x", Role.DECODE, address="[fd00::7]:5000")
    shown = view(replace(made, plan=replace(made.plan, replicas=(*made.plan.replicas, extra))))
    machines = {each.name: each for each in shown.machines}
    assert set(machines) == {"a100", "fd00::7"}
    assert [cell.replica for cell in machines["a100"].gpus[0].cells] == ["p", "d", "c"]
    assert machines["a100"].gpus[0].kind == "A100-SXM"
    assert [cell.replica for cell in machines["fd00::7"].gpus[0].cells] == ["x"]
    assert {each.id: each.label for each in shown.replicas} == {"p": "P0", "d": "D0", "c": "C0", "x": "D1"}


def test_kv_has_its_bandwidth_and_what_went_wrong() -> None:
    made = fleet()
    shown = view(made)
    assert (shown.kv.transfers, shown.kv.bytes_per_s) == (60, 2_000_000.0)
    load = Load(kv_received=KvReceived(num_corrupt=2, quarantine_bytes=64))
    statuses = {**made.statuses, "d": ReplicaStatus("d", ReplicaState.READY, load)}
    shown = view(replace(made, statuses=statuses))
    assert "2 KV hand-offs did not match their digest" in shown.troubles
    assert "KV memory is in quarantine: a read has not ended" in shown.troubles


def test_a_lost_replica_is_named_and_without_any_nothing_can_be_served() -> None:
    made = fleet()
    lost = ReplicaStatus("d", ReplicaState.LOST, Load())
    shown = view(replace(made, statuses={**made.statuses, "d": lost}))
    assert (shown.level, shown.troubles[0]) == ("warn", "d is lost")
    assert "✕D0" in page(shown)
    nobody = view(Fleet(1.0, Plan(1), {}, ()))
    assert (nobody.level, nobody.troubles) == ("bad", ("no replica has registered", "no gateway reports"))
    assert "Nobody is here yet" in page(nobody)


def test_nothing_from_outside_is_markup() -> None:
    text = page(view(evil()))
    assert EVIL not in text
    assert "<img" not in text
    assert text.count("&lt;img src=x onerror=alert(1)&gt;&quot;&#x27;&amp;") > 5


def test_a_page_has_no_style_no_script_and_no_handler_of_its_own() -> None:
    text = page(view(fleet()))
    assert "style=" not in text
    assert "<style" not in text
    assert text.count("<script") == text.count('<script src="page.js" defer></script>') == 1
    assert " on" not in text.split("<body>")[0]


def test_a_large_fleet_is_drawn_in_part_and_the_page_says_so() -> None:
    members = [replica(f"p{i:03}", Role.PREFILL) for i in range(100)]
    members += [replica(f"d{i:03}", Role.DECODE) for i in range(100)]
    routes = tuple(Route(f"p{i:03}", f"d{j:03}", 1.0 + i) for i in range(100) for j in range(100))
    statuses = {each.replica_id: ReplicaStatus(each.replica_id, ReplicaState.READY, Load()) for each in members}
    shown = view(fleet(plan=Plan(1, tuple(members), routes), statuses=statuses, placement=None))
    drawn = flows(shown)
    assert drawn.count("<path") <= MOST_ROUTES
    assert drawn.count('<g class="box') == 2 * MOST_REPLICAS
    assert f"Not drawn: {200 - 2 * MOST_REPLICAS} replicas and" in drawn
    assert len(page(shown)) < 300_000


@pytest.mark.parametrize(
    ("utilisation", "name"), [(None, "unplanned"), (0.0, "u0"), (0.5, "u1"), (0.7, "u2"), (1.0, "u3"), (1.2, "u4")]
)
def test_lines_have_their_class_by_use(utilisation: float | None, name: str) -> None:
    assert level(utilisation) == name


def test_trends_keep_a_quarter_of_an_hour_and_show_gaps() -> None:
    trends = Trends()
    for _ in range(MOST_POINTS + 5):
        trends.add(view(fleet()))
    (ttft, *_) = trends.all()
    assert len(ttft.points) == MOST_POINTS
    assert 'class="promise"' in ttft.svg(0.5)
    gap = Trend("x")
    gap.points.extend([1.0, None, 2.0, 3.0])
    assert gap.svg(None).count("M") == 2
    assert Trend("x").svg(1.0) == ""
