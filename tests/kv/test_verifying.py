"""Verification in a thread of its own: nothing is lost, nothing runs twice at once, no page is given back under it."""

from threading import Event, get_ident

import pytest
import torch

from hexgen2.kv import staging as staging_module
from hexgen2.kv.memory import MemoryNetwork, MemoryTransport
from hexgen2.kv.messages import Fetched, OpenRecv, Source, ToService
from hexgen2.kv.pieces import PieceFormat
from hexgen2.kv.send_buffer import SendBuffer
from hexgen2.kv.staging import Staging
from hexgen2.kv.verifying import Verifier
from hexgen2.kv.wire import CHUNK_TOKENS, KvShape, PageLayout, RankSlice
from tests.kv.fleet import random_kv, sent_pieces

LIMIT_S = 30.0


class Work:
    """Squares numbers, one at a time, when it is let."""

    def __init__(self) -> None:
        self.may_go, self.woken = Event(), Event()
        self.threads: list[int] = []
        self.running = False
        self.may_go.set()

    def __call__(self, number: int) -> int:
        assert self.may_go.wait(LIMIT_S)
        assert not self.running
        self.running = True
        self.threads.append(get_ident())
        self.running = False
        if number < 0:
            raise ValueError(str(number))
        return number * number

    def collected(self, verifier: "Verifier[int, int]", count: int) -> list[tuple[int, int]]:
        got = verifier.collect()
        while len(got) < count:
            assert self.woken.wait(LIMIT_S)
            self.woken.clear()
            got += verifier.collect()
        return got


def test_all_comes_back_in_order_from_the_thread() -> None:
    work = Work()
    verifier = Verifier(work, work.woken.set)
    for number in range(100):
        verifier.give(number, here=False)
    assert work.collected(verifier, 100) == [(number, number * number) for number in range(100)]
    assert get_ident() not in work.threads
    verifier.stop()
    verifier.stop()


def test_small_work_is_done_at_once_unless_the_thread_is_at_work() -> None:
    work = Work()
    verifier = Verifier(work, work.woken.set)
    verifier.give(3, here=True)
    assert work.threads == [get_ident()]
    assert verifier.collect() == [(3, 9)]
    work.may_go.clear()
    verifier.give(4, here=False)
    verifier.give(5, here=True)
    assert work.threads == [get_ident()], "it waits for the thread"
    work.may_go.set()
    assert work.collected(verifier, 2) == [(4, 16), (5, 25)]
    assert get_ident() not in work.threads[1:]
    verifier.stop()


@pytest.mark.parametrize("here", [True, False])
def test_who_collects_hears_of_a_failure(here: bool) -> None:
    work = Work()
    verifier = Verifier(work, work.woken.set)

    def all_of_it() -> None:
        verifier.give(-1, here=here)
        work.collected(verifier, 1)

    with pytest.raises(ValueError, match="-1"):
        all_of_it()
    verifier.stop()


@pytest.mark.parametrize("num_bytes", [1 << 20, 3 << 20])
def test_what_is_sent_is_what_is_staged_in_small_buffers_and_in_large_ones(num_bytes: int) -> None:
    """Large ones are on huge pages."""
    shape, slice_ = KvShape(2, 2, 8, "float32"), RankSlice(0, 0, 2, 0, 2)
    layout, cpu = PageLayout(shape, slice_), torch.device("cpu")
    network = MemoryNetwork()
    ours, theirs = MemoryTransport(network), MemoryTransport(network)
    send = SendBuffer(layout, num_bytes, cpu)
    staging = Staging(layout, (ours,), cpu, staging_bytes=num_bytes, landing_bytes=num_bytes, stall_s=1e6)
    theirs.register(send.buffer, None)
    ours.register(None, staging.reads.landing)
    for tensor in (send.buffer, staging.reads.landing):
        assert tensor.storage_offset() == 0
        assert tensor.is_contiguous()
    num_tokens = 2 * CHUNK_TOKENS + 5
    kv = random_kv(shape, num_tokens, seed=2)
    send.open("a", b"t" * 16, num_tokens, "none", (0, 4, 2))
    offsets = tuple(page * layout.page_bytes for page in (0, 4, 2))
    source = Source(slice_, (theirs.endpoint(),), offsets)
    staging.open(OpenRecv("a", b"t" * 16, num_tokens, "none", shape.dtype, (5, 1, 3), (source,)))
    staging.fetch("a", sent_pieces(send, "a", kv))
    messages: list[ToService] = []
    while not messages:
        messages = staging.turn()
    staged = staging.staged("a")
    assert staged is not None
    assert all(torch.equal(staged.layer(layer), kv[layer]) for layer in range(2))


def test_pages_are_not_given_back_while_the_thread_writes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, slice_ = KvShape(2, 1, 8, "float32"), RankSlice(0, 0, 2, 0, 1)
    layout, cpu = PageLayout(shape, slice_), torch.device("cpu")
    may_go, woken, entered = Event(), Event(), Event()
    move = PieceFormat.move

    def slow_move(*args: object) -> list[int] | None:
        entered.set()
        assert may_go.wait(LIMIT_S)
        return move(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(PieceFormat, "move", slow_move)
    monkeypatch.setattr(staging_module, "_HERE_BYTES", 0)
    network = MemoryNetwork()
    ours, theirs = MemoryTransport(network), MemoryTransport(network)
    send = SendBuffer(layout, 4 * layout.page_bytes, cpu)
    # Two slots: while the first pieces are verified, others wait to be read.
    staging = Staging(
        layout,
        (ours,),
        cpu,
        staging_bytes=4 * layout.page_bytes,
        landing_bytes=2 * layout.slot_bytes,
        stall_s=1e6,
        wake=woken.set,
    )
    theirs.register(send.buffer, None)
    ours.register(None, staging.reads.landing)
    num_tokens = 2 * CHUNK_TOKENS
    kv = random_kv(shape, num_tokens, seed=1)
    offsets = (0, layout.page_bytes)
    for transfer in ("a", "b"):
        send.open(transfer, b"t" * 16, num_tokens, "none", (0, 1))
        pieces = sent_pieces(send, transfer, kv)
        source = Source(slice_, (theirs.endpoint(),), offsets)
        staging.open(OpenRecv(transfer, b"t" * 16, num_tokens, "none", shape.dtype, (2, 3), (source,)))
        staging.fetch(transfer, pieces)
        messages: list[ToService] = []
        if transfer == "a":
            while not entered.is_set():
                assert not staging.turn()
            assert not staging.close("a"), "its pages are being written"
            assert staging.reads.quarantine_bytes > 0
            may_go.set()
            while not staging.close("a"):
                assert woken.wait(LIMIT_S)
                woken.clear()
                assert not staging.turn()
            assert staging.reads.quarantine_bytes == 0
        else:
            while not messages:
                messages = staging.turn()
            assert [type(each) for each in messages] == [Fetched]
            staged = staging.staged("b")
            assert staged is not None
            assert all(torch.equal(staged.layer(layer), kv[layer]) for layer in range(2))
    staging.stop()
