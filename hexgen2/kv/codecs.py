"""The codecs that KV may travel in: their names, and how many bytes each puts on the wire. Pure.

``quantise`` has the arithmetic; this is what plans, headers and checks need to know of it. With a codec other than
"none" one head's share of a chunk of ``t`` tokens is written as::

    scales           bfloat16 [head_dim]         of K: one per channel, over the chunk's tokens
                     bfloat16 [t]                of V: one per token
    minima           likewise, of K and of V     int4 alone
    values           [2 (K, V)][t][head_dim]     one byte each; int4: [t][head_dim], K's in the low half of a byte
    zeros            to a multiple of four bytes

A value is its scale times what is written (int8: two's complement; fp8: e4m3), for int4 plus its minimum.
"""

from typing import Final, Literal, get_args

from hexgen2.kv.wire import CHUNK_TOKENS, ITEM_BYTES, KvShape, chunk_span, num_chunks

#: As the engine has it: exact, unless the two sides have different dtypes.
NONE: Final = "none"
#: By name. int8: symmetric; fp8: e4m3, scaled to its range; int4: 16 steps from a minimum, two values a byte.
Codec = Literal["none", "int8", "fp8", "int4"]
CODECS: Final[tuple[str, ...]] = get_args(Codec)

_SCALE_BYTES = 2


def head_bytes(codec: str, num_tokens: int, head_dim: int, dtype: str) -> int:
    """Bytes on the wire of K and V of one layer and KV head, for up to a chunk of tokens.

    Args:
        codec: one of ``CODECS``.
        num_tokens: of the chunk; every chunk has scales of its own.
        head_dim: values of K, and of V, per token.
        dtype: the sender's; only "none" depends on it.

    Raises:
        KeyError: an unknown dtype.
        ValueError: an unknown codec.
    """
    values = 2 * num_tokens * head_dim
    if codec == NONE:
        return values * ITEM_BYTES[dtype]
    scales = _SCALE_BYTES * (head_dim + num_tokens)
    if codec in ("int8", "fp8"):
        return _padded(scales + values)
    if codec == "int4":
        return _padded(2 * scales + values // 2)
    raise ValueError(f"codec: {codec!r} is not one of {', '.join(CODECS)}")


def transfer_bytes(codec: str, shape: KvShape, num_tokens: int) -> int:
    """Bytes on the wire of a whole prompt's KV, all layers and heads."""
    spans = (chunk_span(chunk, num_tokens) for chunk in range(num_chunks(num_tokens)))
    per_head = sum(head_bytes(codec, stop - start, shape.head_dim, shape.dtype) for start, stop in spans)
    return shape.num_layers * shape.num_kv_heads * per_head


def head_bytes_per_token(codec: str, head_dim: int, dtype: str) -> float:
    """Bytes per token, layer and KV head, of full chunks: for planning."""
    return head_bytes(codec, CHUNK_TOKENS, head_dim, dtype) / CHUNK_TOKENS


def _padded(num_bytes: int) -> int:
    # Digests are over words of four bytes.
    return -(-num_bytes // 4) * 4
