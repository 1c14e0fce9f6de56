"""The canonical KV format: what a piece is, how large, and where it lies in a page. Pure.

KV travels as ``[layer][token chunk][kv_head][K|V][token][head_dim]``, so that what any
(layer, chunk, head) needs is contiguous whatever the engines at both ends do inside.
A *piece* is one (layer, chunk) of one rank; a *page* holds one chunk for all layers of a rank.
"""

from dataclasses import dataclass
from hashlib import sha256
from struct import pack

#: Tokens of a full chunk. Part of the format: both sides must agree.
CHUNK_TOKENS = 128

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class KvShape:
    """KV of the whole model: ``2 * num_layers * num_kv_heads * head_dim`` values of ``dtype`` per token."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str

    @property
    def item_bytes(self) -> int:
        """Bytes of one value."""
        return ITEM_BYTES[self.dtype]

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's KV over all layers and heads."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.item_bytes


@dataclass(frozen=True, slots=True)
class RankSlice:
    """The layers and KV heads that one TP x PP rank holds. With more ranks than heads, heads repeat."""

    rank: int
    first_layer: int
    num_layers: int
    first_kv_head: int
    num_kv_heads: int

    @property
    def layers(self) -> range:
        """Global layer numbers."""
        return range(self.first_layer, self.first_layer + self.num_layers)

    @property
    def kv_heads(self) -> range:
        """Global KV head numbers."""
        return range(self.first_kv_head, self.first_kv_head + self.num_kv_heads)


def num_chunks(num_tokens: int) -> int:
    """Chunks that ``num_tokens`` take; the last may be short."""
    return -(-num_tokens // CHUNK_TOKENS)


def complete_chunks(num_computed: int, num_tokens: int) -> int:
    """Chunks of ``num_tokens`` tokens that are complete when ``num_computed`` of them are computed."""
    return num_chunks(num_tokens) if num_computed >= num_tokens else num_computed // CHUNK_TOKENS


def chunk_span(chunk: int, num_tokens: int) -> tuple[int, int]:
    """First token of the chunk and the one past its last."""
    start = chunk * CHUNK_TOKENS
    return start, min(start + CHUNK_TOKENS, num_tokens)


@dataclass(frozen=True, slots=True)
class PageLayout:
    """Where pieces lie in a page of one rank."""

    shape: KvShape
    slice: RankSlice

    @property
    def head_bytes_per_token(self) -> int:
        """K and V of one token, one layer, one head."""
        return 2 * self.shape.head_dim * self.shape.item_bytes

    def piece_bytes(self, num_tokens: int) -> int:
        """Bytes of a piece of ``num_tokens`` tokens: all heads of the rank, one layer."""
        return self.slice.num_kv_heads * self.head_bytes_per_token * num_tokens

    @property
    def layer_stride(self) -> int:
        """Bytes from one layer's piece to the next within a page."""
        return self.piece_bytes(CHUNK_TOKENS)

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""
        return self.layer_stride * self.slice.num_layers

    @property
    def slot_bytes(self) -> int:
        """Landing memory of one read: a layer's piece, or at least one head of the widest dtype."""
        return max(self.layer_stride, 2 * CHUNK_TOKENS * self.shape.head_dim * max(ITEM_BYTES.values()))

    def piece_offset(self, layer: int) -> int:
        """Offset of ``layer`` (global number) within a page."""
        return (layer - self.slice.first_layer) * self.layer_stride


def prompt_sha256(token_ids: tuple[int, ...]) -> bytes:
    """Digest of a prompt: each id as 4 bytes, little-endian."""
    return sha256(pack(f"<{len(token_ids)}I", *token_ids)).digest()
