"""The agents of two replicas, their hubs and a hand-off between them, over the in-memory transport."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hexgen2.errors import ConfigError, EngineFailed
from hexgen2.kv.agent import KvAgent, count
from hexgen2.kv.layout import rank_slices
from hexgen2.kv.memory import MemoryNetwork, MemoryTransport
from hexgen2.kv.messages import Failed, Fetched, Loaded, Piece, Ready
from hexgen2.kv.ranks import Event, Ranks
from hexgen2.kv.wire import KvShape, num_chunks
from hexgen2.metrics import RECOMPUTED_TOKENS
from tests.eventually import eventually
from tests.kv.fleet import DEADLINE_S, TOKEN, Inbox, Replica, memory, random_kv, replica

SHAPE = KvShape(num_layers=3, num_kv_heads=4, head_dim=8, dtype="float32")


def ready_pieces(events: list[Event], num_heads: int = SHAPE.num_kv_heads) -> tuple[Piece, ...]:
    """Chunk by chunk."""
    ready = [piece for event in events if isinstance(event, Ready) for piece in event.pieces]
    return tuple(each for piece in ready for each in piece.by_chunk(num_heads))


async def send_all(sender: Replica, transfer_id: str, kv: torch.Tensor) -> tuple[tuple[int, ...], tuple[Piece, ...]]:
    pages = tuple(range(num_chunks(kv.shape[3])))
    inbox = Inbox()
    await sender.hub.open_send(transfer_id, TOKEN, kv.shape[3], "none", pages, inbox)
    await asyncio.to_thread(sender.put, transfer_id, kv)
    expected = len(pages) * sum(s.num_layers for s in sender.slices)
    num_heads = sender.slices[0].num_kv_heads
    events = await inbox.wait(lambda events: len(ready_pieces(events, num_heads)) == expected)
    return pages, ready_pieces(events, num_heads)


async def receive(
    receiver: Replica, sender: Replica, transfer_id: str, num_tokens: int, pages: tuple[int, ...], inbox: Inbox
) -> None:
    mine = tuple(reversed(range(num_chunks(num_tokens))))
    await receiver.hub.open_recv(
        transfer_id, TOKEN, num_tokens, "none", receiver.shape.dtype, mine, sender.sources(pages), inbox
    )


def all_of(kind: type[Event], ranks: int) -> Callable[[list[Event]], bool]:
    return lambda events: sum(isinstance(e, kind) for e in events) == ranks


def assembled(receiver: Replica, transfer_id: str, num_tokens: int) -> torch.Tensor:
    kv = torch.full((SHAPE.num_layers, SHAPE.num_kv_heads, 2, num_tokens, SHAPE.head_dim), torch.nan)
    kv = kv.to(getattr(torch, receiver.shape.dtype))
    for agent, part in zip(receiver.agents, receiver.slices, strict=True):
        staged = agent.staged(transfer_id)
        assert staged is not None
        assert staged.num_tokens == num_tokens
        heads = slice(part.first_kv_head, part.first_kv_head + part.num_kv_heads)
        for layer in part.layers:
            kv[layer, heads] = staged.layer(layer)
        agent.loaded(transfer_id)
    return kv


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (([3], 1), ([3], 1)),
        (([3], 1), ([3], 2)),
        (([3], 4), ([3], 1)),
        (([3], 2), ([3], 8)),
        (([1, 2], 1), ([3], 1)),
        (([3], 1), ([2, 1], 2)),
        (([2, 1], 4), ([1, 1, 1], 2)),
    ],
    ids=str,
)
@pytest.mark.parametrize("num_tokens", [1, 128, 300])
async def test_kv_arrives_equal_whatever_the_ranks_on_both_sides(
    source: tuple[list[int], int], target: tuple[list[int], int], num_tokens: int
) -> None:
    net = MemoryNetwork()
    kv = random_kv(SHAPE, num_tokens)
    p = rank_slices(source[0], SHAPE.num_kv_heads, source[1])
    d = rank_slices(target[0], SHAPE.num_kv_heads, target[1])
    async with (
        replica(p, SHAPE, memory(net), send_pages=3) as sender,
        replica(d, SHAPE, memory(net), staging_pages=3, landing_slots=4) as receiver,
    ):
        pages, pieces = await send_all(sender, "t", kv)
        inbox = Inbox()
        await receive(receiver, sender, "t", num_tokens, pages, inbox)
        for piece in pieces:
            receiver.hub.fetch("t", (piece,))
        events = await inbox.wait(all_of(Fetched, len(d)))
        moved = sum(e.num_bytes for e in events if isinstance(e, Fetched))
        assert moved == sum(s.num_layers * s.num_kv_heads for s in d) * 2 * SHAPE.head_dim * 4 * num_tokens
        assert torch.equal(assembled(receiver, "t", num_tokens), kv)
        await inbox.wait(all_of(Loaded, len(d)))
        async with asyncio.timeout(DEADLINE_S):
            await receiver.hub.close("t")
            await sender.hub.close("t")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
async def test_other_dtypes_arrive_equal(dtype: str) -> None:
    shape = KvShape(SHAPE.num_layers, SHAPE.num_kv_heads, SHAPE.head_dim, dtype)
    net = MemoryNetwork()
    kv = random_kv(shape, 200)
    one = rank_slices([3], 4, 1)
    async with (
        replica(one, shape, memory(net), send_pages=2) as sender,
        replica(one, shape, memory(net), staging_pages=2) as receiver,
    ):
        pages, pieces = await send_all(sender, "t", kv)
        inbox = Inbox()
        await receive(receiver, sender, "t", 200, pages, inbox)
        receiver.hub.fetch("t", pieces)
        await inbox.wait(all_of(Fetched, 1))
        assert torch.equal(assembled(receiver, "t", 200), kv)


ONE = rank_slices([3], 4, 1)


async def test_a_flipped_bit_is_refused_and_never_staged() -> None:
    net = MemoryNetwork(corrupt=1)
    async with (
        replica(ONE, SHAPE, memory(net), send_pages=2) as sender,
        replica(ONE, SHAPE, memory(net), staging_pages=2) as receiver,
    ):
        pages, pieces = await send_all(sender, "t", random_kv(SHAPE, 200))
        inbox = Inbox()
        await receive(receiver, sender, "t", 200, pages, inbox)
        receiver.hub.fetch("t", pieces)
        events = await inbox.wait(all_of(Failed, 1))
        failed = next(e for e in events if isinstance(e, Failed))
        assert failed.reason == "corrupt"
        assert "digest mismatch at layer" in failed.detail
        assert receiver.agents[0].staged("t") is None


async def test_kv_of_another_transfer_is_refused_though_it_is_whole() -> None:
    """Two transfers swapped: the right digests of the wrong pages."""
    net = MemoryNetwork()
    async with (
        replica(ONE, SHAPE, memory(net), send_pages=4) as sender,
        replica(ONE, SHAPE, memory(net), staging_pages=4) as receiver,
    ):
        inbox_a, inbox_b = Inbox(), Inbox()
        await sender.hub.open_send("a", TOKEN, 100, "none", (0,), inbox_a)
        await sender.hub.open_send("b", TOKEN, 100, "none", (1,), inbox_b)
        await asyncio.to_thread(sender.put, "a", random_kv(SHAPE, 100, seed=1))
        await asyncio.to_thread(sender.put, "b", random_kv(SHAPE, 100, seed=2))
        pieces = ready_pieces(await inbox_a.wait(lambda events: len(ready_pieces(events)) == 3))
        inbox = Inbox()
        await receiver.hub.open_recv("a", TOKEN, 100, "none", receiver.shape.dtype, (0,), sender.sources((1,)), inbox)
        receiver.hub.fetch("a", pieces)
        events = await inbox.wait(all_of(Failed, 1))
        assert [e.reason for e in events if isinstance(e, Failed)] == ["corrupt"]


async def test_a_read_that_fails_again_is_reported_as_lost() -> None:
    net = MemoryNetwork(fail=2)
    async with (
        replica(ONE, SHAPE, memory(net), send_pages=2) as sender,
        replica(ONE, SHAPE, memory(net), staging_pages=2) as receiver,
    ):
        pages, pieces = await send_all(sender, "t", random_kv(SHAPE, 200))
        inbox = Inbox()
        await receive(receiver, sender, "t", 200, pages, inbox)
        receiver.hub.fetch("t", pieces)
        events = await inbox.wait(all_of(Failed, 1))
        assert [e.reason for e in events if isinstance(e, Failed)] == ["lost"]


async def test_a_read_that_fails_once_is_tried_again() -> None:
    net = MemoryNetwork(fail=1)
    kv = random_kv(SHAPE, 200)
    async with (
        replica(ONE, SHAPE, memory(net), send_pages=2) as sender,
        replica(ONE, SHAPE, memory(net), staging_pages=2) as receiver,
    ):
        pages, pieces = await send_all(sender, "t", kv)
        inbox = Inbox()
        await receive(receiver, sender, "t", 200, pages, inbox)
        receiver.hub.fetch("t", pieces)
        await inbox.wait(all_of(Fetched, 1))
        assert net.fail == 0
        assert torch.equal(assembled(receiver, "t", 200), kv)


async def test_several_routes_carry_one_transfer() -> None:
    net = MemoryNetwork()
    kv = random_kv(SHAPE, 300)
    async with (
        replica(ONE, SHAPE, memory(net), send_pages=3, num_routes=3) as sender,
        replica(ONE, SHAPE, memory(net), staging_pages=3, num_routes=2) as receiver,
    ):
        assert [len(s.endpoints) for s in sender.sources((0, 1, 2))] == [3]
        pages, pieces = await send_all(sender, "t", kv)
        inbox = Inbox()
        await receive(receiver, sender, "t", 300, pages, inbox)
        receiver.hub.fetch("t", pieces)
        events = await inbox.wait(all_of(Fetched, 1))
        fetched = next(e for e in events if isinstance(e, Fetched))
        assert sum(route.num_bytes for route in fetched.routes) == fetched.num_bytes
        assert all(0 < route.began_ns <= route.ended_ns for route in fetched.routes)
        assert torch.equal(assembled(receiver, "t", 300), kv)


async def test_slots_of_an_open_read_stay_in_quarantine_until_it_is_over() -> None:
    net = MemoryNetwork(drop=1)
    async with (
        replica(ONE, SHAPE, memory(net), send_pages=2) as sender,
        replica(ONE, SHAPE, memory(net), staging_pages=4, landing_slots=6) as receiver,
    ):
        kv = random_kv(SHAPE, 200)
        pages, pieces = await send_all(sender, "t", kv)
        inbox = Inbox()
        await receive(receiver, sender, "t", 200, pages, inbox)
        receiver.hub.fetch("t", pieces[:2])
        async with asyncio.timeout(DEADLINE_S):
            # Closing does not wait for the read: staging is private, only the landing slots must wait.
            await receiver.hub.close("t")
        await eventually(lambda: receiver.hub.quarantine_bytes > 0)
        again = Inbox()
        await receiver.hub.open_recv(
            "u", TOKEN, 200, "none", receiver.shape.dtype, (2, 3), sender.sources(pages), again
        )
        receiver.hub.fetch("u", pieces)
        await again.wait(all_of(Fetched, 1))
        net.release()
        await eventually(lambda: receiver.hub.quarantine_bytes == 0)
        staged = receiver.agents[0].staged("u")
        assert staged is not None
        assert torch.equal(staged.layer(0), kv[0])


async def test_pages_are_not_given_back_while_the_engine_copies_from_them() -> None:
    net = MemoryNetwork()
    async with (
        replica(ONE, SHAPE, memory(net), send_pages=2) as sender,
        replica(ONE, SHAPE, memory(net), staging_pages=2) as receiver,
    ):
        pages, pieces = await send_all(sender, "t", random_kv(SHAPE, 10))
        inbox = Inbox()
        await receive(receiver, sender, "t", 10, pages, inbox)
        receiver.hub.fetch("t", pieces)
        await inbox.wait(all_of(Fetched, 1))
        agent = receiver.agents[0]
        assert agent.staged("t") is not None
        closing = asyncio.create_task(receiver.hub.close("t"))
        done, _ = await asyncio.wait({closing}, timeout=0.1)
        assert not done
        assert agent.staged("t") is None
        agent.loaded("t")
        await asyncio.wait_for(closing, DEADLINE_S)


async def test_an_aborted_send_ignores_what_the_engine_still_makes() -> None:
    net = MemoryNetwork()
    async with replica(ONE, SHAPE, memory(net), send_pages=2) as sender:
        inbox = Inbox()
        await sender.hub.open_send("t", TOKEN, 10, "none", (0,), inbox)
        assert sender.agents[0].is_sending("t")
        await sender.hub.close("t")
        assert not sender.agents[0].is_sending("t")
        await asyncio.to_thread(sender.put, "t", random_kv(SHAPE, 10))
        await sender.hub.open_send("u", TOKEN, 10, "none", (0,), inbox)
        await asyncio.to_thread(sender.put, "u", random_kv(SHAPE, 10))
        events = await inbox.wait(lambda events: len(ready_pieces(events)) == 3)
        assert {e.transfer_id for e in events} == {"u"}


async def test_sources_that_do_not_cover_the_model_are_refused() -> None:
    net = MemoryNetwork()
    async with (
        replica(rank_slices([1], 4, 1), KvShape(1, 4, 8, "float32"), memory(net), send_pages=1) as sender,
        replica(ONE, SHAPE, memory(net), staging_pages=2) as receiver,
    ):
        inbox = Inbox()
        await receive(receiver, sender, "t", 10, (0,), inbox)
        events = await inbox.wait(all_of(Failed, 1))
        assert [e.reason for e in events if isinstance(e, Failed)] == ["invalid"]


async def test_when_an_agent_dies_whoever_waits_is_told() -> None:
    net = MemoryNetwork()
    async with replica(ONE, SHAPE, memory(net), send_pages=2) as sender:
        inbox = Inbox()
        await sender.hub.open_send("t", TOKEN, 10, "none", (0,), inbox)
        await asyncio.to_thread(sender.agents[0].close)
        assert "rank 0 is gone" in await asyncio.wait_for(sender.hub.lost(), DEADLINE_S)
        await inbox.wait(all_of(Failed, 1))
        with pytest.raises(EngineFailed):
            await sender.hub.open_send("u", TOKEN, 10, "none", (1,), inbox)
        await asyncio.wait_for(sender.hub.close("t"), DEADLINE_S)


async def test_counters_come_from_processes_without_an_agent(tmp_path: Path) -> None:
    hub = Ranks(tmp_path / "s", 1)
    await hub.start()
    before = RECOMPUTED_TOKENS._value.get()
    await asyncio.to_thread(count, hub.socket_path, (("recomputed_tokens", 7),))
    await eventually(lambda: RECOMPUTED_TOKENS._value.get() == before + 7)
    await hub.stop()


async def test_a_buffer_that_cannot_hold_one_page_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"kv\.send_bytes is 100; this model needs at least 98304 per rank"):
        KvAgent(
            tmp_path / "s",
            ONE[0],
            SHAPE,
            [MemoryTransport(MemoryNetwork())],
            device=torch.device("cpu"),
            send_bytes=100,
            staging_bytes=0,
            landing_bytes=0,
            stall_s=1.0,
        )


async def test_a_peer_that_answers_no_read_leaves_slots_to_the_others() -> None:
    stopped = MemoryNetwork(drop=1000)
    kv = random_kv(SHAPE, 300)
    async with (
        replica(ONE, SHAPE, memory(stopped), send_pages=3) as silent,
        replica(ONE, SHAPE, memory(stopped), send_pages=3) as lively,
        replica(ONE, SHAPE, memory(stopped), staging_pages=6, landing_slots=4) as receiver,
    ):
        pages, pieces = await send_all(silent, "s", kv)
        silent_inbox, lively_inbox = Inbox(), Inbox()
        await receive(receiver, silent, "s", 300, pages, silent_inbox)
        receiver.hub.fetch("s", pieces)
        # Once the silent peer's share of the slots is taken, reads go through again.
        await eventually(lambda: stopped.drop < 1000)
        stopped.drop = 0
        pages, pieces = await send_all(lively, "l", kv)
        await receiver.hub.open_recv(
            "l", TOKEN, 300, "none", receiver.shape.dtype, (3, 4, 5), lively.sources(pages), lively_inbox
        )
        receiver.hub.fetch("l", pieces)
        await lively_inbox.wait(all_of(Fetched, 1))
        assert receiver.agents[0].staged("s") is None
        stopped.release()
