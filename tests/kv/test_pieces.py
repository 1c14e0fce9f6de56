"""Dense KV, cut up by the ranks of one replica, sent, read and put together by those of another: what comes out."""

from dataclasses import dataclass
from itertools import pairwise

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from hexgen2.kv.codecs import CODECS, NONE, head_bytes, transfer_bytes
from hexgen2.kv.layout import rank_slices
from hexgen2.kv.memory import MemoryNetwork, MemoryTransport
from hexgen2.kv.messages import Failed, Fetched, OpenRecv, Piece, Source, ToService
from hexgen2.kv.pieces import TORCH_DTYPE, PieceFormat
from hexgen2.kv.quantise import Coder
from hexgen2.kv.send_buffer import SendBuffer
from hexgen2.kv.staging import Staging
from hexgen2.kv.wire import CHUNK_TOKENS, KvShape, PageLayout, RankSlice, num_chunks

CPU = torch.device("cpu")
TOKEN = b"a transfer's secret token, 32 B."


@dataclass(frozen=True)
class Case:
    """One hand-over of ``kv``, ``float32 [layer, kv_head, 2, token, head_dim]``."""

    kv: torch.Tensor
    sources: tuple[RankSlice, ...]
    targets: tuple[RankSlice, ...]
    codec: str
    sender: str
    receiver: str
    #: Chunks that are put at once.
    step: int = 1
    #: Whether reads may go where their bytes are to stay.
    direct: bool = False

    def shape(self, dtype: str) -> KvShape:
        layers, heads, _, _, head_dim = self.kv.shape
        return KvShape(layers, heads, head_dim, dtype)

    @property
    def num_tokens(self) -> int:
        return self.kv.shape[3]


