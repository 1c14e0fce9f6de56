"""Copy and digest in one pass over host memory, where numba is installed. It comes with the engines' extras; without
it ``codec`` does the same with NumPy, in two passes and at a third of the speed.

Nothing here imports numba before ``copy_and_sum`` or ``prepare`` is called: services without KV never pay for that.
"""

from collections.abc import Sequence
from functools import cache
from logging import getLogger
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from types import ModuleType

    from numpy.typing import NDArray

log = getLogger(__name__)


def prepare() -> None:
    """Compile now, or load what an earlier process compiled, rather than in the middle of the first transfer."""
    _compiled()


def copy_and_sum(
    dst: torch.Tensor, src: torch.Tensor, multipliers: "NDArray[np.int32]", base: int, step: int
) -> "NDArray[np.int64] | None":
    """Copy ``src`` to ``dst`` and sum up each head's words times multipliers, as they are copied. Releases the GIL.

    Args:
        dst: as ``codec.digest`` takes it, in host memory, of any strides.
        src: of the same shape, in host memory, of any strides.
        multipliers: one for each 32-bit word of a head, or more.
        base: added to the first head's sum.
        step: added to each further head's once more than to the one's before.

    Returns:
        The sums modulo 2**64, ``int64 [kv_head]``; None where rows are not whole pairs of words or numba is
        not installed: nothing was done then.
    """
    if src.dtype != dst.dtype:
        return None
    if dst.is_contiguous() and src.is_contiguous():
        heads, width = dst.shape[0], dst.numel() // dst.shape[0] * dst.element_size()
        strides = (width, 0, 0, width, 0, 0)
        return _sum(dst.data_ptr(), src.data_ptr(), (heads, 1, 1, width), strides, multipliers, base, step)
    if dst.dim() != 4 or (dst.shape[3] > 1 and (dst.stride(3), src.stride(3)) != (1, 1)):
        return None
    item = dst.element_size()
    a, b, c, _ = dst.stride()
    d, e, f, _ = src.stride()
    heads, parts, rows, values = dst.shape
    strides = (a * item, b * item, c * item, d * item, e * item, f * item)
    return _sum(dst.data_ptr(), src.data_ptr(), (heads, parts, rows, values * item), strides, multipliers, base, step)


#: Tokens that are to be in one piece: its address, the first one, how many, and what is added to the first head's sum.
Run = tuple[int, int, int, int]


def gather(
    runs: Sequence[Run], src: torch.Tensor, multipliers: "NDArray[np.int32]", step: int
) -> "NDArray[np.int64] | None":
    """``copy_and_sum`` of runs of tokens of ``src``, ``[kv_head, 2, token, head_dim]``, at the price of one call.

    Returns:
        The sums, run by run, ``int64 [run * kv_head]``; None as above.
    """
    compiled = _compiled()
    item = src.element_size()
    heads, parts, _, values = src.shape
    of, width, (d, e, f, last) = src.data_ptr(), values * item, src.stride()
    table = np.array(runs, dtype=np.int64)
    words = of | width | d * item | e * item | f * item
    if compiled is None or last != 1 or (words | int(np.bitwise_or.reduce(table[:, 0]))) % 8:
        return None
    sums = np.empty(len(runs) * heads, dtype=np.int64)
    strides = (d * item, e * item, f * item)
    compiled.gather(sums, table, of, multipliers, (heads, parts, width // 8), strides, step)
    return sums


def _sum(
    to: int,
    of: int,
    shape: tuple[int, int, int, int],
    strides: tuple[int, int, int, int, int, int],
    multipliers: "NDArray[np.int32]",
    base: int,
    step: int,
) -> "NDArray[np.int64] | None":
    """``shape``: heads, parts, rows, and a row's width in bytes."""
    compiled = _compiled()
    heads, parts, rows, width = shape
    a, b, c, d, e, f = strides
    if compiled is None or (width | to | of | a | b | c | d | e | f) % 8:
        return None
    sums = np.empty(heads, dtype=np.int64)
    compiled.copy_and_sum(sums, to, of, multipliers, (heads, parts, rows, width // 8), strides, base, step)
    return sums


#: A piece that is contiguous at both ends: its addresses there and here (the same: it is only summed up), heads, bytes
#: of a head, and what is added to the first head's sum.
Move = tuple[int, int, int, int, int]


def move_pieces(moves: Sequence[Move], multipliers: "NDArray[np.int32]", step: int) -> list[int] | None:
    """The same for many pieces of host memory, at the price of one call.

    Returns:
        The sums of all heads, modulo 2**64, unsigned; None as above.
    """
    compiled = _compiled()
    pieces = np.array(moves, dtype=np.int64)
    if compiled is None or np.bitwise_or.reduce(pieces[:, (0, 1, 3)], axis=None) % 8:
        return None
    sums = np.empty(pieces[:, 2].sum(), dtype=np.int64)
    compiled.move_pieces(sums, pieces, multipliers, step)
    digests: list[int] = sums.view(np.uint64).tolist()
    return digests


@cache
def _compiled() -> "ModuleType | None":
    try:
        from hexgen2.kv import compiled
    except ImportError as error:
        log.info("KV is digested by NumPy, which is slower: %s", error)
        return None
    return compiled
