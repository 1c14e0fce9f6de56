"""vLLM as the services run it: AsyncLLM, its core in a process of its own, real agents, KV over TCP."""

import asyncio
import json
import os
import random
import signal
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace

import pytest
import pytest_asyncio

pytest.importorskip("vllm")

from hexgen2.config import KvConfig, VllmEngineConfig
from hexgen2.engine.base import EngineOutput, EngineRequest, Sampling
from hexgen2.errors import ConfigError, EngineFailed, InvalidRequest
from tests.engine.pair import Pair, pair, running
from tests.eventually import eventually
from tests.models import make_tiny_llama

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="module")]

GREEDY = Sampling(max_tokens=12, temperature=0.0, ignore_eos=True)
KV = KvConfig(transport="tcp", send_bytes=32 << 20, staging_bytes=32 << 20, landing_bytes=4 << 20)


def prompt(num_tokens: int, seed: int = 0) -> list[int]:
    return random.Random(1000 * num_tokens + seed).choices(range(3, 259), k=num_tokens)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> VllmEngineConfig:
    # A longer context than KV memory holds: 2 KiB a token.
    model = make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=1 << 16)
    return VllmEngineConfig(model=model, kv_cache_bytes=16 << 20)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(config: VllmEngineConfig) -> AsyncIterator[Pair]:
    async with pair(config, config, KV) as workers:
        yield workers


async def exhaust(outputs: AsyncIterator[EngineOutput]) -> None:
    async for _ in outputs:
        pass


async def assert_idle(fleet: Pair) -> None:
    """Nothing runs, nothing is held on either side."""
    for engine, memory in (
        (fleet.prefill_engine, fleet.prefill_memory),
        (fleet.decode_engine, fleet.decode_memory),
    ):
        assert engine.num_requests() == (0, 0)
        assert memory.bytes_used == 0


async def test_concurrent_hand_overs_answer_as_one_engine(fleet: Pair) -> None:
    prompts = [prompt(n) for n in (1, 5, 127, 128, 129, 300, 640, 1000)]
    expected = [await fleet.colocated(p, GREEDY) for p in prompts]
    got = await asyncio.gather(*(fleet.hand_over(p, GREEDY) for p in prompts))
    assert [a.token_ids for a in got] == [a.token_ids for a in expected]
    assert [a.finish_reason for a in got] == ["length"] * len(prompts)
    # One prompt position is computed: the first token's.
    assert [a.decode_cached for a in got] == [len(p) for p in prompts]
    shape = fleet.prefill_engine.model.kv_shape
    assert [a.kv.num_bytes for a in got if a.kv] == [shape.bytes_per_token * len(p) for p in prompts]
    await assert_idle(fleet)


async def test_a_context_is_what_kv_memory_holds_of_it(fleet: Pair) -> None:
    limit = fleet.prefill_engine.max_model_len
    assert fleet.decode_engine.max_model_len == limit
    assert 7 * 1024 < limit <= 8 * 1024
    longest = prompt(limit - 2)
    answer = await fleet.hand_over(longest, replace(GREEDY, max_tokens=2))
    assert answer.token_ids == (await fleet.colocated(longest, replace(GREEDY, max_tokens=2))).token_ids
    assert len(answer.token_ids) == 2
    with pytest.raises(InvalidRequest, match=f"at most {limit - 1} leave room"):
        await exhaust(fleet.decode_engine.generate(EngineRequest("x", (3,) * limit, GREEDY)))
    await assert_idle(fleet)


async def test_cached_blocks_are_handed_over(fleet: Pair) -> None:
    shared = prompt(300, seed=4)
    for p, cached in ((shared + prompt(20), 0), (shared + prompt(30), 256)):
        answer = await fleet.hand_over(p, GREEDY)
        assert answer.prefill_cached == cached
        assert answer.token_ids == (await fleet.colocated(p, GREEDY)).token_ids


async def test_logprobs_come_with_every_token(fleet: Pair) -> None:
    sampling = replace(GREEDY, logprobs=3)
    answer = await fleet.hand_over(prompt(40), sampling)
    alone = await fleet.colocated(prompt(40), sampling)
    assert answer.token_ids == alone.token_ids
    for token, expected in zip(answer.tokens, alone.tokens, strict=True):
        assert [c.rank for c in token.top] == [1, 2, 3]
        assert token.top[0].token_id == token.token_id
        assert token.logprob == token.top[0].logprob
        assert expected.logprob == pytest.approx(token.logprob, abs=1e-4)
    bare = await fleet.colocated(prompt(40), replace(GREEDY, logprobs=0, max_tokens=2))
    assert [t.top for t in bare.tokens] == [(), ()]
    assert all(t.logprob is not None for t in bare.tokens)
    assert all(t.logprob is None for t in (await fleet.colocated(prompt(4), GREEDY)).tokens)


@pytest.mark.parametrize("seed", [0, 7, 2**63, 2**64 - 1])
async def test_a_seed_repeats_its_answer(fleet: Pair, seed: int) -> None:
    sampling = Sampling(max_tokens=8, temperature=1.0, top_p=0.95, top_k=50, seed=seed, ignore_eos=True)
    assert (await fleet.colocated(prompt(9), sampling)) == (await fleet.colocated(prompt(9), sampling))


