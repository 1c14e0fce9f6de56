"""Two tensor-parallel ranks a worker and a KV cache too small for all: right tokens, and pre-empted work is counted."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from random import Random

import pytest
import pytest_asyncio

from hexgen2.cli.fleet_config import FleetConfig
from tests.fleet.harness import GREEDY, Running, metric, running
from tests.models import make_tiny_llama

# Eight processes import vLLM: minutes on a machine that is busy.
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

#: 4 layers, K and V, 2 KV heads of 32 values of 4 bytes.
BYTES_PER_TOKEN = 4 * 2 * 2 * 32 * 4


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["ucx"])
async def fleet(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    model = make_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny")
    # A rank holds one head: 1 MiB is 1,024 tokens of its KV.
    engine = {
        "model": model,
        "tensor_parallel_size": 2,
        "max_model_len": 768,
        "block_size": 32,
        "kv_cache_bytes": 1 << 20,
    }
    async with running(FleetConfig.model_validate({"engine": engine, "kv": {"transport": request.param}})) as up:
        yield up


def prompt_of(num_tokens: int, seed: int) -> list[int]:
    return [Random(f"{seed}/{i}").randrange(3, 259) for i in range(num_tokens)]


@pytest.mark.parametrize("num_tokens", [1, 31, 128, 500])
async def test_two_ranks_hand_over_to_two_ranks(fleet: Running, num_tokens: int) -> None:
    prompt = prompt_of(num_tokens, seed=num_tokens)
    handed = await fleet.pair.generate(prompt, GREEDY)
    assert handed.tokens == await fleet.colocated(prompt, GREEDY)
    assert handed.kv is not None
    assert handed.kv.bytes == BYTES_PER_TOKEN * num_tokens
    assert handed.cached_tokens == num_tokens


async def test_preempted_requests_answer_as_if_alone(fleet: Running) -> None:
    sampling = replace(GREEDY, max_tokens=100)
    prompts = [prompt_of(250 + i, seed=100 + i) for i in range(5)]
    alone = [await fleet.colocated(prompt, sampling) for prompt in prompts]
    decode = fleet.plan.replica("decode-0")
    before = await metric(decode, "hexgen2:recomputed_tokens_total")
    answers = await asyncio.gather(*(fleet.ask(prompt, sampling) for prompt in prompts))
    assert [answer.tokens for answer in answers] == alone
    # Five of 350 tokens do not fit into 1,024: some were pre-empted on decode's side and computed again.
    assert await metric(decode, "hexgen2:recomputed_tokens_total") > before
    await fleet.settled()


async def test_prompts_that_do_not_fit_together_are_preempted_at_prefill_or_wait(fleet: Running) -> None:
    prompts = [prompt_of(700, seed=200 + i) for i in range(4)]
    sampling = replace(GREEDY, max_tokens=4)
    alone = [await fleet.colocated(prompt, sampling) for prompt in prompts]
    answers = await asyncio.gather(*(fleet.ask(prompt, sampling) for prompt in prompts))
    assert [answer.tokens for answer in answers] == alone
    await fleet.settled()
