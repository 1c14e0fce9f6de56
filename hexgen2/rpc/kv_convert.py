"""KV hand-off messages: wire <-> domain. A peer's are checked here for form; ``kv.handoff`` checks what they say."""

from hexgen2.engine.base import FinishReason
from hexgen2.errors import TransferRefused
from hexgen2.kv.handoff import FirstToken, Header, Offer
from hexgen2.kv.messages import Piece, Source
from hexgen2.kv.transport import MAX_ROUTES
from hexgen2.kv.wire import ITEM_BYTES, KvShape, RankSlice
from hexgen2.rpc.convert import finish_from_proto, finish_to_proto, token_from_proto, token_to_proto
from hexgen2.v1 import decode_pb2, prefill_pb2, types_pb2
from hexgen2.worker.receive import KvSummary

_SHAPE_LIMIT = 1 << 16
#: More than any replica has, few enough to plan for at once.
_MAX_RANKS = 1024


def offer_to_proto(offer: Offer) -> prefill_pb2.KvHeader:
    """The first message of FetchKv."""
    header = offer.header
    return prefill_pb2.KvHeader(
        model_sha256=header.model_sha256,
        prompt_sha256=header.prompt_sha256,
        prompt_tokens=header.num_tokens,
        shape=prefill_pb2.KvShape(
            num_layers=header.shape.num_layers,
            num_kv_heads=header.shape.num_kv_heads,
            head_dim=header.shape.head_dim,
            dtype=header.shape.dtype,
        ),
        codec=header.codec,
        chunk_tokens=header.chunk_tokens,
        transport=header.transport,
        ranks=[
            prefill_pb2.KvRank(
                rank=source.slice.rank,
                first_layer=source.slice.first_layer,
                num_layers=source.slice.num_layers,
                first_kv_head=source.slice.first_kv_head,
                num_kv_heads=source.slice.num_kv_heads,
                endpoints=source.endpoints,
                page_offsets=source.page_offsets,
            )
            for source in offer.sources
        ],
    )


def offer_from_proto(message: prefill_pb2.KvHeader) -> Offer:
    """As above.

    Raises:
        TransferRefused: a shape that cannot be.
    """
    shape = KvShape(message.shape.num_layers, message.shape.num_kv_heads, message.shape.head_dim, message.shape.dtype)
    if shape.dtype not in ITEM_BYTES:
        raise TransferRefused(f"dtype differs: offered {shape.dtype!r}, which is none of {', '.join(ITEM_BYTES)}")
    if len(message.ranks) > _MAX_RANKS:
        raise TransferRefused(f"ranks: {len(message.ranks)} were offered; the limit is {_MAX_RANKS}")
    for rank in message.ranks:
        if not (
            rank.first_layer + rank.num_layers <= shape.num_layers < _SHAPE_LIMIT
            and rank.first_kv_head + rank.num_kv_heads <= shape.num_kv_heads < _SHAPE_LIMIT
        ):
            raise TransferRefused(f"ranks: rank {rank.rank} lies outside the offered shape")
        if not 1 <= len(rank.endpoints) <= MAX_ROUTES:
            raise TransferRefused(
                f"ranks: rank {rank.rank} has {len(rank.endpoints)} endpoints; 1 to {MAX_ROUTES} can be"
            )
    header = Header(
        model_sha256=message.model_sha256,
        prompt_sha256=message.prompt_sha256,
        num_tokens=message.prompt_tokens,
        shape=shape,
        codec=message.codec,
        chunk_tokens=message.chunk_tokens,
        transport=message.transport,
    )
    sources = tuple(
        Source(
            RankSlice(rank.rank, rank.first_layer, rank.num_layers, rank.first_kv_head, rank.num_kv_heads),
            tuple(rank.endpoints),
            tuple(rank.page_offsets),
        )
        for rank in message.ranks
    )
    return Offer(header, sources)


def pieces_to_proto(pieces: tuple[Piece, ...]) -> prefill_pb2.KvPieces:
    """Pieces that are ready."""
    return prefill_pb2.KvPieces(
        pieces=[prefill_pb2.KvPiece(rank=p.rank, layer=p.layer, chunk=p.chunk, digests=p.digests) for p in pieces]
    )


def pieces_from_proto(message: prefill_pb2.KvPieces) -> tuple[Piece, ...]:
    """Pieces that are ready."""
    return tuple(Piece(p.rank, p.layer, p.chunk, tuple(p.digests)) for p in message.pieces)


def first_token_to_proto(first: FirstToken) -> prefill_pb2.FirstToken:
    """The first token, as the gateway and decode both get it."""
    return prefill_pb2.FirstToken(
        token=token_to_proto(first.token),
        finish_reason=finish_to_proto(first.finish_reason),
        cached_tokens=first.cached_tokens,
    )


def first_token_from_proto(message: prefill_pb2.FirstToken) -> FirstToken:
    """The first token."""
    finish: FinishReason | None = finish_from_proto(message.finish_reason)
    return FirstToken(token_from_proto(message.token), finish, message.cached_tokens)


def summary_to_proto(summary: KvSummary) -> decode_pb2.KvVerified:
    """One verified hand-off."""
    return decode_pb2.KvVerified(
        summary=types_pb2.KvSummary(
            bytes=summary.num_bytes,
            pieces=summary.num_pieces,
            transport=summary.transport,
            codec=summary.codec,
            seconds=summary.seconds,
        )
    )
