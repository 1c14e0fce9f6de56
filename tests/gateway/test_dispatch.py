"""Where requests go, and where they go next."""

import asyncio
from contextlib import ExitStack
from dataclasses import replace

import pytest

from hexgen2.engine.base import Sampling
from hexgen2.errors import EngineFailed, HexgenError, Overloaded, StaleEpoch, Unavailable
from hexgen2.gateway.dispatch import SUSPECT_S, Dispatch, Targets
from hexgen2.gateway.life import Side, TryAgain, Way
from hexgen2.plan import Load, Plan, Replica, ReplicaState, ReplicaStatus, Role, Route

GREEDY = Sampling(max_tokens=8)
PENALISED = Sampling(max_tokens=8, presence_penalty=1)
LOST = Unavailable("gone")


class Fleet:
    """A plan source and a clock."""

    def __init__(self, prefills: int, decodes: int) -> None:
        self.now = 0.0
        ids = [(Role.PREFILL, f"p{n}") for n in range(prefills)] + [(Role.DECODE, f"d{n}") for n in range(decodes)]
        replicas = tuple(Replica(name, role, f"{name}:1", "m", b"", f"{name}-first", 64, "") for role, name in ids)
        routes = tuple(Route(f"p{p}", f"d{d}", 1.0) for p in range(prefills) for d in range(decodes))
        self.plan = Plan(1, replicas, routes)
        self.statuses = {name: ReplicaStatus(name, ReplicaState.READY, Load()) for _, name in ids}
        self.dispatch = Dispatch(self, lambda: self.now)

    async def wait_changed(self) -> None:
        """Soon."""
        await asyncio.sleep(0)

    def restart(self, replica_id: str) -> None:
        changed = [
            replace(each, incarnation="second") if each.replica_id == replica_id else each
            for each in self.plan.replicas
        ]
        self.plan = replace(self.plan, replicas=tuple(changed))


def ends(targets: Targets) -> tuple[str | None, str | None]:
    return (
        targets.prefill.replica_id if targets.prefill else None,
        targets.decode.replica_id if targets.decode else None,
    )


def test_one_token_goes_to_prefill_alone_and_history_to_decode_alone() -> None:
    fleet = Fleet(1, 1)
    one = fleet.dispatch.first(replace(GREEDY, max_tokens=1))
    assert (one.way, ends(one)) == (Way.FIRST_ONLY, ("p0", None))
    alone = fleet.dispatch.first(PENALISED)
    assert (alone.way, ends(alone)) == (Way.COLOCATED, (None, "d0"))


def test_an_answer_that_became_too_long_to_be_handed_over_goes_on_with_decode_alone() -> None:
    fleet = Fleet(1, 2)
    pools = {Role.PREFILL: {"send_tokens": 30}, Role.DECODE: {"staging_tokens": 40}}
    replicas = tuple(replace(each, **pools[each.role]) for each in fleet.plan.replicas)  # type: ignore[arg-type]
    fleet.plan = replace(fleet.plan, replicas=replicas)
    tried = fleet.dispatch.first(GREEDY, 30)
    assert tried.way is Way.HAND_OVER
    lost = TryAgain(Side.DECODE, LOST)
    assert fleet.dispatch.again(GREEDY, tried, lost, 30).way is Way.HAND_OVER
    again = fleet.dispatch.again(GREEDY, tried, lost, 31)
    assert again.way is Way.COLOCATED
    assert ends(again)[1] != ends(tried)[1]


def test_what_failed_is_passed_over_for_a_while() -> None:
    fleet = Fleet(3, 1)
    tried = fleet.dispatch.first(GREEDY)
    lost = ends(tried)[0]
    fleet.dispatch.again(GREEDY, tried, TryAgain(Side.PREFILL, LOST))
    assert lost not in {ends(fleet.dispatch.first(GREEDY))[0] for _ in range(6)}
    fleet.now = SUSPECT_S
    assert lost in {ends(fleet.dispatch.first(GREEDY))[0] for _ in range(6)}


def test_a_replica_started_anew_is_innocent() -> None:
    fleet = Fleet(2, 1)
    tried = fleet.dispatch.first(GREEDY)
    fleet.dispatch.again(GREEDY, tried, TryAgain(Side.PREFILL, LOST))
    fleet.restart(str(ends(tried)[0]))
    assert {ends(fleet.dispatch.first(GREEDY))[0] for _ in range(4)} == {"p0", "p1"}


def test_a_second_attempt_avoids_all_that_failed_lately() -> None:
    fleet = Fleet(3, 1)
    seen = []
    for _ in range(2):
        tried = fleet.dispatch.first(GREEDY)
        seen.append(ends(tried)[0])
        after = fleet.dispatch.again(GREEDY, tried, TryAgain(Side.PREFILL, LOST))
    assert len(set(seen)) == 2
    assert ends(after)[0] not in seen


def test_the_only_ones_are_used_however_suspect() -> None:
    fleet = Fleet(1, 1)
    tried = fleet.dispatch.first(GREEDY)
    same = fleet.dispatch.again(GREEDY, tried, TryAgain(Side.DECODE, LOST))
    assert ends(same) == ends(fleet.dispatch.first(GREEDY)) == ("p0", "d0")


@pytest.mark.parametrize("side", Side)
def test_a_full_queue_is_not_asked_twice_and_not_suspect(side: Side) -> None:
    fleet = Fleet(1, 1)
    tried = fleet.dispatch.first(GREEDY)
    with pytest.raises(Overloaded):
        fleet.dispatch.again(GREEDY, tried, TryAgain(side, Overloaded("full")))


