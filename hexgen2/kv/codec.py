"""The digest of KV pieces: computed where the bytes are (CPU or CUDA, the same value), over the bytes as they travel.

One digest per (layer, chunk, KV head). With ``w_i`` the head's bytes as signed 32-bit little-endian words::

    digest = sum_i w_i * r_i  +  c * place(layer, chunk, head, number of words)        mod 2**64

``r_i`` and the odd ``c`` are drawn from the transfer's secret token (SHAKE-128). Every ``r_i`` is odd and below 2**31,
and no two are equal. What follows holds for every key, not just for most:

* One changed word changes the sum by ``d * r_i`` with 0 < |d| < 2**32: not 0, and too small to be 0 modulo 2**64.
* Two flipped bits ``a <= b`` of two words change it by ``±2**a * r_i ± 2**b * r_j``, below 2**63 in size: if a < b,
  ``2**a`` times an odd number; if a = b, ``2**a * (r_i ± r_j)``. Not 0.
* Two unequal words swapped change it by ``(w_i - w_j) * (r_j - r_i)``: not 0, and below 2**63 in size.
* Equal bytes at another layer, chunk or head, or of another length: ``place`` packs its arguments into disjoint
  bits, and multiplying by an odd number is one-to-one modulo 2**64: never the same digest.

Any other change, such as tokens or heads swapped for others, must meet a relation between secret numbers. Whatever
the others are, at most one of some 2**30 values of an ``r_i`` meets it, so its chance is 2**-30 at the very worst,
where somebody chose two words for it; over words that differ at random it is 2**-64. It is no MAC: digests travel on
the authenticated control channel, and only the bytes they describe do not.

Products of 32-bit numbers are what processors are good at: with these multipliers the digest costs next to nothing
beside the copy it is taken of (``kv.kernels``).
"""

from collections.abc import Sequence
from hashlib import shake_128
from typing import TYPE_CHECKING

import numpy as np
import torch

from hexgen2.kv import kernels
from hexgen2.kv.kernels import Move
from hexgen2.kv.wire import chunk_span

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MASK = (1 << 64) - 1
# place(): bits of the number of words, the layer, the head and the chunk.
_WORDS_BITS, _LAYER_BITS, _HEAD_BITS, _CHUNK_BITS = 20, 12, 12, 20
_HEAD_SHIFT = _WORDS_BITS + _LAYER_BITS + _CHUNK_BITS
# A copy and the digest of that copy go by groups of heads that stay in a core's cache between the two.
_GROUP_BYTES = 256 << 10


class DigestKey:
    """What the digests of one transfer depend on: make it once per transfer and rank (0.4 ms for 16,384 words).

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
        self._on_device = None
        if device.type != "cpu":
            self._on_device = torch.from_numpy(self._multipliers.astype(np.int64)).to(device)

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
            # einsum casts in small buffers and multiplies in int64, wrapping: no temporaries.
            table = self._multipliers[: parts * length].reshape(parts, length)
            sums = np.einsum("hpi,pi->h", words.numpy(), table, dtype=np.int64)
            return torch.from_numpy(sums + np.array(places, dtype=np.int64))
        # Integer sums wrap, so their order does not matter: the same value as on a CPU.
        on_device = (words * self._on_device[: parts * length].view(parts, length)).sum((1, 2))
        # Filled by kernels from numbers: a copy from the host would wait for the device.
        return on_device + torch.stack(
            [torch.full((), place, dtype=torch.int64, device=words.device) for place in places]
        )


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


def as_move(
    to: int, of: int, num_heads: int, head_bytes: int, key: DigestKey, *, layer: int, chunk: int, first_head: int
) -> Move:
    """One of what ``move_and_digest`` takes: a contiguous piece on its way from one address to another."""
    if head_bytes > 4 * key.max_words:
        raise ValueError(f"piece: {head_bytes} bytes per head, the key was made for {4 * key.max_words}")
    heads = range(first_head, first_head + num_heads)
    return to, of, num_heads, head_bytes, key._first_place(layer, chunk, heads, head_bytes // 4)


def gather_and_digest(
    to: Sequence[int], piece: torch.Tensor, key: DigestKey, *, layer: int, chunk: int, first_head: int
) -> torch.Tensor | None:
    """``copy_and_digest`` of consecutive chunks in host memory, ``[kv_head, 2, token, head_dim]``, to an address each,
    where they are contiguous.

    Returns:
        The digests, chunk by chunk. None, and nothing done, where rows are not whole pairs of words or numba is not
        installed.
    """
    heads, _, num_tokens, _ = piece.shape
    head_words = piece.numel() * piece.element_size() // heads // num_tokens // 4
    parts = []
    for number, address in enumerate(to):
        start, stop = chunk_span(number, num_tokens)
        num_words = (stop - start) * head_words
        if num_words > key.max_words:
            raise ValueError(f"piece: {num_words} words per head, the key was made for {key.max_words}")
        base = key._first_place(layer, chunk + number, range(first_head, first_head + heads), num_words)
        parts.append((address, start, stop - start, base))
    sums = kernels.gather(parts, piece, key._multipliers, key._place_step)
    return None if sums is None else torch.from_numpy(sums)


def move_and_digest(moves: Sequence[Move], key: DigestKey) -> list[int] | None:
    """Copy pieces and return the digests of the copies, head by head, as they travel.

    None, and nothing done, where heads are not whole pairs of words or numba is not installed.
    """
    return kernels.move_pieces(moves, key._multipliers, key._place_step)


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


def _expand(token: bytes, num_words: int) -> "tuple[NDArray[np.int32], int]":
    """The multipliers, and the odd factor of ``place``: the first ``num_words`` that differ of what the token gives."""
    spare = 0
    while True:
        stream = shake_128(b"hexgen2 kv digest\0" + token).digest(8 + 4 * (num_words + spare))
        factor = int.from_bytes(stream[:8], "little") | 1
        drawn = np.frombuffer(stream, "<u4", offset=8) >> np.uint32(1) | np.uint32(1)
        ordered = np.sort(drawn)
        if not (ordered[1:] == ordered[:-1]).any():
            return drawn[:num_words].astype(np.int32), factor
        first = np.sort(np.unique(drawn, return_index=True)[1])
        if len(first) >= num_words:
            return drawn[first[:num_words]].astype(np.int32), factor
        spare = 2 * spare + 16


def _signed(value: int) -> int:
    """Two's complement of the low 64 bits."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value
