"""The digest of KV pieces: computed where the bytes are (CPU or CUDA, the same value), over the bytes as they travel.

One digest per (layer, chunk, KV head). With ``w_i`` the head's bytes as signed 32-bit little-endian words::

    digest = sum_i w_i * r_i  +  c * place(layer, chunk, head, number of words)        mod 2**64

``r_i`` and the odd ``c`` are drawn from the transfer's secret token (SHAKE-128). By construction every ``r_i`` is
1 modulo 4 and no two agree modulo 2**33. What follows holds for every key, not just for most:

* One flipped bit ``b`` changes the sum by ``±2**b * r_i`` with b <= 31 and ``r_i`` odd: never 0 modulo 2**64.
  The same holds for any one changed word.
* Two flipped bits ``a <= b`` change it by ``2**a * (±r_i ± 2**(b-a) * r_j)``. If a < b the bracket is odd. If a = b
  it is ``r_i + r_j``, which is 2 modulo 4, or ``r_i - r_j``, which 2**33 does not divide: at most 2**(31+32) divides
  the product, so it is not 0. (Both bits in one word are the case above.)
* Two unequal words swapped change it by ``(w_i - w_j) * (r_j - r_i)``. The first factor is below 2**32 in size, so at
  most 2**31 divides it; at most 2**32 divides the second: not 0.
* Equal bytes at another layer, chunk or head, or of another length: ``place`` packs its arguments into disjoint
  bits, and multiplying by an odd number is one-to-one modulo 2**64: never the same digest.

Any other change, such as tokens or heads swapped for others, must meet a relation between secret numbers. When
2**v is the largest power of two that divides every changed word's difference, that has a chance of about 2**(v-64):
2**-33 at the very worst, where all that differs is top bits; 2**-64 for arbitrary bytes. It is no MAC: digests
travel on the authenticated control channel, and only the bytes they describe do not.
"""

from hashlib import shake_128
from typing import TYPE_CHECKING

import numpy as np
import torch

from hexgen2.kv import kernels

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MASK = (1 << 64) - 1
# place(): bits of the number of words, the layer, the head and the chunk.
_WORDS_BITS, _LAYER_BITS, _HEAD_BITS, _CHUNK_BITS = 20, 12, 12, 20
_HEAD_SHIFT = _WORDS_BITS + _LAYER_BITS + _CHUNK_BITS
# A copy and the digest of that copy go by groups of heads that stay in a core's cache between the two.
_GROUP_BYTES = 256 << 10


class DigestKey:
    """What the digests of one transfer depend on: make it once per transfer and rank (0.3 ms for 16,384 words).

    Args:
        token: the transfer's secret.
        max_words: 32-bit words of one head's share of a full chunk.
        device: where the pieces are.
    """

    __slots__ = ("_multipliers", "_on_device", "_place_factor", "_place_step", "max_words")

    def __init__(self, token: bytes, max_words: int, device: "torch.device | str" = "cpu") -> None:
        if not 0 < max_words < 1 << _WORDS_BITS:
            raise ValueError(f"max_words: {max_words} is not between 1 and {(1 << _WORDS_BITS) - 1}")
        self.max_words = max_words
        self._multipliers, self._place_factor = _expand(token, max_words)
        self._place_step = _signed(self._place_factor << _HEAD_SHIFT)
        device = torch.device(device)
        self._on_device = torch.from_numpy(self._multipliers).to(device) if device.type != "cpu" else None

    def _first_place(self, layer: int, chunk: int, heads: range, num_words: int) -> int:
        """What ``place`` adds to the first head's digest; to each further one ``_place_step`` more."""
        for name, value, bits in (("layer", layer, _LAYER_BITS), ("chunk", chunk, _CHUNK_BITS)):
            if not 0 <= value < 1 << bits:
                raise ValueError(f"{name}: {value} is not between 0 and {(1 << bits) - 1}")
        if heads.start < 0 or heads.stop > 1 << _HEAD_BITS:
            raise ValueError(f"heads: {heads} is not within 0 to {(1 << _HEAD_BITS) - 1}")
        rest = (chunk << _LAYER_BITS | layer) << _WORDS_BITS | num_words
        return _signed(self._place_factor * (heads.start << _HEAD_SHIFT | rest))

    def _digests(self, words: torch.Tensor, first_place: int) -> torch.Tensor:
        """``words``: int32 [head, part, word] on any strides but the last; returns int64 [head]."""
        heads, parts, length = words.shape
        places = [_signed(first_place + head * self._place_step) for head in range(heads)]
        if self._on_device is None:
            # einsum casts in small buffers and multiplies in int64, wrapping: no temporaries, 5 GB/s on one thread.
            table = self._multipliers[: parts * length].reshape(parts, length)
            return torch.from_numpy(np.einsum("hpi,pi->h", words.numpy(), table) + np.array(places, dtype=np.int64))
        # Integer sums wrap, so their order does not matter: the same value as on a CPU.
        sums = (words * self._on_device[: parts * length].view(parts, length)).sum((1, 2))
        # Filled by kernels from numbers: a copy from the host would wait for the device.
        return sums + torch.stack([torch.full((), place, dtype=torch.int64, device=words.device) for place in places])


