"""What a run is run on: engine, workers, transport, and pools so small that they fill."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from benchmarks.chaos.asks import Kind
from benchmarks.chaos.house import House, HouseConfig
from benchmarks.chaos.oracle import Known, asked_answer, emulated_answer, make_prompts
from hexgen2.config import MIB, EmulatedEngineConfig, EngineConfig, KvConfig, VllmEngineConfig
from hexgen2.kv.wire import CHUNK_TOKENS
from hexgen2.model import ModelSpec, load_model

#: Pages (chunks of tokens) that a pool holds: fewer than the requests at work would like to have.
POOL_PAGES = 24
LANDING_LAYERS = 8
MAX_QUEUED = 48
#: Pools of a real model, whose prompts are shorter here.
VLLM_POOL_PAGES = 12
VLLM_MAX_MODEL_LEN = 2048


@dataclass(frozen=True, slots=True)
class Answers:
    """What may be asked: prompts with their right answers, and some too large for any pool."""

    known: tuple[Known, ...]
    oversize: tuple[Known, ...]


@dataclass(frozen=True, slots=True)
class Setting:
    """See the module. ``answers`` is asked once the fleet is up; ``roles`` are those of the workers."""

    title: str
    config: HouseConfig
    seconds: float
    rate: float
    lanes: int
    burst_every_s: float
    without: tuple[Kind, ...]
    answers: Callable[[House], Awaitable[Answers]]

    @property
    def roles(self) -> tuple[str, ...]:
        """Of the workers."""
        return ("flexible",) if self.config.num_flexible else ("prefill", "decode")


def emulated(
    folder: Path, tokenizer: Path, transport: str, *, crosses: bool, links: bool, seconds: float, rate: float, seed: int
) -> Setting:
    """Emulated engines; ``crosses``: two workers of both phases instead of two prefill and two decode."""
    vocab_size = load_model(tokenizer).vocab_size
    engine = EmulatedEngineConfig(vocab_size=vocab_size, prefill_tokens_per_s=10_000.0, decode_step_base_s=0.005)
    token_bytes = engine.num_layers * engine.num_kv_heads * engine.head_dim * 2 * 4
    # Lower ones are special in most vocabularies.
    vocabulary = range(min(300, vocab_size // 4), vocab_size)

    async def answers(_: House) -> Answers:
        prompts = make_prompts(300, 1000, vocabulary, seed)
        large = (Random(seed).choice(vocabulary),) * (POOL_PAGES * CHUNK_TOKENS + 200)
        return Answers(tuple(emulated_answer(engine, each) for each in prompts), (emulated_answer(engine, large),))

    counts = {"num_prefill": 0, "num_decode": 0, "num_flexible": 2} if crosses else {}
    workers = "two workers of both phases" if crosses else "two prefill, two decode"
    return Setting(
        title=f"emulated engine, {workers}, {transport}, {'a link each' if links else 'loopback'}",
        config=HouseConfig(
            folder,
            tokenizer,
            engine,
            _kv(transport, token_bytes, engine.num_layers, POOL_PAGES),
            namespaces=links,
            **counts,
        ),
        seconds=seconds,
        rate=rate,
        lanes=2,
        burst_every_s=15.0,
        without=(),
        answers=answers,
    )


def vllm(folder: Path, model: Path, transport: str, *, seconds: float, rate: float, seed: int) -> Setting:
    """vLLM itself, one prefill and one decode replica; its answers are those of one engine without a hand-over."""
    spec: ModelSpec = load_model(model)
    engine: EngineConfig = VllmEngineConfig(model=model, max_model_len=VLLM_MAX_MODEL_LEN, kv_cache_bytes=512 * MIB)
    token_bytes = spec.num_layers * spec.num_kv_heads * spec.head_dim * 2 * 4

    async def answers(house: House) -> Answers:
        prompts = make_prompts(12, 400, range(300, 9000), seed)
        known = [await asked_answer(house.of("decode")[0].address, prompt) for prompt in prompts]
        large = (1000,) * (VLLM_POOL_PAGES * CHUNK_TOKENS + 100)
        # It is served by one decode replica alone while there is no prefill replica.
        return Answers(tuple(known), (await asked_answer(house.of("decode")[0].address, large),))

    return Setting(
        title=f"vLLM ({model.name}), one prefill, one decode, {transport}, loopback",
        config=HouseConfig(
            folder,
            model,
            engine,
            _kv(transport, token_bytes, spec.num_layers, VLLM_POOL_PAGES),
            num_prefill=1,
            num_decode=1,
            start_timeout_s=600.0,
        ),
        seconds=seconds,
        rate=rate,
        lanes=1,
        burst_every_s=0.0,
        # Penalties change what a real model answers.
        without=(Kind.HISTORY,),
        answers=answers,
    )


def _kv(transport: str, token_bytes: int, num_layers: int, pages: int) -> KvConfig:
    page_bytes = CHUNK_TOKENS * token_bytes
    return KvConfig.model_validate(
        {
            "transport": transport,
            "send_bytes": pages * page_bytes,
            "staging_bytes": pages * page_bytes,
            "landing_bytes": LANDING_LAYERS * page_bytes // num_layers,
            "max_queued": MAX_QUEUED,
        }
    )


def settings(
    folders: Callable[[str], Path],
    *,
    engine: str,
    transports: Sequence[str],
    cross: bool,
    no_links: bool,
    model: Path,
    seconds: float,
    rate: float,
    seed: int,
) -> list[Setting]:
    """What to run, one after the other; ``seconds`` and ``rate`` as a person gave them."""
    if engine == "vllm":
        share = seconds / len(transports)
        return [vllm(folders(name), model, name, seconds=share, rate=rate, seed=seed) for name in transports]
    shares = {(name, cross): 1.0 for name in transports}
    if len(transports) > 1:
        shares = {("tcp", False): 0.5, ("tcp", True): 0.2, ("ucx", False): 0.3}
    return [
        emulated(
            folders(name),
            model,
            name,
            crosses=crosses,
            # UCX reads between network namespaces go over its emulated TCP, which is not for production: loopback.
            links=not no_links and name == "tcp",
            seconds=seconds * share,
            rate=rate,
            seed=seed,
        )
        for (name, crosses), share in shares.items()
    ]
