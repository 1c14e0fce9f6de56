"""Adapts vLLM's KV memory to the canonical pieces ``[kv_head, 2 (K, V), token, head_dim]`` and back, exactly.

vLLM shows every layer's cache as ``[block, kv_head, token, 2 * head_dim]``. On CUDA that is what it holds, in any
order of strides; on a CPU the last two dimensions are packed for the instruction set at hand.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch

from hexgen2.errors import ConfigError

#: ``write(key, value, cache, slots)``: vLLM's own way to put ``[token, kv_head, head_dim]`` into a layer's cache.
CacheWrite = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]

#: Integers below this are exact in every dtype of KV.
_DIGIT = 128

_WORDS = {2: torch.int16, 4: torch.int32}


class Layout(Protocol):
    """The two directions. ``cache`` is one layer's; ``slots`` come from ``token_slots``."""

    def gather(self, cache: torch.Tensor, block_ids: Sequence[int], skip: int, num_tokens: int) -> torch.Tensor:
        """A contiguous piece: ``num_tokens`` tokens, from ``skip`` tokens into the blocks on."""

    def scatter(self, cache: torch.Tensor, slots: torch.Tensor, piece: torch.Tensor) -> None:
        """Write a piece, one token to each slot."""


def token_slots(
    block_ids: Sequence[int], block_size: int, first_token: int, num_tokens: int, device: torch.device
) -> torch.Tensor:
    """``int64[num_tokens - first_token]``: where a request's tokens from ``first_token`` to ``num_tokens`` are."""
    tokens = torch.arange(first_token, num_tokens, device=device)
    blocks = torch.tensor(block_ids, dtype=torch.int64, device=device)
    slots: torch.Tensor = blocks[tokens // block_size] * block_size + tokens % block_size
    return slots


class DenseLayout:
    """CUDA: tokens lie in the cache as they are. ``block_size`` is the scheduler's; kernels may have smaller blocks."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        # All layers of a step ask for the same slots: copy them to the device once.
        self._slots = lru_cache(maxsize=1024)(token_slots)

    def gather(self, cache: torch.Tensor, block_ids: Sequence[int], skip: int, num_tokens: int) -> torch.Tensor:
        """See ``Layout``."""
        slots = self._slots(tuple(block_ids), self._block_size, skip, skip + num_tokens, cache.device)
        tokens = cache[slots // cache.shape[2], :, slots % cache.shape[2]]
        return tokens.view(*tokens.shape[:2], 2, -1).permute(1, 2, 0, 3).contiguous()

    def scatter(self, cache: torch.Tensor, slots: torch.Tensor, piece: torch.Tensor) -> None:
        """See ``Layout``."""
        cache[slots // cache.shape[2], :, slots % cache.shape[2]] = piece.permute(2, 0, 1, 3).flatten(2)


class PackedLayout:
    """CPU: each block packs K and V in an order of its own, learned once by writing known values with ``write``."""

    def __init__(self, write: CacheWrite, block_size: int, head_dim: int, dtype: torch.dtype) -> None:
        """Learn the order.

        Raises:
            ConfigError: what ``write`` does is not a permutation of each half of a block.
        """
        self._write = write
        self._block_size = block_size
        self._head_dim = head_dim
        self._word = _WORDS[dtype.itemsize]
        self._order = self._learn(dtype)

    def gather(self, cache: torch.Tensor, block_ids: Sequence[int], skip: int, num_tokens: int) -> torch.Tensor:
        """See ``Layout``."""
        # One block, the usual case, needs no copy before it is unpacked.
        blocks = cache[block_ids[0]].unsqueeze(0) if len(block_ids) == 1 else cache[list(block_ids)]
        num_heads = cache.shape[1]
        words = blocks.view(self._word).view(len(block_ids) * num_heads, -1).numpy()
        # numpy's take is several times faster here than torch's index for 16-bit values.
        canonical = torch.from_numpy(np.take(words, self._order, axis=1, mode="clip"))
        pieces = canonical.view(cache.dtype).view(len(block_ids), num_heads, 2, self._block_size, self._head_dim)
        if len(block_ids) == 1 and num_tokens == self._block_size:
            return pieces[0]
        tokens = pieces.permute(1, 2, 0, 3, 4).reshape(num_heads, 2, -1, self._head_dim)
        return tokens[:, :, skip : skip + num_tokens].contiguous()

    def scatter(self, cache: torch.Tensor, slots: torch.Tensor, piece: torch.Tensor) -> None:
        """See ``Layout``."""
        self._write(piece[:, 0].transpose(0, 1), piece[:, 1].transpose(0, 1), cache, slots)

    def _learn(self, dtype: torch.dtype) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
        """Position in a packed head of each canonical value, K's before V's."""
        size = self._block_size * self._head_dim
        index = torch.arange(size).view(self._block_size, 1, self._head_dim)
        slots = torch.arange(self._block_size)
        packed = torch.zeros(2, size, dtype=torch.int64)
        scale = 1
        while scale < size:
            digit = (index // scale % _DIGIT).to(dtype)
            cache = torch.zeros(1, 1, self._block_size, 2 * self._head_dim, dtype=dtype)
            self._write(digit, digit.clone(), cache, slots)
            packed += cache.view(2, size).to(torch.int64) * scale
            scale *= _DIGIT
        order = packed.argsort(dim=1)
        if not torch.equal(packed.gather(1, order), torch.arange(size).expand(2, -1)):
            raise ConfigError(
                f"the layout of vLLM's CPU cache ({dtype}, block of {self._block_size}) is not understood"
            )
        return torch.cat((order[0], order[1] + size)).numpy()


def cpu_cache_write(isa: str) -> CacheWrite:
    """vLLM's own cache write for the instruction set ``isa`` (as its attention layers name it)."""
    from vllm import _custom_ops as ops

    def write(key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
        # As vLLM's CPU attention does: the first half of a packed block is K, the second V.
        num_blocks, num_heads, block_size, _ = cache.shape
        halves = cache.view(num_blocks, num_heads, 2 * block_size, -1)
        key_cache, value_cache = halves.chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(key, value, key_cache, value_cache, slots, isa)

    return write


def check_exact(layout: Layout, cache: torch.Tensor, block_size: int) -> None:
    """Write random values to blocks like the cache's and read them back: a wrong layout must never serve anything.

    Raises:
        ConfigError: they differ.
    """
    copy = torch.zeros(2 * block_size // cache.shape[2], *cache.shape[1:], dtype=cache.dtype, device=cache.device)
    num_tokens = block_size + block_size // 2
    shape = (cache.shape[1], 2, num_tokens, cache.shape[3] // 2)
    piece = torch.randn(shape, device=cache.device).to(cache.dtype)
    layout.scatter(copy, token_slots((1, 0), block_size, 0, num_tokens, cache.device), piece)
    if not torch.equal(layout.gather(copy, (1, 0), 0, num_tokens), piece):
        raise ConfigError(f"vLLM's KV memory {tuple(cache.shape)} {cache.dtype} is not laid out as expected")
