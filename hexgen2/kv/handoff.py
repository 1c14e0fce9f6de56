"""What the two sides of one KV hand-off say to each other over FetchKv, and what must agree. Pure.

``kv.sending`` and ``kv.receiving`` are its two state machines; ``hexgen2.worker`` acts for them.
"""

from dataclasses import dataclass

from hexgen2.engine.base import FinishReason, SampledToken
from hexgen2.kv.codecs import NONE
from hexgen2.kv.messages import Piece, Source
from hexgen2.kv.wire import CHUNK_TOKENS, ITEM_BYTES, KvShape


@dataclass(frozen=True, slots=True)
class Header:
    """What a transfer carries; the receiver compares it with what it was given."""

    model_sha256: bytes
    prompt_sha256: bytes
    num_tokens: int
    shape: KvShape
    codec: str
    chunk_tokens: int
    transport: str


@dataclass(frozen=True, slots=True)
class Offer:
    """First message of FetchKv: every rank of the sender holds its pages."""

    header: Header
    sources: tuple[Source, ...]


@dataclass(frozen=True, slots=True)
class FirstToken:
    """Prefill's own token. ``finish_reason`` is set when it ends the answer: then nobody needs the KV."""

    token: SampledToken
    finish_reason: FinishReason | None
    cached_tokens: int


#: Pieces that lie complete in the sender's buffers come as tuples.
FetchMessage = Offer | tuple[Piece, ...] | FirstToken


def header_for(
    model_sha256: bytes, prompt_digest: bytes, num_tokens: int, shape: KvShape, transport: str, codec: str = NONE
) -> Header:
    """The header of a transfer as this version makes and accepts it."""
    return Header(model_sha256, prompt_digest, num_tokens, shape, codec, CHUNK_TOKENS, transport)


def difference(offered: Header, asked: Header) -> str:
    """The first thing in which an offer is not what was asked for; empty when there is none.

    Its dtype may be any that is known: the receiver converts.
    """
    for name, ours, theirs in (
        ("model", asked.model_sha256.hex()[:16], offered.model_sha256.hex()[:16]),
        ("prompt", asked.prompt_sha256.hex()[:16], offered.prompt_sha256.hex()[:16]),
        ("prompt_tokens", asked.num_tokens, offered.num_tokens),
        ("num_layers", asked.shape.num_layers, offered.shape.num_layers),
        ("num_kv_heads", asked.shape.num_kv_heads, offered.shape.num_kv_heads),
        ("head_dim", asked.shape.head_dim, offered.shape.head_dim),
        ("codec", asked.codec, offered.codec),
        ("chunk_tokens", asked.chunk_tokens, offered.chunk_tokens),
        ("transport", asked.transport, offered.transport),
    ):
        if theirs != ours:
            # Theirs is a peer's word, as long as it likes.
            return f"{name} differs: offered {str(theirs)[:64]}, expected {ours}"
    if offered.shape.dtype not in ITEM_BYTES:
        return f"dtype differs: offered {offered.shape.dtype[:64]}, expected one of {', '.join(ITEM_BYTES)}"
    return ""