def digest(piece: torch.Tensor, key: DigestKey, *, layer: int, chunk: int, first_head: int) -> torch.Tensor:
    """Digests of one piece.

    Args:
        piece: [kv_head, 2, token, head_dim], or bytes [kv_head, bytes of a head]; on the key's device.
        key: of the transfer.
        layer: global number of the piece's layer.
        chunk: number of the token chunk.
        first_head: global number of the piece's first KV head.

    Returns:
        int64 [kv_head] on the piece's device.
    """
    words = _as_words(piece)
    heads, parts, length = words.shape
    if parts * length > key.max_words:
        raise ValueError(f"piece: {parts * length} words per head, the key was made for {key.max_words}")
    first_place = key._first_place(layer, chunk, range(first_head, first_head + heads), parts * length)
    return key._digests(words, first_place)


def copy_and_digest(
    dst: torch.Tensor, src: torch.Tensor, key: DigestKey, *, layer: int, chunk: int, first_head: int
) -> torch.Tensor:
    """Copy ``src`` to ``dst`` and return the digests of ``dst``: of what was copied, whatever happens to ``src``.

    Both have the same shape, as ``digest`` takes it, and any strides.
    """
    if dst.shape != src.shape:
        raise ValueError(f"shapes differ: {tuple(dst.shape)} and {tuple(src.shape)}")
    heads = dst.shape[0]
    if dst.device.type == "cpu" and src.device.type == "cpu":
        head_bytes = dst.numel() * dst.element_size() // heads
        if head_bytes > 4 * key.max_words:
            raise ValueError(f"piece: {head_bytes} bytes per head, the key was made for {4 * key.max_words}")
        first_place = key._first_place(layer, chunk, range(first_head, first_head + heads), head_bytes // 4)
        sums = kernels.copy_and_sum(dst, src, key._multipliers, first_place, key._place_step)
        if sums is not None:
            return torch.from_numpy(sums)
    # On a GPU one launch is best; on a CPU without the kernel, digest what is still in the cache.
    step = heads if dst.is_cuda else max(1, _GROUP_BYTES * heads // max(1, dst.numel() * dst.element_size()))
    if step >= heads:
        dst.copy_(src)
        return digest(dst, key, layer=layer, chunk=chunk, first_head=first_head)
    digests = []
    for head in range(0, heads, step):
        part = dst[head : head + step]
        part.copy_(src[head : head + step])
        digests.append(digest(part, key, layer=layer, chunk=chunk, first_head=first_head + head))
    return torch.cat(digests)


def to_wire(digests: torch.Tensor) -> tuple[int, ...]:
    """As the ``fixed64`` values that travel."""
    return tuple(digests.view(torch.uint64).tolist())


def _as_words(piece: torch.Tensor) -> torch.Tensor:
    """[kv_head, ...] as int32 [kv_head, part, word], without copying where rows of (token, head_dim) are whole."""
    heads, item_bytes = piece.shape[0], piece.element_size()
    head_bytes = piece.numel() * item_bytes // heads
    if head_bytes % 4:
        raise ValueError(f"piece: {head_bytes} bytes per head, not a multiple of 4")
    if not piece.is_contiguous():
        rows = piece.flatten(2) if piece.dim() == 4 else piece
        if piece.dim() == 4 and rows.stride(2) == 1 and _are_words(rows):
            return rows.view(torch.int32)
        piece = piece.contiguous()
    if not _are_words(piece):
        piece = piece.clone()
    return piece.view(heads, -1).view(torch.int32).view(heads, 1, -1)


def _are_words(piece: torch.Tensor) -> bool:
    """Whether every row but the last dimension's begins, and ends, where a word does."""
    steps = (piece.storage_offset(), piece.shape[-1] if piece.dim() > 2 else 0, *piece.stride()[:-1])
    return all(step * piece.element_size() % 4 == 0 for step in steps)


def _expand(token: bytes, num_words: int) -> "tuple[NDArray[np.int64], int]":
    """The multipliers and the odd factor of ``place``."""
    stream = shake_128(b"hexgen2 kv digest\0" + token).digest(24 + 8 * num_words)
    factor, a, b = (int.from_bytes(stream[i : i + 8], "little") | 1 for i in (0, 8, 16))
    random = np.frombuffer(stream, "<u8", num_words, offset=24).astype(np.uint64)
    # 31 bits: the word's index, so that all differ, below random ones; then two keyed one-to-one mixing steps, so
    # that neighbours are not alike.
    index_bits = (num_words - 1).bit_length()
    low31 = np.uint64((1 << 31) - 1)
    mixed = (random << np.uint64(index_bits) | np.arange(num_words, dtype=np.uint64)) & low31
    for odd in (a, b):
        mixed = mixed * np.uint64(odd) & low31
        mixed ^= mixed >> np.uint64(16)
    multipliers = random & ~np.uint64((1 << 33) - 1) | mixed << np.uint64(2) | np.uint64(1)
    return multipliers.view(np.int64), factor


def _signed(value: int) -> int:
    """Two's complement of the low 64 bits."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value
