"""Copy and digest in one pass over host memory, where numba is installed. It comes with the engines' extras; without
it ``codec`` does the same with NumPy, in two passes and at a third of the speed.

Nothing here imports numba before ``copy_and_sum`` or ``prepare`` is called: services without KV never pay for that.
"""

from collections.abc import Callable
from functools import cache
from logging import getLogger
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

log = getLogger(__name__)


def prepare() -> None:
    """Compile now, or load what an earlier process compiled, rather than in the middle of the first transfer."""
    _compiled()


def copy_and_sum(
    dst: torch.Tensor, src: torch.Tensor, multipliers: "NDArray[np.int64]", base: int, step: int
) -> "NDArray[np.int64] | None":
    """Copy ``src`` to ``dst`` and sum up each head's words times multipliers, as they are copied. Releases the GIL.

    Args:
        dst: as ``codec.digest`` takes it, in host memory, of any strides.
        src: of the same shape, in host memory, of any strides.
        multipliers: one for each 32-bit word of a head, or more.
        base: added to the first head's sum.
        step: added to each further head's once more than to the one's before.

    Returns:
        The sums modulo 2**64, ``int64 [kv_head]``; None where rows are not whole words or numba is not installed:
        nothing was done then.
    """
    compiled = _compiled()
    if compiled is None or src.dtype != dst.dtype:
        return None
    heads = dst.shape[0]
    item = dst.element_size()
    if dst.is_contiguous() and src.is_contiguous():
        width = dst.numel() // heads * item
        shape, strides = (heads, 1, 1, width), (width, 0, 0, width, 0, 0)
    elif dst.dim() == 4:
        _, parts, rows, values = dst.shape
        *ours, our_step = dst.stride()
        *theirs, their_step = src.stride()
        if values > 1 and (our_step, their_step) != (1, 1):
            return None
        shape = (heads, parts, rows, values * item)
        strides = (ours[0] * item, ours[1] * item, ours[2] * item, theirs[0] * item, theirs[1] * item, theirs[2] * item)
    else:
        return None
    to, of = dst.data_ptr(), src.data_ptr()
    if (shape[3] | to | of | strides[0] | strides[1] | strides[2] | strides[3] | strides[4] | strides[5]) % 4:
        return None
    sums = np.empty(heads, dtype=np.int64)
    compiled(sums, to, of, multipliers, (*shape[:3], shape[3] // 4), strides, base, step)
    return sums


@cache
def _compiled() -> Callable[..., None] | None:
    try:
        from hexgen2.kv.compiled import copy_and_sum as compiled
    except ImportError as error:
        log.info("KV is digested by NumPy, which is slower: %s", error)
        return None
    made: Callable[..., None] = compiled
    return made
