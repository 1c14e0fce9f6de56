from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexgen2.kv.messages import (
    MAX_FRAME_BYTES,
    Close,
    Failed,
    Fetched,
    Loaded,
    Piece,
    Ready,
    ToService,
    agent_reader,
    encode,
    service_reader,
)

MESSAGES: list[ToService] = [
    Ready("t", (Piece(0, 1, 2, (1, 2**64 - 1)),)),
    Fetched("t", 10, 2, 0.5, "tcp"),
    Failed("t", "corrupt", "why"),
    Loaded("t"),
]


@given(st.lists(st.integers(0, 200), max_size=20))
def test_messages_survive_any_cutting_of_the_stream(cuts: list[int]) -> None:
    stream = b"".join(map(encode, MESSAGES))
    edges = sorted({0, len(stream), *(c for c in cuts if c < len(stream))})
    reader = service_reader()
    got = [m for a, b in pairwise(edges) for m in reader.feed(stream[a:b])]
    assert got == MESSAGES


def test_a_message_of_the_other_side_is_an_error() -> None:
    with pytest.raises(ValueError, match="Invalid"):
        agent_reader().feed(encode(Loaded("t")))


def test_a_frame_beyond_the_limit_is_an_error() -> None:
    with pytest.raises(ValueError, match="limit"):
        agent_reader().feed((MAX_FRAME_BYTES + 1).to_bytes(4, "little"))


def test_closing_round_trips() -> None:
    assert agent_reader().feed(encode(Close("t"))) == [Close("t")]
