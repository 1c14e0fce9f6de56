"""Real engines, one after the other in this process, and agents that keep KV in a dictionary.

Every answer through prefill and decode must equal the one that vLLM gives by itself.
"""

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("vllm")

from hexgen2.config import VllmEngineConfig, home
from hexgen2.kv.wire import num_chunks
from tests.engine.inprocess import Answer, InProcess, Store, engine
from tests.models import make_tiny_llama

pytestmark = pytest.mark.vllm

NUM_LAYERS = 4
LENGTHS = (1, 2, 5, 127, 128, 129, 255, 256, 257, 300, 640, 1000)
NUM_OUTPUT = 16
TIGHT = (316, 440, 600)


def random_prompt(num_tokens: int, seed: int = 0) -> list[int]:
    return random.Random(1000 * num_tokens + seed).choices(range(3, 259), k=num_tokens)


SHARED = random_prompt(300, seed=7)
SHARING = (SHARED + random_prompt(50, seed=1), SHARED + random_prompt(90, seed=2), SHARED + random_prompt(3, seed=3))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> VllmEngineConfig:
    model = make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", num_layers=NUM_LAYERS)
    return VllmEngineConfig(model=model, max_model_len=1280, kv_cache_bytes=64 << 20)


@pytest.fixture(scope="module")
def alone(config: VllmEngineConfig) -> Callable[[list[int]], list[int]]:
    """What vLLM answers by itself, each prompt alone."""
    prompts = [*map(random_prompt, LENGTHS), *SHARING, *(random_prompt(n, seed=9) for n in TIGHT)]
    with engine(Store(), config, "bare") as bare:
        answers = {tuple(prompt): bare.run(prompt, NUM_OUTPUT).token_ids for prompt in prompts}
    return lambda prompt: answers[tuple(prompt)]


def prefill(engine: InProcess, store: Store, prompts: list[list[int]], name: str = "t") -> list[Answer]:
    """All at once."""
    ids = [engine.add(p, send=store.hold(f"{name}{i}", len(p))) for i, p in enumerate(prompts)]
    engine.finish()
    return [engine.answer(i) for i in ids]


def decode(engine: InProcess, prompts: list[list[int]], first: list[Answer], name: str = "t") -> list[Answer]:
    ids = [
        engine.add(p + a.token_ids, NUM_OUTPUT - 1, load=f"{name}{i}")
        for i, (p, a) in enumerate(zip(prompts, first, strict=True))
    ]
    engine.finish()
    return [engine.answer(i) for i in ids]


def whole(first: list[Answer], rest: list[Answer]) -> list[list[int]]:
    return [a.token_ids + b.token_ids for a, b in zip(first, rest, strict=True)]


def assert_complete(store: Store, transfer_id: str, num_tokens: int) -> None:
    pieces = store.pieces[transfer_id]
    assert set(pieces) == {(layer, c) for layer in range(NUM_LAYERS) for c in range(num_chunks(num_tokens))}
    values = sum(piece.numel() for piece in pieces.values())
    assert values == NUM_LAYERS * 2 * 2 * 32 * num_tokens


def assert_idle(engine: InProcess, num_blocks: int) -> None:
    assert engine.free_blocks == num_blocks
    assert len(engine.connector._sends) == 0
    assert not engine.connector._loaded
    assert not engine.connector._new_loads


@pytest.fixture(scope="module")
def prefilled(config: VllmEngineConfig, alone: object) -> tuple[Store, dict[str, Any]]:
    """One prefill engine's work for the tests below: chunked, concurrent, with the prefix cache on."""
    store = Store()
    seen: dict[str, Any] = {}
    with engine(store, config, "prefill") as p:
        blocks = p.free_blocks
        prompts = [random_prompt(n) for n in LENGTHS]
        seen["lengths"] = [p.run(prompt, send=store.hold(f"t{i}", len(prompt))) for i, prompt in enumerate(prompts)]
        seen["together"] = prefill(p, store, list(SHARING), "together")
        p._llm.reset_prefix_cache()
        seen["in turn"] = [p.run(prompt, send=store.hold(f"turn{i}", len(prompt))) for i, prompt in enumerate(SHARING)]
        seen["twice"] = p.run(SHARING[1], send=store.hold("twice", len(SHARING[1])))

        # Aborted between two steps: what was sent stays sent, the rest never comes, nothing is kept.
        request_id = p.add(prompts[-1], send=store.hold("aborted", 1000))
        p.step()
        p.abort(request_id)
        p.finish()
        seen["aborted"] = set(store.pieces["aborted"])

        # Given up by the service, which the engine hears of later: it computes, but copies nothing more.
        p._llm.reset_prefix_cache()
        request_id = p.add(prompts[-1], send=store.hold("given up", 1000))
        p.step()
        store.held.discard("given up")
        puts = store.puts
        p.finish()
        seen["given up"] = (p.answer(request_id), store.puts - puts)
        assert_idle(p, blocks)
    return store, seen


