"""Properties of the digest, and its values by a slow reference that shares no code with it."""

from hashlib import shake_128

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings

from hexgen2.kv import kernels
from hexgen2.kv.codec import DigestKey, as_move, copy_and_digest, digest, move_and_digest, to_wire

MAX_WORDS = 1024
TOKEN = b"a transfer's secret token, 32 B."
KEY = DigestKey(TOKEN, MAX_WORDS)
WORD = st.integers(-(2**31), 2**31 - 1) | st.sampled_from((0, 1, -1, 2**31 - 1, -(2**31)))


def of(piece: torch.Tensor, key: DigestKey = KEY, layer: int = 3, chunk: int = 5, first_head: int = 2) -> list[int]:
    return digest(piece, key, layer=layer, chunk=chunk, first_head=first_head).tolist()


def reference_multipliers(token: bytes, num_words: int) -> tuple[list[int], int]:
    stream = shake_128(b"hexgen2 kv digest\0" + token).digest(8 + 8 * num_words + 400)
    numbers = [int.from_bytes(stream[i : i + 4], "little") // 2 | 1 for i in range(8, len(stream), 4)]
    return list(dict.fromkeys(numbers))[:num_words], int.from_bytes(stream[:8], "little") | 1


def reference_digest(data: bytes, token: bytes, max_words: int, layer: int, chunk: int, head: int) -> int:
    multipliers, factor = reference_multipliers(token, max_words)
    words = [int.from_bytes(data[i : i + 4], "little", signed=True) for i in range(0, len(data), 4)]
    place = head << 52 | chunk << 32 | layer << 20 | len(words)
    return (sum(w * r for w, r in zip(words, multipliers, strict=False)) + factor * place) % 2**64


@pytest.fixture
def piece() -> torch.Tensor:
    """[3 heads, 2, 20 tokens, 8]."""
    return torch.randn(3, 2, 20, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_is_the_value_of_the_slow_reference(piece: torch.Tensor, dtype: torch.dtype) -> None:
    piece = piece.to(dtype)
    expected = [
        reference_digest(bytes(head.contiguous().view(torch.uint8).flatten().tolist()), TOKEN, MAX_WORDS, 3, 5, 2 + i)
        for i, head in enumerate(piece)
    ]
    assert to_wire(digest(piece, KEY, layer=3, chunk=5, first_head=2)) == tuple(expected)


def test_known_answer() -> None:
    """Part of the wire format: changing this value breaks clusters of mixed versions."""
    piece = torch.arange(8, dtype=torch.int32).view(2, 4)
    digests = to_wire(digest(piece, DigestKey(b"token", 4), layer=1, chunk=2, first_head=3))
    assert digests == (6733015372446286862, 13907249594548026110)
    assert digests[0] == reference_digest(piece[0].numpy().tobytes(), b"token", 4, 1, 2, 3)


@pytest.mark.parametrize("token", [b"", b"1", b"2"])
@pytest.mark.parametrize("num_words", [1, 2, 3, 1000, 1 << 16])
def test_multipliers_are_odd_positive_and_differ(token: bytes, num_words: int) -> None:
    multipliers = DigestKey(token, num_words)._multipliers.tolist()
    assert all(r % 2 and 0 < r < 2**31 for r in multipliers)
    assert len(set(multipliers)) == num_words


def test_multipliers_that_were_drawn_twice_are_left_out() -> None:
    num_words = 1 << 17
    assert DigestKey(TOKEN, num_words)._multipliers.tolist() == reference_multipliers(TOKEN, num_words)[0]
    stream = shake_128(b"hexgen2 kv digest\0" + TOKEN).digest(8 + 4 * num_words)
    drawn = [int.from_bytes(stream[i : i + 4], "little") // 2 | 1 for i in range(8, len(stream), 4)]
    assert len(set(drawn)) < num_words, "another token is needed to try this"


@given(words=st.lists(WORD, min_size=1, max_size=64), data=st.data())
def test_one_or_two_flipped_bits_are_seen_under_any_key(words: list[int], data: st.DataObject) -> None:
    key = DigestKey(data.draw(st.binary(max_size=4)), MAX_WORDS)
    piece = torch.tensor([words], dtype=torch.int32)
    raw = piece.clone().view(torch.uint8)
    bits = st.integers(0, raw.numel() * 8 - 1)
    for bit in data.draw(st.sets(bits, min_size=1, max_size=2)):
        raw[0, bit // 8] ^= 1 << bit % 8
    assert of(raw, key) != of(piece, key)


@given(words=st.lists(WORD, min_size=2, max_size=64), data=st.data())
def test_two_swapped_words_are_seen_under_any_key(words: list[int], data: st.DataObject) -> None:
    key = DigestKey(data.draw(st.binary(max_size=4)), MAX_WORDS)
    i, j = data.draw(st.lists(st.integers(0, len(words) - 1), min_size=2, max_size=2, unique=True))
    assume(words[i] != words[j])
    swapped = list(words)
    swapped[i], swapped[j] = words[j], words[i]
    assert of(torch.tensor([words], dtype=torch.int32), key) != of(torch.tensor([swapped], dtype=torch.int32), key)


def test_sign_bits_of_many_words_are_told_apart() -> None:
    """The weakest place of a sum modulo 2**64: of a product with a top bit only the low bits count."""
    num_words = 24
    base = torch.zeros(1, num_words, dtype=torch.int32)
    seen = {of(base)[0]}
    flips = 1
    for i in range(num_words):
        for j in range(i + 1, num_words):
            for k in range(j + 1, num_words):
                piece = base.clone()
                piece[0, [i, j, k]] = -(2**31)
                seen.add(of(piece)[0])
                flips += 1
    assert len(seen) == flips


@pytest.mark.parametrize("dim", [0, 1, 2, 3], ids=["heads", "K and V", "tokens", "values"])
@settings(max_examples=30)
@given(data=st.data())
def test_swapped_slices_are_seen(dim: int, data: st.DataObject) -> None:
    piece = torch.randn(3, 2, 20, 8, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 2**32))))
    order = list(range(piece.shape[dim]))
    i, j = data.draw(st.lists(st.sampled_from(order), min_size=2, max_size=2, unique=True))
    order[i], order[j] = j, i
    before, after = of(piece), of(piece.index_select(dim, torch.tensor(order)))
    changed = {i, j} if dim == 0 else {0, 1, 2}
    assert {head for head in range(3) if before[head] != after[head]} == changed


def test_equal_bytes_differ_by_layer_chunk_head_and_length() -> None:
    seen = set()
    for num_words in (1, 2, 3):
        piece = torch.zeros(4, num_words, dtype=torch.int32)
        for layer in range(8):
            for chunk in range(8):
                seen.update(of(piece, layer=layer, chunk=chunk, first_head=7))
    assert len(seen) == 3 * 8 * 8 * 4


def test_a_head_has_the_same_digest_in_any_slice_of_ranks(piece: torch.Tensor) -> None:
    assert of(piece[1:], first_head=3) == of(piece, first_head=2)[1:]


def test_keys_differ(piece: torch.Tensor) -> None:
    assert not set(of(piece)) & set(of(piece, DigestKey(TOKEN[::-1], MAX_WORDS)))


PLACE = st.tuples(st.integers(0, 4095), st.integers(0, 2**20 - 1), st.integers(0, 4095), st.sampled_from([b"a", b"b"]))


@given(one=PLACE, other=PLACE, words=st.lists(st.tuples(WORD, WORD), min_size=1, max_size=32))
def test_pieces_that_took_each_others_place_are_seen(
    one: tuple[int, int, int, bytes], other: tuple[int, int, int, bytes], words: list[tuple[int, int]]
) -> None:
    """Two heads, layers, chunks or requests (which have keys of their own) swapped whole, whatever their bytes."""
    assume(one != other)
    for swapped in range(2):
        piece = torch.tensor([[pair[swapped] for pair in words]], dtype=torch.int32)
        assume(bool(piece.any()) or one[:3] != other[:3])
        right, wrong = (
            of(piece, DigestKey(token, MAX_WORDS), layer, chunk, head) for layer, chunk, head, token in (one, other)
        )
        assert right != wrong


def test_a_copy_is_digested_and_not_its_source(piece: torch.Tensor) -> None:
    dst = torch.zeros_like(piece)
    assert copy_and_digest(dst, piece, KEY, layer=3, chunk=5, first_head=2).tolist() == of(piece)
    assert torch.equal(dst, piece)
    with pytest.raises(ValueError, match="shapes differ"):
        copy_and_digest(dst[1:], piece, KEY, layer=3, chunk=5, first_head=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_do_not_matter(piece: torch.Tensor, dtype: torch.dtype) -> None:
    """Gathered from [token, 2, head, dim] on one side, scattered into a longer tensor of tokens on the other."""
    piece = piece.to(dtype)
    token_major = piece.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3)
    whole = torch.zeros(3, 2, 50, 8, dtype=dtype)
    part = whole[:, :, 10:30]
    assert not token_major.is_contiguous()
    assert not part.is_contiguous()
    assert copy_and_digest(part, token_major, KEY, layer=3, chunk=5, first_head=2).tolist() == of(piece)
    assert torch.equal(whole[:, :, 10:30], piece)
    assert of(token_major) == of(piece)


def test_large_heads_are_copied_in_groups() -> None:
    key = DigestKey(TOKEN, 2 * 128 * 256)
    piece = torch.randn(5, 2, 128, 256, generator=torch.Generator().manual_seed(1))
    dst = torch.empty_like(piece)
    assert copy_and_digest(dst, piece, key, layer=0, chunk=0, first_head=0).tolist() == of(piece, key, 0, 0, 0)


@pytest.fixture(params=["numba", "numpy"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Either way to copy and digest on a CPU."""
    name = str(request.param)
    if name == "numba":
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(kernels, "_compiled", lambda: None)
    return name


DTYPES = st.sampled_from((torch.float32, torch.bfloat16, torch.float16, torch.uint8))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    heads=st.integers(1, 5),
    parts=st.integers(1, 2),
    tokens=st.integers(1, 9),
    dim=st.integers(1, 12),
    dtype=DTYPES,
    orders=st.tuples(*[st.permutations(range(4))] * 2),
    pads=st.tuples(*[st.tuples(*[st.integers(0, 3)] * 4)] * 2),
    seed=st.integers(0, 2**32),
)
def test_any_shape_and_strides_give_the_digest_of_the_bytes(
    kernel: str,
    heads: int,
    parts: int,
    tokens: int,
    dim: int,
    dtype: torch.dtype,
    orders: tuple[list[int], list[int]],
    pads: tuple[tuple[int, ...], tuple[int, ...]],
    seed: int,
) -> None:
    """Views into larger memory, axes in any order, rows at any offset; what lies around the copy stays as it is."""
    shape = (heads, parts, tokens, dim)
    assume(parts * tokens * dim * dtype.itemsize % 4 == 0)
    generator = torch.Generator().manual_seed(seed)

    def view(whole: torch.Tensor, which: int) -> torch.Tensor:
        back = [orders[which].index(axis) for axis in range(4)]
        return whole.view(dtype).permute(back)[tuple(slice(extra, None) for extra in pads[which])]

    wholes = []
    for order, pad in zip(orders, pads, strict=True):
        *sizes, last = (shape[axis] + pad[axis] for axis in order)
        size = (*sizes, last * dtype.itemsize)
        wholes.append(torch.randint(0, 256, size, generator=generator, dtype=torch.uint8))
    src, dst = (view(whole, which) for which, whole in enumerate(wholes))
    expected = wholes[1].clone()
    view(expected, 1).copy_(src)
    digests = copy_and_digest(dst, src, KEY, layer=3, chunk=5, first_head=2)
    assert torch.equal(wholes[1], expected)
    assert to_wire(digests) == tuple(
        reference_digest(head.flatten().view(torch.uint8).numpy().tobytes(), TOKEN, MAX_WORDS, 3, 5, 2 + i)
        for i, head in enumerate(src.clone(memory_format=torch.contiguous_format))
    )


def test_the_kernel_does_not_bend_to_what_it_cannot_do() -> None:
    """Rows that are not whole pairs of words are NumPy's."""
    piece = torch.zeros(2, 2, 4, 3, dtype=torch.bfloat16)
    key = DigestKey(TOKEN, MAX_WORDS)
    assert kernels.copy_and_sum(piece.transpose(1, 2), piece.transpose(1, 2), key._multipliers, 0, 0) is None


@given(
    heads=st.integers(1, 3),
    pairs=st.lists(st.integers(1, MAX_WORDS // 2), min_size=1, max_size=4),
    layer=st.integers(0, 4095),
)
def test_many_pieces_at_once_are_the_same_as_one_by_one(heads: int, pairs: list[int], layer: int) -> None:
    pieces = [torch.randint(-(2**31), 2**31, (heads, 2 * size), dtype=torch.int32) for size in pairs]
    copies = [torch.zeros_like(piece) for piece in pieces]
    moves = [
        as_move(
            copy.data_ptr(), piece.data_ptr(), heads, 4 * piece.shape[1], KEY, layer=layer, chunk=chunk, first_head=7
        )
        for chunk, (copy, piece) in enumerate(zip(copies, pieces, strict=True))
    ]
    assert move_and_digest(moves, KEY) == [
        each
        for chunk, piece in enumerate(pieces)
        for each in to_wire(digest(piece, KEY, layer=layer, chunk=chunk, first_head=7))
    ]
    assert all(map(torch.equal, copies, pieces))


def test_many_pieces_are_left_alone_where_one_is_not_whole_pairs() -> None:
    piece, copy = torch.ones(1, 3, dtype=torch.int32), torch.zeros(1, 3, dtype=torch.int32)
    move = as_move(copy.data_ptr(), piece.data_ptr(), 1, 12, KEY, layer=0, chunk=0, first_head=0)
    assert move_and_digest([move], KEY) is None
    assert not copy.any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_value(piece: torch.Tensor) -> None:
    key = DigestKey(TOKEN, MAX_WORDS, "cuda")
    assert of(piece.cuda(), key) == of(piece)
    dst = torch.empty_like(piece, device="cuda")
    assert copy_and_digest(dst, piece.cuda(), key, layer=3, chunk=5, first_head=2).tolist() == of(piece)


@pytest.mark.parametrize(
    ("piece", "place", "message"),
    [
        (torch.zeros(1, 3, dtype=torch.uint8), {}, "3 bytes per head"),
        (torch.zeros(1, MAX_WORDS + 1, dtype=torch.int32), {}, "1025 words per head"),
        (torch.zeros(1, 1, dtype=torch.int32), {"layer": 4096}, "layer: 4096"),
        (torch.zeros(1, 1, dtype=torch.int32), {"chunk": -1}, "chunk: -1"),
        (torch.zeros(2, 1, dtype=torch.int32), {"first_head": 4095}, "heads: "),
    ],
)
def test_what_has_no_place_is_refused(piece: torch.Tensor, place: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        digest(piece, KEY, **({"layer": 0, "chunk": 0, "first_head": 0} | place))


@pytest.mark.parametrize("max_words", [0, 1 << 20])
def test_a_key_has_bounds(max_words: int) -> None:
    with pytest.raises(ValueError, match="max_words"):
        DigestKey(TOKEN, max_words)
