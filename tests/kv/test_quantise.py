"""What a codec changes, by bounds that follow from its format alone, and the format itself by known bytes."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from hexgen2.kv.codecs import head_bytes
from hexgen2.kv.quantise import Coder

CPU = torch.device("cpu")
LOSSY = ("int8", "fp8", "int4")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def there_and_back(codec: str, piece: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    heads, _, num_tokens, head_dim = piece.shape
    coder = Coder(codec, heads, num_tokens, head_dim, CPU)
    coder.encode(piece)
    got = torch.full_like(piece, torch.nan, dtype=dtype)
    coder.decode(got)
    return got


def allowed(codec: str, piece: torch.Tensor) -> torch.Tensor:
    """The largest error of each value: K's scales are over tokens, V's over channels, both as bfloat16."""
    dims = (1, 2)
    parts = []
    for half, dim in zip(piece.float().unbind(1), dims, strict=True):
        low, high = half.amin(dim, keepdim=True), half.amax(dim, keepdim=True)
        largest = torch.maximum(low.abs(), high.abs())
        if codec == "int8":
            error = largest / 127 * 0.52 + 0 * half
        elif codec == "fp8":
            # Four significant bits, or half of the smallest step.
            error = half.abs() / 16 + largest / 448 * 2**-10 * 1.01
        else:
            error = (high - low) / 15 * 0.52 + largest * 2**-8 + 0 * half
        parts.append(error)
    return torch.stack(parts, 1) + 2.0**-90


@st.composite
def pieces(draw: st.DrawFn) -> torch.Tensor:
    shape = (draw(st.integers(1, 3)), 2, draw(st.integers(1, 128)), draw(st.integers(1, 9)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    piece = torch.randn(shape, generator=generator)
    # Channels far larger than others, and far from zero.
    piece *= 10.0 ** torch.randint(-4, 4, (1, 1, 1, shape[3]), generator=generator)
    piece += draw(st.sampled_from((0.0, 1.0, -30.0)))
    return piece * draw(st.sampled_from((0.0, 1e-30, 1.0, 300.0)))


@settings(deadline=None)
@given(piece=pieces(), codec=st.sampled_from(LOSSY))
def test_no_value_is_further_off_than_its_codec_allows(piece: torch.Tensor, codec: str) -> None:
    assert ((there_and_back(codec, piece) - piece).abs() <= allowed(codec, piece)).all()


@settings(deadline=None, max_examples=30)
@given(piece=pieces(), codec=st.sampled_from(LOSSY), sender=st.sampled_from(DTYPES), receiver=st.sampled_from(DTYPES))
def test_either_side_may_have_any_dtype(
    piece: torch.Tensor, codec: str, sender: torch.dtype, receiver: torch.dtype
) -> None:
    sent = piece.clamp(-60000, 60000).to(sender)
    got = there_and_back(codec, sent, receiver)
    assert got.dtype == receiver
    assert torch.equal(got, there_and_back(codec, sent.float()).to(receiver))


@pytest.mark.parametrize("codec", LOSSY)
def test_zeros_stay_zeros_and_constants_nearly_so(codec: str) -> None:
    assert not there_and_back(codec, torch.zeros(2, 2, 5, 3)).any()
    constant = torch.full((1, 2, 5, 3), -7.25)
    assert torch.allclose(there_and_back(codec, constant), constant, rtol=2**-8)


@pytest.mark.parametrize("codec", LOSSY)
def test_strides_do_not_matter_and_a_coder_keeps_nothing(codec: str) -> None:
    piece = torch.randn(3, 2, 20, 8, generator=torch.Generator().manual_seed(1))
    token_major = piece.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3)
    expected = there_and_back(codec, piece)
    coder = Coder(codec, 3, 20, 8, CPU)
    coder.encode(piece * 100)
    coder.encode(token_major)
    whole = torch.zeros(3, 2, 50, 8)
    coder.decode(whole[:, :, 10:30])
    assert torch.equal(whole[:, :, 10:30], expected)
    assert not whole[:, :, :10].any()


#: One head, two tokens, two channels.
K = [[127.0, -1.0], [63.5, 0.25]]
V = [[0.0, 254.0], [4.0, -4.0]]


@pytest.mark.parametrize(
    ("codec", "expected"),
    [
        # Scales 1, 1/127, 2, 4/127, each as bfloat16; then values over scales.
        ("int8", "803f 013c 0040 013d  7f 81 40 20  00 7f 7f 81"),
        # The largest is 448 = 0x7e; half of it 0x76; a quarter 0x6e; bit 7 is the sign.
        ("fp8", "913e 123b 113f 123c  7e fe 76 6e  00 7e 7e fe"),
        # Scales: (127 - 63.5)/15, 1.25/15, 254/15, 8/15; minima: 63.5, -1, 0, -4. K's codes in the low halves.
        ("int4", "8740 ab3d 8741 093f  7e42 80bf 0000 80c0  0f f0 f0 0f"),
    ],
)
def test_known_bytes(codec: str, expected: str) -> None:
    """Part of the wire format: changing these breaks clusters of mixed versions."""
    coder = Coder(codec, 1, 2, 2, CPU)
    coder.encode(torch.tensor([[K, V]]))
    assert bytes(coder.encoded[0].tolist()).hex() == expected.replace(" ", "")
    assert coder.encoded.shape[1] == head_bytes(codec, 2, 2, "float32")


def test_every_fp8_code_is_decoded_as_torch_decodes_it() -> None:
    coder = Coder("fp8", 1, 128, 1, CPU)
    encoded = coder.encoded[0]
    encoded[: 2 * 129].view(torch.bfloat16).fill_(1.0)
    # All but the two that are no numbers.
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    encoded[2 * 129 : 2 * 129 + 254] = codes
    got = torch.empty(1, 2, 128, 1)
    coder.decode(got)
    assert torch.equal(got.flatten()[:254], codes.view(torch.float8_e4m3fn).float())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("codec", LOSSY)
def test_cuda_decodes_the_same_values(codec: str) -> None:
    piece = torch.randn(3, 2, 100, 64, generator=torch.Generator().manual_seed(1))
    here, there = (Coder(codec, 3, 100, 64, torch.device(each)) for each in ("cpu", "cuda"))
    here.encode(piece)
    there.encode(piece.cuda())
    assert (there.encoded.cpu() == here.encoded).float().mean() > 0.999
    there.encoded.copy_(here.encoded)
    got = torch.empty_like(piece, device="cuda")
    there.decode(got)
    expected = torch.empty_like(piece)
    here.decode(expected)
    assert torch.equal(got.cpu(), expected)
