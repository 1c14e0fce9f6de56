from hypothesis import given
from hypothesis import strategies as st

from hexgen2.engine.vllm_sends import Send, Sends
from hexgen2.kv.wire import CHUNK_TOKENS, chunk_span, num_chunks


def blocks_for(num_tokens: int, block_size: int, first_id: int = 0) -> list[int]:
    return list(range(first_id, first_id + -(-num_tokens // block_size)))


def test_a_chunk_is_sent_in_the_step_that_computes_its_last_token() -> None:
    sends = Sends(block_size=128)
    sends.admit("r", "t", 300)
    sends.replace_blocks("r", [7])
    assert sends.advance("r", 127) == ()
    assert sends.advance("r", 128) == (Send("t", 0, (7,), 0, 128),)
    sends.add_blocks("r", [3, 9])
    assert sends.advance("r", 299) == (Send("t", 1, (3,), 0, 128),)
    assert sends.advance("r", 300) == (Send("t", 2, (9,), 0, 44),)
    assert sends.advance("r", 301) == ()


def test_chunks_of_the_prefix_cache_go_with_the_first_step() -> None:
    sends = Sends(block_size=128)
    sends.admit("r", "t", 400)
    sends.replace_blocks("r", [4, 5, 6, 7])
    assert [send.chunk for send in sends.advance("r", 400)] == [0, 1, 2, 3]


def test_several_chunks_go_together_where_that_is_better() -> None:
    sends = Sends(block_size=128, chunks_per_send=3)
    sends.admit("r", "t", 600)
    sends.replace_blocks("r", [4, 5, 6, 7, 8])
    assert sends.advance("r", 300) == (Send("t", 0, (4, 5), 0, 256),)
    assert sends.advance("r", 600) == (Send("t", 2, (6, 7, 8), 0, 344),)


def test_a_preempted_request_sends_the_rest_from_its_new_blocks() -> None:
    sends = Sends(block_size=128)
    sends.admit("r", "t", 256)
    sends.replace_blocks("r", [1, 2])
    assert [send.chunk for send in sends.advance("r", 200)] == [0]
    sends.admit("r", "t", 256)
    sends.replace_blocks("r", [8, 9])
    assert sends.advance("r", 128) == ()
    assert sends.advance("r", 256) == (Send("t", 1, (9,), 0, 128),)


def test_blocks_larger_than_a_chunk_are_read_from_the_middle() -> None:
    sends = Sends(block_size=256)
    sends.admit("r", "t", 300)
    sends.replace_blocks("r", [1, 2])
    assert sends.advance("r", 300) == (
        Send("t", 0, (1,), 0, 128),
        Send("t", 1, (1,), 128, 128),
        Send("t", 2, (2,), 0, 44),
    )


def test_a_dropped_request_is_forgotten() -> None:
    sends = Sends(block_size=128)
    sends.admit("r", "t", 300)
    sends.drop("r")
    sends.drop("r")
    assert "r" not in sends
    assert len(sends) == 0


@given(
    num_tokens=st.integers(1, 1500),
    block_size=st.sampled_from([16, 32, 96, 128, 256]),
    steps=st.lists(st.integers(1, 400), max_size=20),
    preempt_at=st.integers(0, 20),
)
def test_every_token_is_sent_once_and_never_before_it_is_computed(
    num_tokens: int, block_size: int, steps: list[int], preempt_at: int
) -> None:
    sends = Sends(block_size)
    sends.admit("r", "t", num_tokens)
    generation = 0
    computed = 0
    seen: list[int] = []
    for number, step in enumerate([*steps, num_tokens]):
        if number == preempt_at or number == 0:
            generation += 1
            computed = 0
            sends.admit("r", "t", num_tokens)
            sends.replace_blocks("r", [])
        have = -(-computed // block_size)
        computed = min(num_tokens, computed + step)
        want = blocks_for(computed, block_size, first_id=1000 * generation)
        sends.add_blocks("r", want[have:])
        for send in sends.advance("r", computed):
            start, stop = chunk_span(send.chunk, num_tokens)
            assert stop <= computed
            assert send.num_tokens == stop - start <= CHUNK_TOKENS
            covered = [block * block_size for block in send.block_ids]
            first = (send.block_ids[0] - 1000 * generation) * block_size + send.skip
            assert first == start
            assert send.skip < block_size
            assert send.skip + send.num_tokens <= len(covered) * block_size
            assert list(send.block_ids) == list(range(send.block_ids[0], send.block_ids[0] + len(covered)))
            seen.append(send.chunk)
    assert seen == list(range(num_chunks(num_tokens)))
