"""How the pieces of one transfer are written and read: codec, dtype and digest in one pass through the cache."""

from collections.abc import Callable, Sequence

import torch

from hexgen2.kv.codec import DigestKey, as_move, copy_and_digest, gather_and_digest, move_and_digest
from hexgen2.kv.codecs import NONE, head_bytes
from hexgen2.kv.kernels import Move
from hexgen2.kv.quantise import Coder
from hexgen2.kv.wire import CHUNK_TOKENS, KvShape

TORCH_DTYPE = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

#: Values that go through a coder at once, as float32: with what they become they stay in a core's cache.
_GROUP_BYTES = 256 << 10

#: Makes, or has kept, a coder: ``Coder`` itself or a cache of it that belongs to one thread.
MakeCoder = Callable[[str, int, int, int, torch.device], Coder]


class PieceFormat:
    """Of one transfer, on one rank.

    Args:
        token: the transfer's secret.
        codec: one of ``codecs.CODECS``.
        shape: the sender's: with codec "none" the bytes are of its dtype.
        device: where the pieces are.
        make_coder: see ``MakeCoder``.
    """

    def __init__(
        self, token: bytes, codec: str, shape: KvShape, device: torch.device, make_coder: MakeCoder = Coder
    ) -> None:
        self._codec = codec
        self._shape = shape
        self._device = device
        self._make_coder = make_coder
        self._key = DigestKey(token, self.head_bytes(CHUNK_TOKENS) // 4, device)

    def head_bytes(self, num_tokens: int) -> int:
        """Bytes of one head of a piece."""
        return head_bytes(self._codec, num_tokens, self._shape.head_dim, self._shape.dtype)

    def write(
        self, encoded: torch.Tensor, piece: torch.Tensor, *, layer: int, chunk: int, first_head: int
    ) -> torch.Tensor:
        """Write ``piece``, ``[kv_head, 2, token, head_dim]``, to ``encoded``, ``uint8 [kv_head, head_bytes]``.

        Returns:
            The digests of ``encoded``, ``int64 [kv_head]``.
        """
        if self._codec == NONE:
            raw = encoded.view(TORCH_DTYPE[self._shape.dtype]).view(piece.shape)
            return copy_and_digest(raw, piece, self._key, layer=layer, chunk=chunk, first_head=first_head)
        digests = []
        for heads in self._groups(piece):
            coder = self._coder(piece[heads])
            coder.encode(piece[heads])
            place = {"layer": layer, "chunk": chunk, "first_head": first_head + heads.start}
            digests.append(copy_and_digest(encoded[heads], coder.encoded, self._key, **place))
        return torch.cat(digests)

    def gather(
        self, to: Sequence[int], piece: torch.Tensor, *, layer: int, chunk: int, first_head: int
    ) -> torch.Tensor | None:
        """``write`` of consecutive chunks to an address each in host memory, where that takes a copy and nothing else;
        else None, and nothing is done: the same with less ado."""
        if not self.keeps(piece.dtype):
            return None
        return gather_and_digest(to, piece, self._key, layer=layer, chunk=chunk, first_head=first_head)

    def read(
        self, piece: torch.Tensor, encoded: torch.Tensor, *, layer: int, chunk: int, first_head: int
    ) -> torch.Tensor:
        """The other way, into ``piece`` of any dtype. Digested and decoded is a private copy of ``encoded``."""
        dtype = TORCH_DTYPE[self._shape.dtype]
        if self._codec == NONE and piece.dtype == dtype:
            raw = encoded.view(dtype).view(piece.shape)
            return copy_and_digest(piece, raw, self._key, layer=layer, chunk=chunk, first_head=first_head)
        digests = []
        for heads in self._groups(piece):
            part = piece[heads]
            coder = None if self._codec == NONE else self._coder(part)
            copy = torch.empty_like(encoded[heads]) if coder is None else coder.encoded
            place = {"layer": layer, "chunk": chunk, "first_head": first_head + heads.start}
            digests.append(copy_and_digest(copy, encoded[heads], self._key, **place))
            if coder is None:
                part.copy_(copy.view(dtype).view(part.shape))
            else:
                coder.decode(part)
        return torch.cat(digests)

    def as_move(
        self, to: int, of: int, num_heads: int, num_tokens: int, *, layer: int, chunk: int, first_head: int
    ) -> Move:
        """A piece on its way from one address to another, both of host memory, for ``move``."""
        size = self.head_bytes(num_tokens)
        return as_move(to, of, num_heads, size, self._key, layer=layer, chunk=chunk, first_head=first_head)

    def move(self, moves: Sequence[Move]) -> list[int] | None:
        """``read`` of many pieces that lie in one piece each, where nothing is to be decoded: the digests of all
        heads, as they travel. None, and nothing done, where that cannot be.
        """
        return move_and_digest(moves, self._key)

    def keeps(self, dtype: torch.dtype) -> bool:
        """Whether it takes a copy in host memory, and nothing else, between the wire and pieces of that dtype."""
        return self._codec == NONE and self._device.type == "cpu" and dtype == TORCH_DTYPE[self._shape.dtype]

    def _groups(self, piece: torch.Tensor) -> list[slice]:
        """Runs of heads: on a GPU one launch is best."""
        heads, _, num_tokens, head_dim = piece.shape
        step = heads if piece.is_cuda else max(1, _GROUP_BYTES // (2 * num_tokens * head_dim * 4))
        return [slice(start, min(start + step, heads)) for start in range(0, heads, step)]

    def _coder(self, part: torch.Tensor) -> Coder:
        heads, _, num_tokens, head_dim = part.shape
        return self._make_coder(self._codec, heads, num_tokens, head_dim, self._device)
