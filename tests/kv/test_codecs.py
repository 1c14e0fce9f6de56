import pytest

from hexgen2.errors import InvalidRequest
from hexgen2.kv.codecs import CODECS, head_bytes, head_bytes_per_token, transfer_bytes
from hexgen2.kv.wire import KvShape
from hexgen2.rpc.convert import codec_from_proto


def test_bytes_on_the_wire() -> None:
    assert head_bytes("none", 128, 64, "float32") == 2 * 128 * 64 * 4
    assert head_bytes("none", 128, 64, "bfloat16") == 2 * 128 * 64 * 2
    # Scales of 64 channels and 128 tokens, two bytes each; int4 has minima besides.
    assert head_bytes("int8", 128, 64, "float32") == 2 * (64 + 128) + 2 * 128 * 64
    assert head_bytes("fp8", 128, 64, "float16") == head_bytes("int8", 128, 64, "bfloat16")
    assert head_bytes("int4", 128, 64, "float32") == 4 * (64 + 128) + 128 * 64


@pytest.mark.parametrize("codec", CODECS)
def test_digests_find_whole_words_and_each_head_fits_where_the_raw_one_does(codec: str) -> None:
    for num_tokens in (1, 2, 3, 127, 128):
        for head_dim in (2, 3, 64):
            size = head_bytes(codec, num_tokens, head_dim, "float16")
            assert size % 4 == 0
            assert size <= head_bytes("none", 128, head_dim, "float16")


def test_a_prompt_takes_the_bytes_of_its_chunks() -> None:
    shape = KvShape(num_layers=3, num_kv_heads=2, head_dim=64, dtype="bfloat16")
    assert transfer_bytes("none", shape, 300) == shape.bytes_per_token * 300
    per_head = 2 * head_bytes("int8", 128, 64, "bfloat16") + head_bytes("int8", 44, 64, "bfloat16")
    assert transfer_bytes("int8", shape, 300) == 6 * per_head
    assert head_bytes_per_token("int8", 64, "bfloat16") == 131


def test_other_names_are_refused() -> None:
    with pytest.raises(ValueError, match="'zip' is not one of none, int8, fp8, int4"):
        head_bytes("zip", 1, 1, "float32")
    with pytest.raises(InvalidRequest, match=r"transfer\.codec: 'zip' is not one of"):
        codec_from_proto("zip", "transfer.codec")
    assert codec_from_proto("", "transfer.codec") == "none"