@pytest.mark.parametrize("error", [LOST, EngineFailed("dead")])
def test_decode_moves_to_another_of_the_same_prefill(error: HexgenError) -> None:
    fleet = Fleet(2, 3)
    targets = fleet.dispatch.first(GREEDY)
    assert targets.decode is not None
    failed = frozenset({targets.decode.replica_id})
    other = fleet.dispatch.other_decode(targets, targets.decode, error, failed)
    assert other is not None
    assert other.replica_id not in failed
    assert fleet.dispatch.other_decode(targets, other, error, frozenset({"d0", "d1", "d2"})) is None


def test_without_a_decode_replica_a_flexible_prefill_replica_serves_whole_requests() -> None:
    fleet = Fleet(2, 1)
    fleet.plan = replace(fleet.plan, replicas=tuple(replace(each, flexible=True) for each in fleet.plan.replicas))
    tried = fleet.dispatch.first(GREEDY)
    for kv_was_there in (False, True):
        after = fleet.dispatch.again(GREEDY, tried, TryAgain(Side.DECODE, LOST), 0, kv_was_there)
        assert after.way is Way.COLOCATED
        assert ends(after)[1] in {"p0", "p1"}
    fleet.statuses["d0"] = ReplicaStatus("d0", ReplicaState.LOST, Load())
    assert fleet.dispatch.usable()
    assert ends(fleet.dispatch.first(GREEDY)) in {(None, "p0"), (None, "p1")}
    # What only refused for want of room is no reason to go round it.
    fleet = Fleet(2, 1)
    tried = fleet.dispatch.first(GREEDY)
    after = fleet.dispatch.again(GREEDY, tried, TryAgain(Side.DECODE, Overloaded("full")))
    assert (ends(after)[1], after.way) == ("d0", Way.HAND_OVER)
    assert ends(after)[0] != ends(tried)[0]


def test_what_runs_is_counted_until_it_ends() -> None:
    fleet = Fleet(1, 2)
    picked = []
    busy = fleet.dispatch.first(PENALISED)
    with fleet.dispatch.counted(busy):
        picked = [ends(fleet.dispatch.first(PENALISED))[1] for _ in range(2)]
    assert picked == ["d1", "d1"]
    assert ends(fleet.dispatch.first(PENALISED))[1] == "d0"


def test_what_other_gateways_have_in_flight_counts_as_well() -> None:
    fleet = Fleet(1, 2)
    others = {("p0", "d0"): 3}
    dispatch = Dispatch(fleet, lambda: fleet.now, lambda: others)
    with ExitStack() as running:
        for _ in range(2):
            targets = dispatch.first(GREEDY)
            running.enter_context(dispatch.counted(targets))
            assert ends(targets) == ("p0", "d1")
        assert dispatch.in_flight == {("p0", "d1"): 2}
    assert not dispatch.in_flight


def test_short_prompts_go_to_a_decode_replica_that_is_calm_and_no_other() -> None:
    fleet = Fleet(1, 2)
    fleet.plan = replace(fleet.plan, colocate_max_prompt_tokens=10)
    assert fleet.dispatch.first(GREEDY, 11).way is Way.HAND_OVER
    short = fleet.dispatch.first(GREEDY, 10)
    assert (short.way, ends(short), short.key) == (Way.COLOCATED, (None, "d0"), ("d0", "d0"))
    fleet.statuses["d0"] = ReplicaStatus("d0", ReplicaState.READY, Load(num_requests_waiting=1))
    assert ends(fleet.dispatch.first(GREEDY, 10)) == (None, "d1")
    fleet.statuses["d1"] = ReplicaStatus("d1", ReplicaState.READY, Load(0, 0, 9, 10))
    assert fleet.dispatch.first(GREEDY, 10).way is Way.HAND_OVER


def test_a_route_from_a_replica_to_itself_is_served_there_as_a_whole() -> None:
    fleet = Fleet(1, 1)
    whole = replace(fleet.plan.replica("d0"), replica_id="c0", role=Role.COLOCATED)
    fleet.plan = Plan(2, (*fleet.plan.replicas, whole), (Route("c0", "c0", 9.0), Route("p0", "d0", 1.0)))
    fleet.statuses["c0"] = ReplicaStatus("c0", ReplicaState.READY, Load())
    targets = fleet.dispatch.first(GREEDY)
    assert (targets.way, ends(targets), targets.key) == (Way.COLOCATED, (None, "c0"), ("c0", "c0"))
    handed = Targets(Way.HAND_OVER, 2, fleet.plan.replica("p0"), fleet.plan.replica("d0"), ("p0", "d0"))
    # A transfer that lost its decode replica cannot go to one that fetches nothing.
    assert fleet.dispatch.other_decode(handed, fleet.plan.replica("d0"), LOST, frozenset({"d0"})) is None


async def test_a_stale_epoch_waits_for_the_newer_plan() -> None:
    fleet = Fleet(1, 1)

    async def publish() -> None:
        fleet.plan = replace(fleet.plan, epoch=5)

    task = asyncio.create_task(publish())
    await fleet.dispatch.newer_plan(1, 10.0)
    await task
    targets = fleet.dispatch.again(GREEDY, fleet.dispatch.first(GREEDY), TryAgain(Side.PREFILL, StaleEpoch("old")))
    assert targets.plan_epoch == 5
    await fleet.dispatch.newer_plan(5, 0.0)


def test_nothing_ready_is_unavailable() -> None:
    fleet = Fleet(1, 1)
    fleet.statuses = {}
    assert not fleet.dispatch.usable()
    with pytest.raises(Unavailable):
        fleet.dispatch.first(GREEDY)
