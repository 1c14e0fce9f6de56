import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hexgen2.errors import KvTooLarge, Overloaded
from hexgen2.kv.pool import Grant, PagePool


def test_pages_are_served_in_the_order_of_asking_also_when_a_later_request_would_fit() -> None:
    pool = PagePool("send", 4, max_queued=8)
    assert pool.request("a", 3) is not None
    assert pool.request("b", 2) is None
    assert pool.request("c", 1) is None
    assert [g.key for g in pool.release("a")] == ["b", "c"]


def test_a_full_line_is_overload_and_more_than_the_pool_can_never_be() -> None:
    pool = PagePool("send", 2, max_queued=1)
    pool.request("a", 2)
    pool.request("b", 1)
    with pytest.raises(Overloaded):
        pool.request("c", 1)
    with pytest.raises(KvTooLarge, match="needs 3 pages of send, which has 2"):
        pool.request("d", 3)


def test_leaving_the_line_serves_who_is_behind() -> None:
    pool = PagePool("send", 2, max_queued=8)
    pool.request("a", 1)
    pool.request("b", 2)
    pool.request("c", 1)
    assert [g.key for g in pool.release("b")] == ["c"]


def test_who_waits_past_its_deadline_is_passed_over() -> None:
    pool = PagePool("send", 2, max_queued=8)
    pool.request("a", 2)
    for key, deadline in (("b", 5.0), ("c", 20.0), ("d", 5.0)):
        assert pool.request(key, 1, deadline) is None
    assert [g.key for g in pool.release("a", now=10.0)] == ["c"]
    assert (pool.num_used, pool.num_waiting) == (1, 0)


def test_whether_there_is_room_is_told_without_asking_for_it() -> None:
    pool = PagePool("send", 2, max_queued=1)
    pool.check(2)
    pool.request("a", 1)
    pool.check(2)
    pool.request("b", 2)
    with pytest.raises(Overloaded):
        pool.check(1)
    with pytest.raises(KvTooLarge):
        pool.check(3)
    assert pool.num_waiting == 1


class PoolMachine(RuleBasedStateMachine):
    """Any order of requests, releases and passing time."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool("p", 5, max_queued=3)
        self.held: dict[str, tuple[int, ...]] = {}
        self.line: list[tuple[str, float]] = []
        self.names = 0
        self.now = 0.0

    @rule(num_pages=st.integers(1, 5), patience=st.sampled_from([1.0, 5.0, 100.0]))
    def ask(self, num_pages: int, patience: float) -> None:
        self.names += 1
        key = str(self.names)
        try:
            grant = self.pool.request(key, num_pages, self.now + patience)
        except Overloaded:
            assert len(self.line) == 3
            return
        if grant is None:
            self.line.append((key, self.now + patience))
        else:
            assert not self.line
            self.take(grant, num_pages)

    @precondition(lambda self: self.held or self.line)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from([*self.held, *(key for key, _ in self.line)]))
        self.held.pop(key, None)
        self.line = [each for each in self.line if each[0] != key]
        for grant in self.pool.release(key, self.now):
            while self.line[0][1] <= self.now:
                self.line.pop(0)
            assert grant.key == self.line.pop(0)[0]
            self.take(grant, len(grant.pages))
        if self.pool.num_waiting < len(self.line):
            # Those at the head whose time is over have left.
            self.line = self.line[len(self.line) - self.pool.num_waiting :]
            assert self.pool.num_waiting == 0 or self.line[0][1] > self.now

    @rule(seconds=st.sampled_from([0.5, 3.0, 50.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    def take(self, grant: Grant, num_pages: int) -> None:
        assert len(grant.pages) == num_pages
        self.held[grant.key] = grant.pages

    @invariant()
    def no_page_is_held_twice_or_lost(self) -> None:
        held = [page for pages in self.held.values() for page in pages]
        assert len(held) == len(set(held)) == self.pool.num_used
        assert set(held) <= set(range(5))
        assert self.pool.num_waiting == len(self.line)


PoolMachine.TestCase.settings = settings(max_examples=50, deadline=None)
TestPool = PoolMachine.TestCase
