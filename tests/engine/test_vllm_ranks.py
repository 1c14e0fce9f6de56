"""Several ranks per engine: each holds a part of the KV, and prefill's parts are not decode's."""

import random
from collections.abc import Mapping
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from hexgen2.config import KvConfig, VllmEngineConfig
from hexgen2.engine.base import Sampling
from hexgen2.errors import ConfigError
from hexgen2.kv.wire import KvShape, RankSlice
from tests.engine.inprocess import Store, engine
from tests.engine.pair import pair
from tests.models import make_tiny_llama

pytestmark = pytest.mark.vllm

GREEDY = Sampling(max_tokens=12, temperature=0.0, ignore_eos=True)


def slice_of(rank: int, size: int, num_kv_heads: int, layers: Mapping[int, None]) -> RankSlice:
    from hexgen2.engine.vllm_connector import _rank_slice

    parallel = SimpleNamespace(rank=rank, tensor_parallel_size=size)
    return _rank_slice(SimpleNamespace(parallel_config=parallel), KvShape(8, num_kv_heads, 64, "float32"), layers)


def test_tensor_parallel_ranks_share_out_heads_and_stages_share_out_layers() -> None:
    first, second = dict.fromkeys(range(5)), dict.fromkeys(range(5, 8))
    assert slice_of(0, 2, 4, first) == RankSlice(0, 0, 5, 0, 2)
    assert slice_of(1, 2, 4, first) == RankSlice(1, 0, 5, 2, 2)
    assert slice_of(3, 2, 4, second) == RankSlice(3, 5, 3, 2, 2)


def test_with_more_ranks_than_heads_neighbours_hold_the_same_head() -> None:
    layers = dict.fromkeys(range(8))
    assert [slice_of(rank, 4, 2, layers).kv_heads for rank in range(4)] == [
        range(0, 1),
        range(0, 1),
        range(1, 2),
        range(1, 2),
    ]


def test_layers_with_gaps_are_refused() -> None:
    with pytest.raises(ConfigError, match="contiguous"):
        slice_of(0, 1, 2, {0: None, 2: None})


@pytest.mark.slow
async def test_unlike_ranks_hand_over_to_each_other(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Two tensor-parallel ranks prefill, two pipeline stages decode; one engine by itself says what is right."""
    model = make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", num_layers=5)
    config = VllmEngineConfig(model=model, max_model_len=1024, kv_cache_bytes=32 << 20)
    prompts = [random.Random(n).choices(range(3, 259), k=n) for n in (3, 130, 700)]
    with engine(Store(), config, "bare") as bare:
        expected = [bare.run(prompt, GREEDY.max_tokens).token_ids for prompt in prompts]
    kv = KvConfig(transport="tcp", send_bytes=8 << 20, staging_bytes=8 << 20, landing_bytes=1 << 20)
    two_ranks = config.model_copy(update={"tensor_parallel_size": 2})
    two_stages = config.model_copy(update={"pipeline_parallel_size": 2})
    async with pair(two_ranks, two_stages, kv) as workers:
        answers = [await workers.hand_over(prompt, GREEDY) for prompt in prompts]
        assert [answer.token_ids for answer in answers] == expected
        shape = workers.prefill_engine.model.kv_shape
        for answer, prompt in zip(answers, prompts, strict=True):
            assert answer.kv is not None
            assert answer.kv.num_bytes == shape.bytes_per_token * len(prompt)
            assert answer.decode_cached == len(prompt)
        assert (await workers.colocated(prompts[1], GREEDY)).token_ids == expected[1]
