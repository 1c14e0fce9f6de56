"""What numba compiles for ``kernels``, when this is imported. Integers are 64-bit and wrap.

A word is loaded once, so that what is summed up is what is stored. Words go by pairs: of 64 bits, whose halves are
multiplied by halves without being rearranged first, as AVX2 and its like can.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

_STRIDED = "void(int64[::1], intp, intp, int32[::1], UniTuple(int64, 4), UniTuple(int64, 6), int64, int64)"
_PIECES = "void(int64[::1], int64[:, ::1], int32[::1], int64)"


@intrinsic
def _pointer(_context: Any, address: Any) -> Any:
    """An address as a pointer: making arrays of tensors would cost more than small pieces do."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


@njit(nogil=True)
def _move(to: Any, of: Any, factors: Any, num_pairs: Any) -> Any:
    """Copy that many pairs of words and return the sum of the words times ``factors``."""
    words = carray(_pointer(of), (num_pairs,), np.int64)
    copy = carray(_pointer(to), (num_pairs,), np.int64)
    low = np.int64(0)
    high = np.int64(0)
    for i in range(num_pairs):
        pair = words[i]
        factor = factors[i]
        copy[i] = pair
        low += np.int64(np.int32(pair)) * np.int64(np.int32(factor))
        high += (pair >> 32) * (factor >> 32)
    return low + high


def _copy_and_sum(
    sums: Any, dst: Any, src: Any, multipliers: Any, shape: Any, strides: Any, base: Any, step: Any
) -> None:
    """Addresses and strides (of head, part and row; of ``dst``, then of ``src``) in bytes, the row's width in pairs."""
    heads, parts, rows, width = shape
    dst_head, dst_part, dst_row, src_head, src_part, src_row = strides
    factors = multipliers[: 2 * parts * rows * width].view(np.int64)
    for head in range(heads):
        sums[head] = base + head * step
    for part in range(parts):
        for row in range(rows):
            at = (part * rows + row) * width
            # Heads are innermost: in the engine's layout the heads of a token lie side by side.
            for head in range(heads):
                to = dst + head * dst_head + part * dst_part + row * dst_row
                of = src + head * src_head + part * src_part + row * src_row
                sums[head] += _move(to, of, factors[at : at + width], width)


def _move_pieces(sums: Any, pieces: Any, multipliers: Any, step: Any) -> None:
    """Each of ``pieces``: addresses to and of, heads, bytes of a head, what to add to the first head's sum."""
    at = 0
    for number in range(len(pieces)):
        to, of, heads = pieces[number, 0], pieces[number, 1], pieces[number, 2]
        size, base = pieces[number, 3], pieces[number, 4]
        factors = multipliers[: size // 4].view(np.int64)
        for head in range(heads):
            sums[at] = base + head * step + _move(to + head * size, of + head * size, factors, size // 8)
            at += 1


def _compiled(function: Callable[..., None], signature: str) -> Callable[..., None]:
    made: Callable[..., None]
    try:
        made = njit(signature, nogil=True, cache=True)(function)
    except RuntimeError:
        # Nowhere to keep it for the next process.
        made = njit(signature, nogil=True)(function)
    return made


copy_and_sum = _compiled(_copy_and_sum, _STRIDED)
move_pieces = _compiled(_move_pieces, _PIECES)
