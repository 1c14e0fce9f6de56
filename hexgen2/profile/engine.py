"""What an engine takes for prompts and for decode steps, measured on the engine that will run, alone in its worker."""

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from itertools import count
from statistics import median

from hexgen2.config import WorkerConfig
from hexgen2.engine.base import Engine, EngineRequest, Sampling
from hexgen2.worker.loading import loading

#: Each point is measured so often; the median counts.
REPEATS = 3
#: Prompt lengths, and batches with the context that each of their requests begins with.
PROMPTS = (16, 64, 128, 256, 512, 1024, 2048)
BATCHES = ((1, 32), (4, 32), (8, 32), (16, 32), (1, 512), (8, 512))
#: Decode steps that are timed, after a few that are not.
STEPS, WARM = 16, 3


@dataclass(frozen=True, slots=True)
class PromptTime:
    """Seconds to the first token of one prompt, alone."""

    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of a decode step of ``batch`` requests with so many tokens cached each."""

    batch: int
    context_tokens: float
    seconds: float


@dataclass(frozen=True, slots=True)
class EngineFigures:
    """Of one engine."""

    prompts: tuple[PromptTime, ...]
    steps: tuple[StepTime, ...]


async def measure(config: WorkerConfig, show: Callable[[str, float], None]) -> EngineFigures:
    """Start the worker's engine, time it, stop it. ``show``: what is being done, and how much of it is (0 to 1).

    Raises:
        HexgenError: the engine cannot be started, or fails.
    """
    show("engine: starting", 0.0)
    async with loading(config) as loaded:
        await loaded.start()
        return await timed(loaded.engine, show)


async def timed(engine: Engine, show: Callable[[str, float], None]) -> EngineFigures:
    """Of an engine that runs and has nothing else to do."""
    asked = _Asked(engine)
    lengths = [n for n in PROMPTS if n < engine.max_model_len]
    batches = [(b, c) for b, c in BATCHES if c + WARM + STEPS + 2 < engine.max_model_len]
    done, total = count(1), len(lengths) + len(batches)
    await asked.first_token_s(lengths[0])
    prompts, steps = [], []
    for tokens in lengths:
        seconds = median([await asked.first_token_s(tokens) for _ in range(REPEATS)])
        prompts.append(PromptTime(tokens, seconds))
        show(f"engine: {tokens} tokens of a prompt", next(done) / total)
    for batch, context in batches:
        seconds = median([await asked.step_s(batch, context) for _ in range(REPEATS)])
        steps.append(StepTime(batch, context + WARM + STEPS / 2, seconds))
        show(f"engine: decode steps of {batch} requests", next(done) / total)
    return EngineFigures(tuple(prompts), tuple(steps))


class _Asked:
    """Requests of random tokens, none of which a prefix cache has seen."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._random = random.Random(0)
        self._names = (f"profile-{number}" for number in count())

    async def first_token_s(self, tokens: int) -> float:
        """Of one prompt."""
        began = time.perf_counter()
        first, _ = await self._times(tokens, 1)
        return first - began

    async def step_s(self, batch: int, context: int) -> float:
        """Of a step, in the mean over those in which all requests take part."""
        num_tokens = WARM + STEPS + 1
        spans = await asyncio.gather(*(self._tokens(context, num_tokens) for _ in range(batch)))
        # From when the last request has begun to when the first one ends.
        since, until = max(times[WARM] for times in spans), min(times[-1] for times in spans)
        inside = [sum(since <= at <= until for at in times) - 1 for times in spans]
        if until <= since or max(inside) < 1:
            # They did not overlap: each for itself then.
            return median((times[-1] - times[WARM]) / (len(times) - 1 - WARM) for times in spans)
        return (until - since) / median(inside)

    async def _times(self, tokens: int, num_tokens: int) -> tuple[float, float]:
        times = await self._tokens(tokens, num_tokens)
        return times[0], times[-1]

    async def _tokens(self, tokens: int, num_tokens: int) -> list[float]:
        """When each output token came."""
        vocabulary = self._engine.model.vocab_size
        prompt = tuple(self._random.randrange(vocabulary) for _ in range(tokens))
        request = EngineRequest(next(self._names), prompt, Sampling(num_tokens, temperature=0.0, ignore_eos=True))
        async with aclosing(self._engine.generate(request)) as outputs:
            return list(_spread([(time.perf_counter(), len(each.tokens)) async for each in outputs]))


def _spread(outputs: list[tuple[float, int]]) -> Iterator[float]:
    """A time for each token; those that came together have one."""
    for at, num_tokens in outputs:
        yield from [at] * num_tokens