def test_every_piece_is_sent_once_and_announced(prefilled: tuple[Store, dict[str, Any]]) -> None:
    store, _ = prefilled
    for i, num_tokens in enumerate(LENGTHS):
        assert_complete(store, f"t{i}", num_tokens)
        announced = sorted(chunk for transfer_id, chunk in store.announced if transfer_id == f"t{i}")
        assert announced == sorted(c for c in range(num_chunks(num_tokens)) for _ in range(NUM_LAYERS))


def test_blocks_of_the_prefix_cache_are_sent_too(prefilled: tuple[Store, dict[str, Any]]) -> None:
    store, seen = prefilled
    assert [answer.num_cached_tokens for answer in seen["in turn"]] == [0, 256, 256]
    assert seen["twice"].num_cached_tokens == 384
    for i, prompt in enumerate(SHARING):
        assert_complete(store, f"turn{i}", len(prompt))
        assert_complete(store, f"together{i}", len(prompt))
    assert_complete(store, "twice", len(SHARING[1]))


def test_an_aborted_or_abandoned_transfer_stops_where_it_is(prefilled: tuple[Store, dict[str, Any]]) -> None:
    _, seen = prefilled
    # One step of 256 tokens.
    assert seen["aborted"] == {(layer, chunk) for layer in range(NUM_LAYERS) for chunk in (0, 1)}
    answer, puts = seen["given up"]
    assert answer.finish_reason == "length"
    assert puts == 0


def test_preempted_requests_answer_as_vllm_alone(
    config: VllmEngineConfig, alone: Callable[[list[int]], list[int]]
) -> None:
    """Both sides with room for little more than one request, so that they are pre-empted half way."""
    store = Store()
    prompts = [random_prompt(n, seed=9) for n in TIGHT]
    # Nine blocks of 128 tokens, one of which vLLM keeps for itself.
    block_bytes = 128 * NUM_LAYERS * 2 * 2 * 32 * 4
    tight = config.model_copy(update={"kv_cache_bytes": 9 * block_bytes, "max_model_len": 1024})
    with engine(store, tight, "prefill", long_prefill_token_threshold=64) as p:
        blocks = p.free_blocks
        ids = [p.add(prompt, send=store.hold(f"t{i}", len(prompt))) for i, prompt in enumerate(prompts)]
        preempted = 0
        while p._llm.has_unfinished_requests():
            p.step()
            preempted = max(preempted, sum(r.num_preemptions for r in p.scheduler.requests.values()))
        first = [p.answer(i) for i in ids]
        assert preempted, "prefill was to be pre-empted"
        assert_idle(p, blocks)
    for i, prompt in enumerate(prompts):
        assert_complete(store, f"t{i}", len(prompt))
    with engine(store, tight.model_copy(update={"block_size": 32}), "decode") as d:
        blocks = d.free_blocks
        # The first three fit with their prompts (34 of 35 blocks of 32), but not with their answers.
        order = (0, 1, 0, 2, 1, 0)
        ids = [d.add(prompts[i] + first[i].token_ids, NUM_OUTPUT - 1, load=f"t{i}") for i in order]
        d.finish()
        assert whole([first[i] for i in order], [d.answer(i) for i in ids]) == [alone(prompts[i]) for i in order]
        assert_idle(d, blocks)
    assert store.counts["recomputed_tokens"] > 0
    assert len(store.loaded) == len(order), "each request loads once"


def test_smollm2_in_float32_answers_as_vllm_alone() -> None:
    model = home() / "models" / "SmolLM2-135M-Instruct"
    if not (model / "config.json").exists():
        pytest.skip(f"{model} is not there (`make setup` prepares it)")
    config = VllmEngineConfig(model=model, max_model_len=2048, kv_cache_bytes=512 << 20)
    prompts = [random.Random(n).choices(range(20, 40_000), k=n) for n in (5, 130, 300)]
    store = Store()
    with engine(store, config, "bare") as bare:
        expected = [bare.run(prompt, NUM_OUTPUT).token_ids for prompt in prompts]
    with engine(store, config, "prefill") as p:
        first = prefill(p, store, prompts)
    with engine(store, config, "decode") as d:
        assert whole(first, decode(d, prompts, first)) == expected


