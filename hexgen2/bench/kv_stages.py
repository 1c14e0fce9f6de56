"""The stages of a hand-over that can be left out, to see what each costs. Only the benchmark's processes do this."""

from typing import Any

import torch

from hexgen2.kv import pieces
from hexgen2.kv.codec import copy_and_digest
from hexgen2.kv.pieces import PieceFormat

_read = PieceFormat.read


def use_digests(active: bool) -> None:
    """Whether pieces are digested as they are copied; without, every digest is 0, on both sides."""
    setattr(pieces, "copy_and_digest", copy_and_digest if active else _copy)  # noqa: B010, not to be had openly


def unpack(active: bool) -> None:
    """Whether what has landed is copied, or decoded, to staging; without, it stays where it landed."""
    setattr(PieceFormat, "read", _read if active else _leave)  # noqa: B010, a method on purpose


def _copy(dst: torch.Tensor, src: torch.Tensor, _key: object, **_place: int) -> torch.Tensor:
    dst.copy_(src)
    return torch.zeros(dst.shape[0], dtype=torch.int64)


def _leave(_self: Any, piece: torch.Tensor, _encoded: torch.Tensor, **_place: int) -> torch.Tensor:
    return torch.zeros(piece.shape[0], dtype=torch.int64)
