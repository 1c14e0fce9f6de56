"""What numba compiles for ``kernels``, when this is imported."""

from typing import Any

import numpy as np
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

_SIGNATURE = "void(int64[::1], intp, intp, int64[::1], UniTuple(int64, 4), UniTuple(int64, 6), int64, int64)"
#: Words of every head's row that are taken before the next ones of the first: their multipliers stay in the L1 cache.
_BLOCK_WORDS = 2048


@intrinsic
def _pointer(_context: Any, address: Any) -> Any:
    """An address as a pointer: making arrays of tensors would cost more than small pieces do."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


def _copy_and_sum(
    sums: Any, dst: Any, src: Any, multipliers: Any, shape: Any, strides: Any, base: Any, step: Any
) -> None:
    """Addresses and strides (of head, part and row; of ``dst``, then of ``src``) in bytes, the row's width in words.

    Integers are 64-bit and wrap. A word is loaded once, so that what is summed up is what is stored.
    """
    heads, parts, rows, width = shape
    dst_head, dst_part, dst_row, src_head, src_part, src_row = strides
    for head in range(heads):
        sums[head] = base + head * step
    for part in range(parts):
        for row in range(rows):
            for begin in range(0, width, _BLOCK_WORDS):
                size = min(_BLOCK_WORDS, width - begin)
                at = (part * rows + row) * width + begin
                factors = multipliers[at : at + size]
                # Heads are innermost: in the engine's layout the heads of a token lie side by side.
                for head in range(heads):
                    at = head * src_head + part * src_part + row * src_row + 4 * begin
                    words = carray(_pointer(src + at), (size,), np.int32)
                    at = head * dst_head + part * dst_part + row * dst_row + 4 * begin
                    copy = carray(_pointer(dst + at), (size,), np.int32)
                    total = np.int64(0)
                    for i in range(size):
                        word = words[i]
                        copy[i] = word
                        total += np.int64(word) * factors[i]
                    sums[head] += total


try:
    copy_and_sum = njit(_SIGNATURE, nogil=True, cache=True)(_copy_and_sum)
except RuntimeError:
    # Nowhere to keep it for the next process.
    copy_and_sum = njit(_SIGNATURE, nogil=True)(_copy_and_sum)
