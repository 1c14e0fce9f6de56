"""Routes share the reads of a peer, take over from each other, and leave no slot behind. Time is counted in turns."""

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hexgen2.kv.memory import MemoryNetwork, MemoryTransport
from hexgen2.kv.reads import Bundle, Claim, Reads
from tests.kv.read_job import Job

SLOT = 1 << 10
KIB_PER_TURN = 1 << 10
TURN_S = 0.001
STALL_S = 2.0


@dataclass
class Rig:
    """One peer and one reader, joined by a route for each entry of ``rates`` (bytes a turn)."""

    rates: Sequence[int | None]
    num_jobs: int = 256
    num_slots: int = 64
    net: MemoryNetwork = field(default_factory=MemoryNetwork)
    now: float = 0.0
    num_turns: int = 0
    #: Bundles that have landed and are looked at for longer than a turn.
    keep: int = 0
    #: Whether reads go to where their bytes are to stay, and whether they can be revoked then.
    direct: bool = False
    revocable: bool = True

    def __post_init__(self) -> None:
        self.send = torch.randint(0, 256, (self.num_jobs * SLOT,), dtype=torch.uint8)
        self.theirs = [MemoryTransport(self.net) for _ in self.rates]
        self.ours = [
            MemoryTransport(self.net, rate, direct=self.direct, revocable=self.revocable) for rate in self.rates
        ]
        for transport in self.theirs:
            transport.register(self.send, None)
        self.reads: Reads[Job] = Reads(
            self.ours,
            self.num_slots * SLOT,
            SLOT,
            torch.device("cpu"),
            STALL_S,
            lambda: self.now,
            stay_bytes=len(self.send) if self.direct else 0,
        )
        self.stay = self.reads.landing[self.reads.stays_from :]
        for number, transport in enumerate(self.ours):
            transport.local = str(number)
            transport.register(None, self.reads.landing)
        self.landed: Counter[int] = Counter()
        self.kept: deque[Bundle[Job]] = deque()
        self.lost: dict[int, str] = {}

    def add(self, claim: Claim, numbers: Sequence[int] | None = None, count: int = 1) -> None:
        peer, stays = tuple(each.endpoint() for each in self.theirs), self.reads.stays_from if self.direct else None
        for number in range(0, self.num_jobs, count) if numbers is None else numbers:
            self.reads.add(Job(number, claim, peer, SLOT, count, stays))

    def wipe(self, numbers: Iterable[int]) -> None:
        """Memory that nothing may write any more."""
        for number in numbers:
            self.stay[number * SLOT :][:SLOT] = 0

    def is_wiped(self, number: int) -> bool:
        return not self.stay[number * SLOT :][:SLOT].any()

    def turn(self) -> None:
        self.now += TURN_S
        self.num_turns += 1
        for bundle in self.reads.poll():
            for job, slots in bundle.pieces:
                for number, at in zip(job.numbers, self.reads.offsets(job, slots), strict=True):
                    assert torch.equal(self.reads.landing[at : at + SLOT], self.send[number * SLOT :][:SLOT])
                    self.landed[number] += 1
                if not slots:
                    self.wipe(job.numbers)
            self.kept.append(bundle)
        while len(self.kept) > self.keep:
            self.reads.free(self.kept.popleft())
        self.lost |= {number: why for job, why in self.reads.pump() for number in job.numbers}
        while self.reads.moved:
            self.lost |= {number: why for job, why in self.reads.pump() for number in job.numbers}

    def run(self, seconds: float = 60.0) -> int:
        """Turns until nothing is left to do."""
        began, end = self.num_turns, self.now + seconds
        while self.reads.busy:
            assert self.now < end, "the reads do not end"
            self.turn()
        return self.num_turns - began

    def wait(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            self.turn()

    def shares(self, claim: Claim) -> list[int]:
        return [
            use.num_bytes // SLOT if (use := claim.routes.get(f"memory/{i}")) else 0 for i in range(len(self.rates))
        ]

    @property
    def all_landed_once(self) -> bool:
        return self.landed == Counter(range(self.num_jobs)) and not self.lost


@pytest.mark.parametrize(
    ("rates", "slack"), [((4, 4), 1.1), ((8, 2), 1.15), ((16, 1), 1.2), ((4, 4, 4), 1.15)], ids=str
)
def test_routes_share_the_bytes_by_what_they_carry(rates: tuple[int, ...], slack: float) -> None:
    rig, claim = Rig([rate * SLOT for rate in rates], num_jobs=2048), Claim()
    rig.add(claim)
    turns = rig.run()
    assert rig.all_landed_once
    assert turns < slack * 2048 / sum(rates)
    for share, rate in zip(rig.shares(claim), rates, strict=True):
        assert share == pytest.approx(2048 * rate / sum(rates), rel=0.3, abs=64)


def test_a_route_known_to_be_slow_is_not_the_tail() -> None:
    rig = Rig([8 * SLOT, SLOT // 100])
    rig.add(Claim())
    rig.run()
    rig.landed.clear()
    rig.add(Claim())
    assert rig.run() < 1.2 * 256 / 8
    assert rig.all_landed_once


def test_what_a_slow_route_took_before_it_was_known_is_read_again() -> None:
    rig, claim = Rig([8 * SLOT, SLOT // 1000]), Claim()
    rig.add(claim)
    while rig.landed.total() < 256:
        assert rig.num_turns < 100
        rig.turn()
    assert rig.all_landed_once
    assert rig.reads.quarantine_bytes == SLOT, "its slot waits for the slow read"
    rig.run()
    assert rig.reads.quarantine_bytes == 0
    assert rig.all_landed_once


def test_a_route_that_dies_leaves_its_pieces_to_the_others() -> None:
    rig, claim = Rig([4 * SLOT, 4 * SLOT]), Claim()
    rig.add(claim)
    while min(rig.shares(claim)) < 20:
        rig.turn()
    rig.theirs[1].close()
    rig.run()
    assert rig.all_landed_once
    assert rig.shares(claim)[0] > rig.shares(claim)[1] >= 20


def test_without_any_route_the_pieces_are_lost_and_later_ones_at_once() -> None:
    rig = Rig([4 * SLOT, 4 * SLOT])
    rig.add(Claim())
    rig.turn()
    for transport in rig.theirs:
        transport.close()
    rig.run()
    assert rig.landed.total() + len(rig.lost) == 256
    assert "no peer" in rig.lost[255]
    rig.lost.clear()
    rig.add(Claim(), [7])
    rig.turn()
    assert rig.lost.keys() == {7}


def test_a_route_that_came_back_is_used_again() -> None:
    rig = Rig([None])
    rig.net.fail = 50
    rig.add(Claim())
    rig.run()
    assert rig.lost
    rig.net.fail = 0
    rig.wait(1.0)
    rig.lost.clear()
    rig.landed.clear()
    rig.add(Claim())
    rig.run()
    assert rig.all_landed_once


def test_a_silent_route_is_given_up_and_its_slots_wait_until_its_reads_are_over() -> None:
    rig, claim = Rig([4 * SLOT, 4 * SLOT]), Claim()
    rig.add(claim)
    while min(rig.shares(claim)) < 20:
        rig.turn()
    rig.ours[1].bytes_per_poll = 0
    end = rig.now + 2 * STALL_S
    while rig.landed.total() < 256 and rig.now < end:
        rig.turn()
    assert rig.all_landed_once
    held = rig.reads.quarantine_bytes
    assert held > 0
    rig.landed.clear()
    rig.add(Claim())
    rig.wait(1.0)
    assert rig.all_landed_once
    assert rig.reads.quarantine_bytes == held, "nothing more is asked of it"
    rig.ours[1].bytes_per_poll = None
    rig.run()
    assert rig.reads.quarantine_bytes == 0


def test_the_only_route_fallen_silent_loses_the_transfer() -> None:
    rig = Rig([0])
    rig.add(Claim())
    rig.wait(STALL_S + 1)
    assert len(rig.lost) == 256
    assert set(rig.lost.values()) == {"no byte for 2 s"}


def test_quarantine_that_holds_every_slot_sends_others_elsewhere() -> None:
    rig, claim = Rig([0], num_slots=4), Claim()
    for number in range(4):  # four peers of two slots each at most
        peer = MemoryTransport(rig.net)
        peer.register(rig.send, None)
        rig.reads.add(Job(number, claim, (peer.endpoint(),), SLOT))
        rig.reads.add(Job(number, claim, (peer.endpoint(),), SLOT))
    rig.turn()
    rig.reads.drop(claim)
    assert rig.reads.quarantine_bytes == 4 * SLOT
    rig.add(Claim(), [9])
    rig.wait(STALL_S + 1)
    assert rig.lost == {9: f"all {4 * SLOT} bytes of landing memory are in quarantine"}


def test_a_reader_that_was_stopped_does_not_take_its_peers_for_silent() -> None:
    rig = Rig([SLOT])
    rig.add(Claim())
    rig.turn()
    rig.now += 100.0
    rig.run()
    assert rig.all_landed_once


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("turn"), st.integers(1, 40)),
        st.tuples(st.just("wait"), st.integers(1, 4)),
        st.tuples(st.just("add"), st.integers(1, 60)),
        st.tuples(st.just("drop"), st.integers(0, 3)),
        st.tuples(st.just("rate"), st.tuples(st.integers(0, 2), st.sampled_from([0, 100, SLOT, 9 * SLOT]))),
        st.tuples(st.just("fail"), st.integers(1, 4)),
        st.tuples(st.just("keep"), st.integers(0, 3)),
        st.tuples(st.just("close"), st.integers(0, 2)),
    ),
    max_size=25,
)


def test_a_long_job_is_read_in_parts_where_slots_are_few() -> None:
    rig, claim = Rig([8 * SLOT], num_slots=6), Claim()
    rig.add(claim, count=64)
    rig.run()
    assert rig.all_landed_once
    assert sorted(rig.reads._slots) == list(range(6))


@pytest.mark.parametrize("count", [1, 7])
def test_direct_reads_need_no_slot_and_routes_share_them_as_well(count: int) -> None:
    # Many times what a route may hold.
    num_jobs = 35_000
    rig, claim = Rig([256 * SLOT, 64 * SLOT], num_jobs=num_jobs, num_slots=1, direct=True), Claim()
    rig.add(claim, count=count)
    assert rig.run() < 1.2 * num_jobs / 320
    assert rig.all_landed_once
    assert claim.num_direct == 0
    assert not rig.stay.any(), "something was written after it had landed"


def test_what_is_dropped_is_written_no_more_where_reads_can_be_revoked() -> None:
    rig, claim = Rig([SLOT], direct=True), Claim()
    rig.add(claim)
    rig.turn()
    assert claim.num_direct > 0
    rig.reads.drop(claim)
    assert claim.num_direct == 0
    rig.wipe(range(256))
    rig.run()
    assert not rig.stay.any()


def test_what_is_dropped_may_be_written_until_its_reads_are_over_where_they_cannot() -> None:
    rig, claim = Rig([SLOT], direct=True, revocable=False), Claim()
    rig.add(claim)
    rig.turn()
    rig.reads.drop(claim)
    assert claim.num_direct > 0
    rig.run()
    assert claim.num_direct == 0
    assert not rig.landed


@settings(max_examples=150, deadline=None)
@given(
    steps=STEPS,
    num_slots=st.integers(1, 12),
    how_direct=st.sampled_from([(False, True), (True, True), (True, False)]),
    in_runs=st.booleans(),
)
def test_whatever_happens_each_wanted_piece_lands_or_is_lost_and_every_slot_comes_back(
    steps: list[tuple[str, object]], num_slots: int, how_direct: tuple[bool, bool], in_runs: bool
) -> None:
    direct, revocable = how_direct
    rig = Rig([SLOT, 3 * SLOT, None], num_slots=num_slots, direct=direct, revocable=revocable)
    claims: list[Claim] = []
    number = 0
    owners: dict[int, Claim] = {}
    for what, how in steps:
        match what, how:
            case "turn", int(count):
                for _ in range(count):
                    rig.turn()
            case "wait", int(seconds):
                rig.now += seconds
                rig.turn()
            case "add", int(count):
                claim = Claim()
                claims.append(claim)
                numbers = range(number, min(number + count, rig.num_jobs))
                owners |= dict.fromkeys(numbers, claim)
                if in_runs and numbers:
                    rig.add(claim, [number], len(numbers))
                else:
                    rig.add(claim, numbers)
                number = numbers.stop
            case "drop", int(which) if which < len(claims):
                rig.reads.drop(claims[which])
                if direct and revocable:
                    assert claims[which].num_direct == 0
                    rig.wipe(each for each, owner in owners.items() if owner is claims[which])
            case "rate", (int(which), int(rate)):
                rig.ours[which].bytes_per_poll = rate
            case "fail", int(count):
                rig.net.fail = count
            case "keep", int(count):
                rig.keep = count
            case "close", int(which):
                rig.theirs[which].close()
            case _:
                pass
    rig.net.fail = rig.keep = 0
    for transport in rig.ours:
        transport.bytes_per_poll = None
    rig.run()
    rig.turn()
    for each, claim in owners.items():
        if claim.wanted:
            assert rig.landed[each] + (each in rig.lost) == 1, each
        assert rig.landed[each] <= 1
    assert all(claim.num_slots == claim.num_direct == 0 for claim in claims)
    if direct and revocable:
        assert all(rig.is_wiped(each) for each in owners if rig.landed[each] or not owners[each].wanted)
    assert rig.reads.quarantine_bytes == 0
    assert sorted(rig.reads._slots) == list(range(num_slots))
