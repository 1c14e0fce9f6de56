"""The emulated model: KV bytes that depend on every token so far, and tokens that depend on every KV byte. Pure.

A stale, swapped or altered byte of KV changes the tokens after it, so that what a fleet of emulated engines answers
proves that its KV hand-off was right.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]

MASK = (1 << 64) - 1
_ODD = 0x9E3779B97F4A7C15
#: Between neighbouring values of KV: more than twice what any codec changes them by.
STEP = 0.25
#: Tokens below are never sampled: tokenizers keep special tokens there.
FIRST_TOKEN = 3


def _mix(x: U64) -> U64:
    """splitmix64's finaliser, elementwise."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def prefix_hashes(token_ids: Sequence[int], before: int = 0) -> U64:
    """For each position a hash of all tokens up to it; ``before`` is the last hash of what precedes, or 0."""
    hashes = np.empty(len(token_ids), np.uint64)
    for i, token in enumerate(token_ids):
        before = ((before ^ (token + 1)) * _ODD + 1) & MASK
        before ^= before >> 29
        hashes[i] = before
    return hashes


def kv_values(hashes: U64, layer: int, heads: range, head_dim: int) -> npt.NDArray[np.float32]:
    """KV of one layer, ``[kv_head, 2, token, head_dim]``; multiples of ``STEP`` in [-1, 1), exact in every dtype."""
    places = np.arange(heads.start * 2 * head_dim, heads.stop * 2 * head_dim, dtype=np.uint64)
    salt = _mix((places + np.uint64(layer << 32)) * np.uint64(_ODD)).reshape(len(heads), 2, 1, head_dim)
    high = (_mix(hashes[None, None, :, None] ^ salt) >> np.uint64(61)).astype(np.int8)
    return high * np.float32(STEP) - np.float32(1)


def restored(kv: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """``kv_values`` from what a codec that loses a little has left of them; exactly."""
    exact: npt.NDArray[np.float32] = np.rint(kv / np.float32(STEP)) * np.float32(STEP)
    # No negative zeros: their bytes are others.
    return exact + np.float32(0)


def read_kv(kv: npt.NDArray[np.uint8], layer: int, heads: range, first_position: int) -> int:
    """Checksum that reads every byte of ``kv``, ``[kv_head, 2, token, bytes of head_dim values]``.

    Checksums add up modulo 2**64 over any split of layers, heads and tokens.
    """
    num_heads, _, num_tokens, num_bytes = kv.shape
    places = np.arange(heads.start * 2 * num_bytes, heads.stop * 2 * num_bytes, dtype=np.uint64)
    weights = _mix((places + np.uint64((layer + 1) << 40)) * np.uint64(_ODD)).reshape(num_heads, 2, num_bytes)
    per_token = np.einsum("hktb,hkb->ht", kv, weights, dtype=np.uint64, casting="unsafe")
    positions = np.arange(first_position, first_position + num_tokens, dtype=np.uint64)
    return int(_mix(per_token + positions * np.uint64(_ODD)).sum(dtype=np.uint64))


def next_token(checksum: int, num_tokens: int, vocab_size: int) -> int:
    """The token after ``num_tokens`` tokens whose KV sums to ``checksum``."""
    mixed = int(_mix(np.array([checksum ^ (num_tokens * _ODD & MASK)], np.uint64))[0])
    return FIRST_TOKEN + mixed % (vocab_size - FIRST_TOKEN)
