"""The stages of a hand-over that can be left out, to see what each costs. Only the benchmark's processes do this."""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from hexgen2.kv import pieces
from hexgen2.kv.codec import copy_and_digest, gather_and_digest, move_and_digest
from hexgen2.kv.kernels import Move
from hexgen2.kv.pieces import PieceFormat
from hexgen2.kv.wire import chunk_span

_read, _moved = PieceFormat.read, PieceFormat.move


def use_digests(active: bool) -> None:
    """Whether pieces are digested as they are copied; without, every digest is 0, on both sides."""
    setattr(pieces, "copy_and_digest", copy_and_digest if active else _copy)  # noqa: B010, not to be had openly
    setattr(pieces, "move_and_digest", move_and_digest if active else _move)  # noqa: B010
    setattr(pieces, "gather_and_digest", gather_and_digest if active else _gather)  # noqa: B010


def unpack(active: bool) -> None:
    """Whether what has landed is copied, or decoded, to staging; without, it stays where it landed."""
    setattr(PieceFormat, "read", _read if active else _leave)  # noqa: B010, methods on purpose
    setattr(PieceFormat, "move", _moved if active else _leave_many)  # noqa: B010


def _copy(dst: torch.Tensor, src: torch.Tensor, _key: object, **_place: int) -> torch.Tensor:
    dst.copy_(src)
    return torch.zeros(dst.shape[0], dtype=torch.int64)


def _gather(to: Sequence[int], piece: torch.Tensor, _key: object, **_place: int) -> torch.Tensor:
    heads, parts, num_tokens, head_dim = piece.shape
    for number, address in enumerate(to):
        start, stop = chunk_span(number, num_tokens)
        size = heads * parts * (stop - start) * head_dim * piece.itemsize
        place = torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=piece.dtype)
        place.view(heads, parts, stop - start, head_dim).copy_(piece[:, :, start:stop])
    return torch.zeros(len(to) * heads, dtype=torch.int64)


def _move(moves: Sequence[Move], _key: object) -> list[int]:
    for to, of, heads, size, _ in moves:
        if to != of:
            ctypes.memmove(to, of, heads * size)
    return _leave_many(None, moves)


def _leave(_self: Any, piece: torch.Tensor, _encoded: torch.Tensor, **_place: int) -> torch.Tensor:
    return torch.zeros(piece.shape[0], dtype=torch.int64)


def _leave_many(_self: Any, moves: Sequence[Move]) -> list[int]:
    return [0] * sum(heads for _, _, heads, _, _ in moves)
