"""What numba compiles for ``kernels``, when this is imported. Integers are 64-bit and wrap.

What is summed up is what is stored: the word itself, or the copy. Words go by pairs: of 64 bits, whose halves are
multiplied by halves without being rearranged first, as AVX2 and its like can.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

_STRIDED = "void(int64[::1], intp, intp, int32[::1], UniTuple(int64, 4), UniTuple(int64, 6), int64, int64)"
#: Copied before it is summed up, of all heads together.
_BLOCK_BYTES = 16 << 10
_GATHER = "void(int64[::1], int64[:, ::1], intp, int32[::1], UniTuple(int64, 3), UniTuple(int64, 3), int64)"
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


@njit(nogil=True)
def _copy(to: Any, of: Any, num_pairs: Any) -> None:
    words = carray(_pointer(of), (num_pairs,), np.int64)
    copy = carray(_pointer(to), (num_pairs,), np.int64)
    for i in range(num_pairs):
        copy[i] = words[i]


@njit(nogil=True)
def _sum(of: Any, factors: Any, num_pairs: Any) -> Any:
    """As ``_move``, of what is there already."""
    words = carray(_pointer(of), (num_pairs,), np.int64)
    low = np.int64(0)
    high = np.int64(0)
    for i in range(num_pairs):
        pair = words[i]
        factor = factors[i]
        low += np.int64(np.int32(pair)) * np.int64(np.int32(factor))
        high += (pair >> 32) * (factor >> 32)
    return low + high


@njit(nogil=True)
def _strided(sums: Any, dst: Any, src: Any, multipliers: Any, shape: Any, strides: Any, base: Any, step: Any) -> None:
    """Addresses and strides (of head, part and row; of ``dst``, then of ``src``) in bytes, the row's width in pairs.

    Short rows are copied some at a time, heads innermost: in the engine's layout the heads of a token lie side by side.
    Then each head's are summed up where they lie in a run, in the L1 cache: a sum of its own for each row would cost
    more than the row.
    """
    heads, parts, rows, width = shape
    dst_head, dst_part, dst_row, src_head, src_part, src_row = strides
    factors = multipliers[: 2 * parts * rows * width].view(np.int64)
    some = max(1, _BLOCK_BYTES // (heads * width * 8)) if dst_row == 8 * width else 1
    for head in range(heads):
        sums[head] = base + head * step
    for part in range(parts):
        for first in range(0, rows, some):
            last = min(rows, first + some)
            at, size = (part * rows + first) * width, (last - first) * width
            to = dst + part * dst_part
            of = src + part * src_part
            if last - first == 1:
                for head in range(heads):
                    to_row, of_row = to + head * dst_head + first * dst_row, of + head * src_head + first * src_row
                    sums[head] += _move(to_row, of_row, factors[at : at + size], size)
                continue
            for row in range(first, last):
                for head in range(heads):
                    _copy(to + head * dst_head + row * dst_row, of + head * src_head + row * src_row, width)
            for head in range(heads):
                sums[head] += _sum(to + head * dst_head + first * dst_row, factors[at : at + size], size)


def _copy_and_sum(
    sums: Any, dst: Any, src: Any, multipliers: Any, shape: Any, strides: Any, base: Any, step: Any
) -> None:
    """As ``kernels.copy_and_sum``."""
    _strided(sums, dst, src, multipliers, shape, strides, base, step)


def _gather(sums: Any, runs: Any, src: Any, multipliers: Any, shape: Any, strides: Any, step: Any) -> None:
    """Each of ``runs``: address, first row, rows, what to add to the first head's sum."""
    heads, parts, width = shape
    src_head, src_part, src_row = strides
    for number in range(len(runs)):
        first, rows = runs[number, 1], runs[number, 2]
        part = rows * width * 8
        _strided(
            sums[number * heads : (number + 1) * heads],
            runs[number, 0],
            src + first * src_row,
            multipliers,
            (heads, parts, rows, width),
            (parts * part, part, width * 8, src_head, src_part, src_row),
            runs[number, 3],
            step,
        )


def _move_pieces(sums: Any, pieces: Any, multipliers: Any, step: Any) -> None:
    """Each of ``pieces``: addresses to and of (the same: it is only summed up), heads, bytes of a head, what to add
    to the first head's sum."""
    at = 0
    for number in range(len(pieces)):
        to, of, heads = pieces[number, 0], pieces[number, 1], pieces[number, 2]
        size, base = pieces[number, 3], pieces[number, 4]
        factors = multipliers[: size // 4].view(np.int64)
        for head in range(heads):
            sums[at] = base + head * step
            if to == of:
                sums[at] += _sum(of + head * size, factors, size // 8)
            else:
                sums[at] += _move(to + head * size, of + head * size, factors, size // 8)
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
gather = _compiled(_gather, _GATHER)
move_pieces = _compiled(_move_pieces, _PIECES)