# From here on one decode engine lives through the module.


@pytest.fixture(scope="module", params=[128, 64], ids=["same blocks", "smaller blocks"])
def decoder(request: pytest.FixtureRequest, config: VllmEngineConfig, prefilled: Any) -> Iterator[InProcess]:
    with engine(prefilled[0], config.model_copy(update={"block_size": request.param}), "decode") as d:
        yield d


def test_prompts_of_all_lengths_decode_as_vllm_alone(
    decoder: InProcess, prefilled: tuple[Store, dict[str, Any]], alone: Callable[[list[int]], list[int]]
) -> None:
    store, seen = prefilled
    blocks = decoder.free_blocks
    prompts = [random_prompt(n) for n in LENGTHS]
    store.loaded.clear()
    rest = decode(decoder, prompts, seen["lengths"])
    assert whole(seen["lengths"], rest) == [alone(prompt) for prompt in prompts]
    # One prompt position is computed: the first token's.
    assert [answer.num_cached_tokens for answer in rest] == list(LENGTHS)
    assert store.loaded == [f"t{i}" for i in range(len(LENGTHS))]
    assert_idle(decoder, blocks)


@pytest.mark.parametrize("name", ["together", "in turn"])
def test_prompts_that_share_a_prefix_decode_as_vllm_alone(
    decoder: InProcess, prefilled: Any, alone: Callable[[list[int]], list[int]], name: str
) -> None:
    rest = decode(decoder, list(SHARING), prefilled[1][name], name.removeprefix("in "))
    assert whole(prefilled[1][name], rest) == [alone(prompt) for prompt in SHARING]


def test_loaded_and_colocated_requests_share_a_batch(
    decoder: InProcess, prefilled: Any, alone: Callable[[list[int]], list[int]]
) -> None:
    prompts = [random_prompt(n) for n in (300, 640)]
    first = prefilled[1]["lengths"][LENGTHS.index(300)]
    loaded = decoder.add(prompts[0] + first.token_ids, NUM_OUTPUT - 1, load=f"t{LENGTHS.index(300)}")
    colocated = decoder.add(prompts[1], NUM_OUTPUT)
    decoder.finish()
    assert first.token_ids + decoder.answer(loaded).token_ids == alone(prompts[0])
    assert decoder.answer(colocated).token_ids == alone(prompts[1])
    assert decoder.answer(colocated).num_cached_tokens == 0


def test_a_transfer_that_is_gone_fails_its_request_alone(
    decoder: InProcess, prefilled: Any, alone: Callable[[list[int]], list[int]]
) -> None:
    blocks = decoder.free_blocks
    first = prefilled[1]["lengths"]
    gone = decoder.add([*random_prompt(640), 5], 5, load="never held")
    fine = decoder.add(random_prompt(129) + first[5].token_ids, NUM_OUTPUT - 1, load="t5")
    decoder.finish()
    assert decoder.answer(gone).finish_reason == "error"
    assert decoder.answer(gone).token_ids == []
    assert first[5].token_ids + decoder.answer(fine).token_ids == alone(random_prompt(129))
    assert_idle(decoder, blocks)


def test_kv_of_another_length_is_not_loaded(decoder: InProcess, prefilled: Any) -> None:
    store = prefilled[0]
    store.loaded.clear()
    wrong = decoder.add([*random_prompt(300), 5], 5, load=f"t{LENGTHS.index(640)}")
    decoder.finish()
    assert decoder.answer(wrong).finish_reason == "error"
    # Its staging is let go all the same.
    assert store.loaded == []


@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_an_aborted_load_leaves_nothing_behind(decoder: InProcess, prefilled: Any, num_steps: int) -> None:
    blocks = decoder.free_blocks
    first = prefilled[1]["lengths"][-1]
    request_id = decoder.add(random_prompt(1000) + first.token_ids, NUM_OUTPUT, load=f"t{len(LENGTHS) - 1}")
    for _ in range(num_steps):
        decoder.step()
    decoder.abort(request_id)
    decoder.finish()
    # The engine hears of the abort's blocks with its next step.
    decoder.run([3, 4, 5])
    assert_idle(decoder, blocks)
