from dataclasses import replace

import pytest

from hexgen2.engine.base import FinishReason, SampledToken
from hexgen2.errors import DeadlineExceeded, HexgenError, KvCorrupt, TransferEnded, TransferRefused, Unavailable
from hexgen2.kv.handoff import FirstToken, Header, Offer, header_for
from hexgen2.kv.layout import rank_slices
from hexgen2.kv.messages import Piece, Source
from hexgen2.kv.receiving import MAX_FETCHES, RecvState, RecvTransfer
from hexgen2.kv.wire import KvShape, prompt_sha256

SHAPE = KvShape(num_layers=2, num_kv_heads=2, head_dim=8, dtype="float32")
HEADER = header_for(b"m" * 32, prompt_sha256((1, 2, 3)), 130, SHAPE, "tcp")
SOURCE = Source(rank_slices([2], 2, 1)[0], (b"endpoint",), (0, 4096))
OFFER = Offer(HEADER, (SOURCE,))
PIECES = tuple(Piece(0, layer, chunk, (layer, chunk)) for layer in range(2) for chunk in range(2))
FIRST = FirstToken(SampledToken(7), None, 0)
LOST = Unavailable("connection lost")


def receiving(num_ranks: int = 2) -> RecvTransfer:
    recv = RecvTransfer(HEADER, num_ranks, deadline=100.0)
    recv.offered(OFFER)
    assert recv.opened() == ()
    return recv


def test_verified_and_loaded_only_when_every_rank_says_so() -> None:
    recv = receiving()
    assert recv.ready(PIECES) == PIECES
    seen: list[RecvState] = []
    steps = [(recv.fetched, 0), (recv.fetched, 0), (recv.loaded, 1), (recv.fetched, 1)]
    for step, rank in [*steps, (recv.loaded, 0), (recv.loaded, 0), (recv.loaded, 1)]:
        step(rank)
        seen.append(recv.state)
    assert seen == [RecvState.FETCHING] * 3 + [RecvState.VERIFIED] * 3 + [RecvState.LOADED]


def test_it_is_settled_with_the_first_token_and_all_kv_in_any_order() -> None:
    for first_comes_first in (True, False):
        recv = receiving(num_ranks=1)
        for step in (True, False):
            assert not recv.settled
            if step is first_comes_first:
                recv.sampled(FIRST)
            else:
                recv.fetched(0)
        assert recv.settled
        assert recv.error is None


def test_a_final_first_token_settles_it_whatever_is_still_on_its_way() -> None:
    recv = RecvTransfer(HEADER, num_ranks=1)
    recv.sampled(FirstToken(SampledToken(7), FinishReason.STOP, 0))
    assert recv.settled
    assert recv.error is None
    recv.offered(OFFER)
    assert recv.ready(PIECES) == ()
    assert recv.wanted() is None


def test_pieces_that_come_before_staging_is_held_are_fetched_once_it_is() -> None:
    recv = RecvTransfer(HEADER, num_ranks=1)
    recv.offered(OFFER)
    assert recv.wanted() is None
    assert recv.ready(PIECES[:2]) == ()
    # Only now, and once.
    assert recv.wanted() is OFFER
    assert recv.ready(PIECES[:1]) == ()
    assert recv.wanted() is None
    assert recv.opened() == PIECES[:2]
    assert recv.opened() == ()
    assert recv.ready(PIECES) == PIECES[2:]


@pytest.mark.parametrize(
    ("field", "changed"),
    [
        ("model", replace(HEADER, model_sha256=b"x" * 32)),
        ("prompt", replace(HEADER, prompt_sha256=prompt_sha256((1, 2, 4)))),
        ("prompt_tokens", replace(HEADER, num_tokens=129)),
        ("num_layers", replace(HEADER, shape=replace(SHAPE, num_layers=3))),
        ("num_kv_heads", replace(HEADER, shape=replace(SHAPE, num_kv_heads=4))),
        ("head_dim", replace(HEADER, shape=replace(SHAPE, head_dim=16))),
        ("dtype", replace(HEADER, shape=replace(SHAPE, dtype="float8"))),
        ("codec", replace(HEADER, codec="int8")),
        ("chunk_tokens", replace(HEADER, chunk_tokens=64)),
        ("transport", replace(HEADER, transport="ucx")),
    ],
)
def test_what_was_not_asked_for_is_refused_by_name(field: str, changed: Header) -> None:
    recv = RecvTransfer(HEADER, num_ranks=1)
    recv.offered(replace(OFFER, header=changed))
    assert isinstance(recv.error, TransferRefused)
    assert str(recv.error).startswith(f"{field} differs")
    assert recv.state is RecvState.REFUSED
    assert recv.ready(PIECES) == recv.opened() == ()
    assert recv.wanted() is None


