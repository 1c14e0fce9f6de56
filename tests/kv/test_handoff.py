from dataclasses import replace

import pytest

from hexgen2.errors import TransferRefused
from hexgen2.kv.handoff import Header, RecvState, RecvTransfer, SendState, SendTransfer, header_for
from hexgen2.kv.layout import rank_slices
from hexgen2.kv.messages import Piece
from hexgen2.kv.wire import KvShape, prompt_sha256

SHAPE = KvShape(num_layers=2, num_kv_heads=2, head_dim=8, dtype="float32")
SLICES = rank_slices([2], 2, 1)
HEADER = header_for(b"m" * 32, prompt_sha256((1, 2, 3)), 130, SHAPE, "tcp")
PIECES = [Piece(0, layer, chunk, (layer, chunk)) for layer in range(2) for chunk in range(2)]


def test_sending_runs_from_queued_to_released() -> None:
    send = SendTransfer(HEADER, SLICES)
    seen = [send.state]
    send.hold()
    seen.append(send.state)
    send.ready(PIECES[:1])
    seen.append(send.state)
    send.ready(PIECES)
    seen.append(send.state)
    send.end()
    seen.append(send.state)
    assert seen == [
        SendState.QUEUED,
        SendState.HELD,
        SendState.PRODUCING,
        SendState.PRODUCED,
        SendState.RELEASED,
    ]
    assert send.pieces == PIECES


def test_a_call_that_ends_early_aborts_and_late_pieces_change_nothing() -> None:
    send = SendTransfer(HEADER, SLICES)
    send.hold()
    send.ready(PIECES[:2])
    send.end()
    send.ready(PIECES[2:])
    assert (send.state, len(send.pieces)) == (SendState.ABORTED, 2)


def receiving() -> RecvTransfer:
    recv = RecvTransfer(HEADER, num_ranks=2)
    recv.begin(HEADER, SLICES)
    return recv


def test_receiving_is_verified_and_loaded_only_when_every_rank_says_so() -> None:
    recv = receiving()
    assert recv.offer(PIECES) == PIECES
    seen: list[RecvState] = []
    steps = [(recv.fetched, 0), (recv.fetched, 0), (recv.loaded, 1), (recv.fetched, 1)]
    for step, rank in [*steps, (recv.loaded, 0), (recv.loaded, 0), (recv.loaded, 1)]:
        step(rank)
        seen.append(recv.state)
    assert seen == [RecvState.FETCHING] * 3 + [RecvState.VERIFIED] * 3 + [RecvState.LOADED]


@pytest.mark.parametrize(
    ("field", "changed"),
    [
        ("model", replace(HEADER, model_sha256=b"x" * 32)),
        ("prompt", replace(HEADER, prompt_sha256=prompt_sha256((1, 2, 4)))),
        ("prompt_tokens", replace(HEADER, num_tokens=129)),
        ("num_layers", replace(HEADER, shape=replace(SHAPE, num_layers=3))),
        ("num_kv_heads", replace(HEADER, shape=replace(SHAPE, num_kv_heads=4))),
        ("head_dim", replace(HEADER, shape=replace(SHAPE, head_dim=16))),
        ("dtype", replace(HEADER, shape=replace(SHAPE, dtype="bfloat16"))),
        ("codec", replace(HEADER, codec="int8")),
        ("chunk_tokens", replace(HEADER, chunk_tokens=64)),
        ("transport", replace(HEADER, transport="ucx")),
    ],
)
def test_what_was_not_asked_for_is_refused_by_name(field: str, changed: Header) -> None:
    recv = RecvTransfer(HEADER, num_ranks=1)
    with pytest.raises(TransferRefused, match=f"^{field} differs"):
        recv.begin(changed, SLICES)
    assert recv.state is RecvState.REFUSED
    assert recv.offer(PIECES) == []


@pytest.mark.parametrize(
    "piece", [Piece(1, 0, 0, (1, 2)), Piece(0, 2, 0, (1, 2)), Piece(0, 0, 2, (1, 2)), Piece(0, 0, 0, (1,))]
)
def test_pieces_that_cannot_be_are_refused(piece: Piece) -> None:
    recv = receiving()
    with pytest.raises(TransferRefused):
        recv.offer([piece])
    assert recv.state is RecvState.REFUSED


def test_a_repeated_piece_is_ignored_and_one_whose_digests_changed_is_refused() -> None:
    recv = receiving()
    recv.offer(PIECES[:1])
    assert recv.offer(PIECES[:2]) == PIECES[1:2]
    with pytest.raises(TransferRefused, match="changed"):
        recv.offer([Piece(0, 0, 0, (7, 7))])


def test_a_header_may_come_again_but_not_with_other_ranks() -> None:
    recv = receiving()
    recv.begin(HEADER, SLICES)
    with pytest.raises(TransferRefused, match="ranks changed"):
        recv.begin(HEADER, rank_slices([2], 2, 2))


def test_nothing_of_a_refused_transfer_is_ever_verified() -> None:
    recv = receiving()
    recv.offer(PIECES)
    recv.fail()
    recv.fetched(0)
    recv.fetched(1)
    recv.end()
    assert recv.state is RecvState.REFUSED
