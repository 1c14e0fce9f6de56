from collections.abc import Callable

import pytest

from hexgen2.engine.base import FinishReason, SampledToken
from hexgen2.errors import DeadlineExceeded, EngineFailed, InvalidRequest, TransferEnded, TransferNotFound, Unavailable
from hexgen2.kv.handoff import FirstToken, Offer, header_for
from hexgen2.kv.layout import rank_slices
from hexgen2.kv.messages import Piece, Source
from hexgen2.kv.sending import Reader, SendState, SendTransfer, SendTransfers
from hexgen2.kv.wire import KvShape, prompt_sha256

SHAPE = KvShape(num_layers=2, num_kv_heads=2, head_dim=8, dtype="float32")
SLICES = rank_slices([2], 2, 1)
HEADER = header_for(b"m" * 32, prompt_sha256((1, 2, 3)), 130, SHAPE, "tcp")
SOURCES = (Source(SLICES[0], (b"endpoint",), (0, 4096)),)
PIECES = [Piece(0, layer, chunk, (layer, chunk)) for layer in range(2) for chunk in range(2)]
FIRST = FirstToken(SampledToken(7), None, 0)
TOKEN = bytes(range(32))


def sending(transfer_id: str = "t") -> SendTransfer:
    return SendTransfer(transfer_id, TOKEN, HEADER, SLICES, deadline=100.0)


def test_it_runs_from_queued_to_released() -> None:
    send = sending()
    seen = [send.state]
    steps: list[Callable[[], None]] = [
        lambda: send.hold(SOURCES),
        lambda: send.ready(PIECES[:1]),
        lambda: send.ready(PIECES),
        send.end,
    ]
    for step in steps:
        step()
        seen.append(send.state)
    assert seen == [SendState.QUEUED, SendState.HELD, SendState.PRODUCING, SendState.PRODUCED, SendState.RELEASED]
    assert send.pieces == PIECES


def test_a_call_that_ends_early_aborts_and_late_pieces_change_nothing() -> None:
    send = sending()
    send.hold(SOURCES)
    send.ready(PIECES[:2])
    send.end()
    send.ready(PIECES[2:])
    assert (send.state, len(send.pieces)) == (SendState.ABORTED, 2)


@pytest.mark.parametrize("piece", [Piece(1, 0, 0, ()), Piece(0, 2, 0, ()), Piece(0, 0, 2, ())], ids=str)
def test_a_rank_that_announces_what_it_has_not_fails_the_transfer(piece: Piece) -> None:
    send = sending()
    send.hold(SOURCES)
    send.ready([piece])
    assert isinstance(send.error, EngineFailed)
    assert send.pieces == []


def test_the_deadline_fails_it_and_the_first_reason_counts() -> None:
    send = sending()
    seen = [expired(send, now) for now in (99.0, 100.0)]
    send.fail(Unavailable("late"))
    assert [*seen, type(send.error)] == [type(None), DeadlineExceeded, DeadlineExceeded]


def expired(send: SendTransfer, now: float) -> type:
    send.expire(now)
    return type(send.error)


def test_a_reader_gets_the_offer_then_all_in_order_and_stays_while_the_kv_is_held() -> None:
    send = sending()
    early = Reader(send)
    assert early.next() is None
    send.hold(SOURCES)
    assert early.next() == Offer(HEADER, SOURCES)
    assert early.next() is None
    send.ready(PIECES[:3])
    assert early.next() == tuple(PIECES[:3])
    send.sampled(FIRST)
    assert early.next() == FIRST
    send.ready(PIECES)
    assert early.next() == tuple(PIECES[3:])
    assert early.next() is None
    late = Reader(send)
    assert [late.next() for _ in range(4)] == [Offer(HEADER, SOURCES), FIRST, tuple(PIECES), None]
    assert [early.over, late.over] == [False, False]
    send.end()
    assert [early.over, late.over] == [True, True]


def test_a_reader_of_what_ends_early_is_told() -> None:
    send = sending()
    send.hold(SOURCES)
    reader = Reader(send)
    reader.next()
    send.ready(PIECES[:2])
    send.end()
    with pytest.raises(TransferEnded, match="before all of it was sent"):
        reader.next()
    with pytest.raises(TransferEnded):
        Reader(send).next()


def test_a_final_first_token_is_the_last_word_also_when_the_call_is_over() -> None:
    send = sending()
    send.hold(SOURCES)
    reader = Reader(send)
    reader.next()
    final = FirstToken(SampledToken(7), FinishReason.STOP, 0)
    send.sampled(final)
    send.end()
    assert reader.next() == final
    assert reader.over


def test_an_id_serves_its_token_only_and_is_used_up_afterwards() -> None:
    sends, send = SendTransfers(), sending()
    assert sends.find("t", TOKEN, now=0.0, until=5.0) is None
    sends.open(send)
    assert sends.find("t", TOKEN, now=1.0, until=5.0) is send
    with pytest.raises(TransferNotFound):
        sends.find("t", bytes(32), now=1.0, until=5.0)
    with pytest.raises(InvalidRequest, match="under way"):
        sends.open(sending())
    send.end()
    with pytest.raises(TransferEnded, match="used up"):
        sends.find("t", TOKEN, now=1.0, until=5.0)
    sends.close("t")
    sends.close("t")
    with pytest.raises(TransferEnded, match="used up"):
        sends.find("t", TOKEN, now=1.0, until=5.0)
    with pytest.raises(TransferNotFound):
        sends.find("t", bytes(32), now=1.0, until=5.0)
    with pytest.raises(TransferEnded, match="used up"):
        sends.open(sending())
    assert len(sends) == 0


def test_what_never_comes_is_not_found_in_the_end() -> None:
    sends = SendTransfers()
    assert sends.find("t", TOKEN, now=4.9, until=5.0) is None
    with pytest.raises(TransferNotFound):
        sends.find("t", TOKEN, now=5.0, until=5.0)


def test_the_memory_of_ended_transfers_is_bounded() -> None:
    sends = SendTransfers(max_ended=2)
    for transfer_id in "abc":
        sends.open(sending(transfer_id))
        sends.close(transfer_id)
    assert sends.find("a", TOKEN, now=0.0, until=5.0) is None
    for transfer_id in "bc":
        with pytest.raises(TransferEnded):
            sends.find(transfer_id, TOKEN, now=0.0, until=5.0)


def test_a_piece_of_several_chunks_is_each_of_them_and_none_twice() -> None:
    send = sending()
    send.hold(SOURCES)
    send.ready([PIECES[1]])
    both = Piece(0, 0, 0, (0, 0, 0, 1))
    send.ready([both, Piece(0, 1, 0, (1, 0, 1, 1))])
    assert send.state is SendState.PRODUCED
    assert send.pieces == [PIECES[1], PIECES[0], Piece(0, 1, 0, (1, 0, 1, 1))]


@pytest.mark.parametrize("piece", [Piece(0, 0, 1, (1, 2, 3, 4)), Piece(0, 0, 0, (1, 2, 3))], ids=str)
def test_chunks_that_it_has_not_or_has_in_part_fail_the_transfer(piece: Piece) -> None:
    send = sending()
    send.hold(SOURCES)
    send.ready([piece])
    assert isinstance(send.error, EngineFailed)
    assert send.pieces == []