async def test_a_stop_token_ends_the_answer_and_is_part_of_it(fleet: Pair) -> None:
    alone = await fleet.colocated(prompt(50), GREEDY)
    stop = alone.token_ids[5]
    end = alone.token_ids.index(stop) + 1
    for answer in (
        await fleet.colocated(prompt(50), replace(GREEDY, stop_token_ids=(stop,))),
        await fleet.hand_over(prompt(50), replace(GREEDY, stop_token_ids=(stop,))),
    ):
        assert answer.token_ids == alone.token_ids[:end]
        assert answer.finish_reason == "stop"


async def test_an_answer_is_held_to_a_json_schema(fleet: Pair) -> None:
    schema = json.dumps({"type": "object", "properties": {"n": {"enum": [1, 22]}}, "required": ["n"]})
    # Of the tiny model's tokens all but the first three are bytes of text.
    sampling = Sampling(max_tokens=64, temperature=0.0, json_schema=schema)
    answer = await fleet.colocated(prompt(9), sampling)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(fleet.decode_engine._config.model / "tokenizer.json"))
    assert json.loads(tokenizer.decode(answer.token_ids))["n"] in (1, 22)


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (EngineRequest("x", (), GREEDY), "prompt_token_ids"),
        (EngineRequest("x", (3,) * 8192, GREEDY), "prompt_token_ids"),
        (EngineRequest("x", (3, 259), GREEDY), "prompt_token_ids"),
        (EngineRequest("x", (-1,), GREEDY), "prompt_token_ids"),
        (EngineRequest("x", (3,), replace(GREEDY, top_p=0.0)), "sampling.top_p"),
        (EngineRequest("x", (3,), replace(GREEDY, temperature=-1.0)), "sampling.temperature"),
        (EngineRequest("x", (3,), replace(GREEDY, max_tokens=0)), "sampling.max_tokens"),
        (EngineRequest("x", (3,), replace(GREEDY, logprobs=10_000)), "sampling"),
        (EngineRequest("x", (3,), replace(GREEDY, json_schema="{broken")), "sampling"),
    ],
)
async def test_a_request_that_cannot_be_served_is_refused_by_field(fleet: Pair, bad: EngineRequest, field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        await exhaust(fleet.decode_engine.generate(bad))
    assert refused.value.field.startswith(field)
    assert "\n" not in str(refused.value)
    assert len((await fleet.colocated([3, 4], GREEDY)).token_ids) == 12


async def test_a_prefill_engine_has_no_tokenizer_for_schemas(fleet: Pair) -> None:
    with pytest.raises(InvalidRequest, match="json_schema"):
        await exhaust(fleet.prefill_engine.generate(EngineRequest("x", (3,), replace(GREEDY, json_schema="{}"))))


async def test_closing_the_iterator_aborts_in_the_engine(fleet: Pair) -> None:
    engine = fleet.decode_engine
    sampling = replace(GREEDY, max_tokens=1000)
    async with aclosing(engine.generate(EngineRequest("x", tuple(prompt(100)), sampling))) as outputs:
        async for _ in outputs:
            assert engine.num_requests()[0] == 1
            break
    assert engine.num_requests() == (0, 0)
    await fleet.colocated([3, 4], GREEDY)
    assert engine.kv_cache_usage == 0.0


async def test_cancelling_the_caller_aborts_in_the_engine(fleet: Pair) -> None:
    task = asyncio.ensure_future(fleet.colocated(prompt(900), replace(GREEDY, max_tokens=300)))
    await eventually(lambda: fleet.decode_engine.num_requests()[0] == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await fleet.colocated([3, 4], GREEDY)
    assert fleet.decode_engine.kv_cache_usage == 0.0
    await assert_idle(fleet)


async def test_a_client_that_leaves_during_prefill_frees_everything(fleet: Pair) -> None:
    task = asyncio.ensure_future(fleet.hand_over(prompt(1000, seed=5), GREEDY))
    await eventually(lambda: fleet.prefill_engine.num_requests()[0] == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await assert_idle(fleet)
    p = prompt(200)
    assert (await fleet.hand_over(p, GREEDY)).token_ids == (await fleet.colocated(p, GREEDY)).token_ids


# The last test of this fleet.
async def test_a_killed_engine_core_fails_its_requests_at_once(fleet: Pair) -> None:
    engine = fleet.decode_engine
    await engine.check_health()
    request = EngineRequest("x", tuple(prompt(100)), replace(GREEDY, max_tokens=1000))
    outputs = engine.generate(request)
    assert (await anext(outputs)).tokens
    for process in engine._llm.engine_core.resources.engine_manager.processes:
        os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(EngineFailed):
        await exhaust(outputs)
    with pytest.raises(EngineFailed):
        await engine.check_health()
    with pytest.raises(EngineFailed):
        await exhaust(engine.generate(request))
    assert engine.num_requests() == (0, 0)


async def test_an_engine_that_cannot_start_says_why(config: VllmEngineConfig) -> None:
    too_long = config.model_copy(update={"max_model_len": 1_000_000})
    with pytest.raises(ConfigError, match="max_model_len") as refused:
        async with running(too_long, KV, "prefill"):
            pass
    assert "\n" not in str(refused.value)