@pytest.mark.parametrize(
    ("field", "sources"),
    [
        ("ranks", ()),
        ("ranks", (SOURCE, SOURCE)),
        ("page_offsets", (Source(SOURCE.slice, (b"endpoint",), (0,)),)),
        (
            "ranks: no sending rank holds layer 0, KV head 1",
            (Source(rank_slices([2], 2, 2)[0], (b"endpoint",), (0, 4096)),),
        ),
    ],
    ids=str,
)
def test_sources_that_do_not_add_up_are_refused(field: str, sources: tuple[Source, ...]) -> None:
    recv = RecvTransfer(HEADER, num_ranks=1)
    recv.offered(Offer(HEADER, sources))
    assert str(recv.error).startswith(field)


@pytest.mark.parametrize(
    "piece", [Piece(1, 0, 0, (1, 2)), Piece(0, 2, 0, (1, 2)), Piece(0, 0, 2, (1, 2)), Piece(0, 0, 0, (1,))]
)
def test_pieces_that_cannot_be_are_refused(piece: Piece) -> None:
    recv = receiving()
    assert recv.ready((*PIECES[:1], piece)) == ()
    assert isinstance(recv.error, TransferRefused)


def test_a_repeated_piece_is_ignored_and_one_whose_digests_changed_is_refused() -> None:
    recv = receiving()
    recv.ready(PIECES[:1])
    assert recv.ready(PIECES[:2]) == PIECES[1:2]
    recv.ready([Piece(0, 0, 0, (7, 7))])
    assert "changed" in str(recv.error)


def test_an_offer_may_come_again_but_not_another() -> None:
    recv = receiving()
    recv.offered(OFFER)
    assert recv.error is None
    recv.offered(Offer(HEADER, (replace_endpoint(SOURCE, b"another"),)))
    assert str(recv.error) == "offer: changed during the transfer"


def replace_endpoint(source: Source, endpoint: bytes) -> Source:
    return Source(source.slice, (endpoint,), source.page_offsets)


def test_nothing_of_a_failed_transfer_is_ever_verified_and_the_first_reason_counts() -> None:
    recv = receiving()
    recv.ready(PIECES)
    recv.fail(KvCorrupt("a digest differs"))
    recv.fail(LOST)
    recv.fetched(0)
    recv.fetched(1)
    recv.end()
    assert recv.state is RecvState.REFUSED
    assert isinstance(recv.error, KvCorrupt)


def test_kv_that_is_lost_after_it_was_verified_is_not_loaded_but_loaded_kv_stays() -> None:
    recv = receiving(num_ranks=1)
    recv.fetched(0)
    recv.fail(LOST)
    recv.loaded(0)
    assert recv.state is RecvState.ABORTED
    recv = receiving(num_ranks=1)
    recv.fetched(0)
    recv.loaded(0)
    recv.fail(LOST)
    recv.end()
    assert (recv.state, recv.error) == (RecvState.LOADED, None)


def test_a_broken_connection_is_worth_another_fetch_a_bounded_number_of_times() -> None:
    recv = receiving()
    answers = [recv.fetch_ended(LOST) for _ in range(MAX_FETCHES)]
    assert answers == [True] * (MAX_FETCHES - 1) + [False]
    assert recv.error is LOST


@pytest.mark.parametrize("end", [None, TransferEnded("over"), TransferRefused("no")], ids=str)
def test_an_end_by_prefill_itself_is_final(end: HexgenError | None) -> None:
    recv = receiving()
    assert not recv.fetch_ended(end)
    assert recv.error is not None
    assert recv.error is end or end is None


def test_the_end_of_fetch_kv_changes_nothing_of_what_is_settled() -> None:
    recv = receiving(num_ranks=1)
    recv.sampled(FIRST)
    recv.fetched(0)
    assert not recv.fetch_ended(LOST)
    assert recv.error is None


def test_the_deadline_ends_it_but_not_what_is_loaded() -> None:
    recv = receiving(num_ranks=1)
    seen = []
    for now in (99.9, 100.0):
        recv.expire(now)
        seen.append((type(recv.error), recv.settled))
    assert seen == [(type(None), False), (DeadlineExceeded, True)]
    recv = receiving(num_ranks=1)
    recv.fetched(0)
    recv.loaded(0)
    recv.expire(100.0)
    assert recv.error is None


def test_a_piece_of_several_chunks_is_fetched_at_once_but_for_what_is_known() -> None:
    recv = RecvTransfer(HEADER, 1)
    recv.offered(OFFER)
    whole = Piece(0, 1, 0, (1, 0, 1, 1))
    assert recv.ready([PIECES[1], whole]) == ()
    assert recv.opened() == (PIECES[1], whole)
    assert recv.ready([Piece(0, 0, 0, (0, 0, 0, 1)), whole]) == (PIECES[0],)
    assert recv.error is None
    recv.ready([Piece(0, 1, 0, (1, 0, 9, 9))])
    assert "layer 1, chunk 1 changed" in str(recv.error)


@pytest.mark.parametrize("piece", [Piece(0, 0, 1, (1, 2, 3, 4)), Piece(0, 0, 0, (1, 2, 3)), Piece(0, 0, 0, ())])
def test_chunks_that_cannot_be_are_refused(piece: Piece) -> None:
    recv = receiving()
    recv.ready([piece])
    assert recv.state is RecvState.REFUSED