@st.composite
def replicas(draw: st.DrawFn, num_layers: int, num_kv_heads: int) -> tuple[RankSlice, ...]:
    cuts = draw(st.lists(st.integers(1, num_layers - 1), max_size=2, unique=True)) if num_layers > 1 else []
    tp = draw(st.sampled_from([t for t in (1, 2, 3, 4, 6) if not num_kv_heads % t or not t % num_kv_heads]))
    return rank_slices([b - a for a, b in pairwise([0, *sorted(cuts), num_layers])], num_kv_heads, tp)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    layers, heads, head_dim = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.sampled_from((2, 5, 8)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dtypes = st.sampled_from(sorted(TORCH_DTYPE))
    return Case(
        kv=torch.randn((layers, heads, 2, draw(st.integers(1, 300)), head_dim), generator=generator),
        sources=draw(replicas(layers, heads)),
        targets=draw(replicas(layers, heads)),
        codec=draw(st.sampled_from(CODECS)),
        sender=draw(dtypes),
        receiver=draw(dtypes),
        step=draw(st.integers(1, 3)),
        direct=draw(st.booleans()),
    )


def sent(case: Case, network: MemoryNetwork) -> tuple[tuple[Source, ...], list[Piece]]:
    """All of it in the send buffers of the sources, whose pages are not in order."""
    sources, pieces = [], []
    chunks = num_chunks(case.num_tokens)
    pages = tuple(reversed(range(1, chunks + 1)))
    for part in case.sources:
        layout = PageLayout(case.shape(case.sender), part)
        buffer = SendBuffer(layout, (chunks + 1) * layout.page_bytes, CPU)
        transport = MemoryTransport(network)
        transport.register(buffer.buffer, None)
        buffer.open("t", TOKEN, case.num_tokens, case.codec, pages)
        for chunk in range(0, chunks, case.step):
            start, stop = chunk * CHUNK_TOKENS, min((chunk + case.step) * CHUNK_TOKENS, case.num_tokens)
            for layer in part.layers:
                heads = slice(part.kv_heads.start, part.kv_heads.stop)
                piece = case.kv[layer, heads, :, start:stop].to(TORCH_DTYPE[case.sender])
                digests = buffer.put("t", layer, chunk, piece)
                assert digests is not None
                pieces.append(Piece(part.rank, layer, chunk, tuple(d % 2**64 for d in digests.tolist())))
        sources.append(Source(part, (transport.endpoint(),), tuple(page * layout.page_bytes for page in pages)))
    return tuple(sources), pieces


def new_staging(layout: PageLayout, transport: MemoryTransport, staging_bytes: int, landing_bytes: int) -> Staging:
    return Staging(layout, [transport], CPU, staging_bytes=staging_bytes, landing_bytes=landing_bytes, stall_s=10.0)


def turned(staging: Staging) -> list[ToService]:
    messages: list[ToService] = []
    for _ in range(1000):
        messages += staging.turn()
        if messages:
            break
    return messages


def received(case: Case, network: MemoryNetwork) -> tuple[torch.Tensor, int]:
    """What the targets hold, all of one dtype, and the bytes that they have read."""
    sources, pieces = sent(case, network)
    got = torch.full_like(case.kv, torch.nan, dtype=TORCH_DTYPE[case.receiver])
    num_bytes = 0
    for part in case.targets:
        layout = PageLayout(case.shape(case.receiver), part)
        transport = MemoryTransport(network, direct=case.direct)
        chunks = num_chunks(case.num_tokens)
        staging = new_staging(layout, transport, chunks * layout.page_bytes, 3 * layout.slot_bytes)
        transport.register(None, staging.reads.landing)
        pages = tuple(range(chunks))
        staging.open(OpenRecv("t", TOKEN, case.num_tokens, case.codec, case.sender, pages, sources))
        staging.fetch("t", pieces)
        (fetched,) = turned(staging)
        assert isinstance(fetched, Fetched), fetched
        num_bytes += fetched.num_bytes
        staged = staging.staged("t")
        assert staged is not None
        for layer in part.layers:
            got[layer, part.kv_heads.start : part.kv_heads.stop] = staged.layer(layer)
    return got, num_bytes


def reference(case: Case) -> torch.Tensor:
    """Each head of each chunk by itself, by the definition of the codec."""
    kv = case.kv.to(TORCH_DTYPE[case.sender])
    if case.codec != NONE:
        parts = []
        for start in range(0, case.num_tokens, 128):
            part = kv[:, :, :, start : start + 128].flatten(0, 1).float()
            coder = Coder(case.codec, part.shape[0], part.shape[2], part.shape[3], CPU)
            coder.encode(part)
            coder.decode(part)
            parts.append(part.view(*kv.shape[:2], *part.shape[1:]))
        kv = torch.cat(parts, 3)
    return kv.to(TORCH_DTYPE[case.receiver])


@settings(deadline=None, max_examples=40)
@given(cases())
def test_every_rank_gets_its_part_of_the_dense_kv_whatever_ranks_dtypes_and_codec(case: Case) -> None:
    got, num_bytes = received(case, MemoryNetwork())
    assert torch.equal(got, reference(case))
    # Where ranks hold the same head, each reads it.
    copies = sum(t.num_kv_heads * t.num_layers for t in case.targets) / (case.kv.shape[0] * case.kv.shape[1])
    assert num_bytes == transfer_bytes(case.codec, case.shape(case.sender), case.num_tokens) * copies


@settings(deadline=None, max_examples=20)
@given(cases())
def test_a_bit_that_flips_on_its_way_is_seen_in_every_codec(case: Case) -> None:
    network = MemoryNetwork(corrupt=1)
    with pytest.raises(AssertionError, match="digest mismatch"):
        received(case, network)


@pytest.mark.parametrize("codec", CODECS)
def test_pieces_larger_than_a_group_are_written_and_read_in_parts(codec: str) -> None:
    shape = KvShape(num_layers=1, num_kv_heads=5, head_dim=128, dtype="float32")
    piece = torch.randn(5, 2, 128, 128, generator=torch.Generator().manual_seed(1))
    piece_format = PieceFormat(TOKEN, codec, shape, CPU)
    encoded = torch.zeros(5, head_bytes(codec, 128, 128, "float32"), dtype=torch.uint8)
    digests = piece_format.write(encoded, piece, layer=0, chunk=0, first_head=0)
    one_by_one = [
        piece_format.write(encoded[i : i + 1], piece[i : i + 1], layer=0, chunk=0, first_head=i) for i in range(5)
    ]
    assert torch.equal(digests, torch.cat(one_by_one))
    for dtype in (torch.float32, torch.bfloat16):
        got = torch.empty_like(piece, dtype=dtype)
        assert torch.equal(piece_format.read(got, encoded, layer=0, chunk=0, first_head=0), digests)
        assert (got.float() - piece).abs().max() < 0.5


def test_what_is_decoded_is_what_was_digested_though_the_landing_region_changes() -> None:
    """The bytes are copied once: a write that comes late changes neither the digest nor the values."""
    shape = KvShape(num_layers=1, num_kv_heads=1, head_dim=8, dtype="float32")
    piece = torch.randn(1, 2, 128, 8, generator=torch.Generator().manual_seed(1))
    for codec in CODECS:
        piece_format = PieceFormat(TOKEN, codec, shape, CPU)
        encoded = torch.zeros(1, head_bytes(codec, 128, 8, "float32"), dtype=torch.uint8)
        piece_format.write(encoded, piece, layer=0, chunk=0, first_head=0)
        got = torch.empty_like(piece)
        piece_format.read(got, encoded, layer=0, chunk=0, first_head=0)
        before = got.clone()
        encoded.fill_(0xFF)
        assert torch.equal(got, before)


def test_failures_name_their_place() -> None:
    shape = KvShape(num_layers=1, num_kv_heads=1, head_dim=8, dtype="float32")
    layout = PageLayout(shape, RankSlice(0, 0, 1, 0, 1))
    case = Case(torch.randn(1, 1, 2, 10, 8), (layout.slice,), (layout.slice,), "int8", "float32", "float32")
    network = MemoryNetwork()
    sources, pieces = sent(case, network)
    transport = MemoryTransport(network)
    staging = new_staging(layout, transport, layout.page_bytes, layout.slot_bytes)
    transport.register(None, staging.reads.landing)
    # The receiver believes in another codec: the digest refuses what it reads.
    staging.open(OpenRecv("t", TOKEN, 10, "fp8", "float32", (0,), sources))
    staging.fetch("t", [Piece(0, 0, 0, (pieces[0].digests[0] ^ 1,))])
    (failed,) = turned(staging)
    assert failed == Failed("t", "corrupt", "digest mismatch at layer 0, chunk 0, rank 0")
