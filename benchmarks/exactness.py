"""How often an answer that was handed over equals the one of a single vLLM engine, greedy, by dtype.

In float32 all do. In bfloat16 the arithmetic of a step depends on what else is in its batch and on how a prompt was cut
into chunks, with or without a hand-over, so a near tie may fall the other way: ``alone again`` shows how often a single
engine differs from itself when the same prompts come all at once. Run from the root of the tree:
``python -m benchmarks.exactness``.
"""

import asyncio
import json
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import click
from tokenizers import Tokenizer

from benchmarks.serving import Ask, alone, pair
from hexgen2.cli.fleet_config import default_model
from hexgen2.config import KvConfig, VllmEngineConfig
from hexgen2.engine.base import Sampling

TOPICS = ("the sea", "bread", "the moon", "a bridge", "winter", "a violin", "maps", "tea", "bees", "steam engines")
WORDS = ("short", "calm", "exact", "funny", "formal", "plain", "long", "kind")


@dataclass(frozen=True, slots=True)
class Row:
    """Answers of ``setup`` against those of one engine, one request at a time."""

    dtype: str
    setup: str
    equal_answers: int
    num_answers: int
    #: Of all answers, the share of tokens before the first difference.
    equal_prefix: float


def questions(num: int) -> list[str]:
    """Chat prompts of 30 to 400 tokens."""
    random = Random(0)
    texts = []
    for i in range(num):
        parts = [
            f"Write something {random.choice(WORDS)} about {random.choice(TOPICS)}." for _ in range(1 + i % 12 * 3)
        ]
        texts.append(f"<|im_start|>user\n{' '.join(parts)}<|im_end|>\n<|im_start|>assistant\n")
    return texts


async def answers(ask: Ask, prompts: Sequence[Sequence[int]], num_tokens: int, at_once: int) -> list[list[int]]:
    """Greedy answers, in the order of the prompts."""
    sampling = Sampling(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    room = asyncio.Semaphore(at_once)

    async def one(prompt: Sequence[int]) -> list[int]:
        async with room:
            return [token async for tokens in ask(prompt, sampling) for token in tokens]

    return await asyncio.gather(*map(one, prompts))


def run(
    setup: str, engine: VllmEngineConfig, prompts: Sequence[Sequence[int]], num_tokens: int, at_once: Sequence[int]
) -> list[list[list[int]]]:
    """Answers of one set-up for each number of requests at once; called in a process of its own."""

    async def main() -> list[list[list[int]]]:
        async with (pair if setup == "pair" else alone)(engine, KvConfig()) as ask:
            return [await answers(ask, prompts, num_tokens, each) for each in at_once]

    return asyncio.run(main())


def compare(dtype: str, setup: str, got: list[list[int]], expected: list[list[int]]) -> Row:
    """One row of the table."""
    same = 0
    for mine, theirs in zip(got, expected, strict=True):
        same += next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b), len(theirs))
    equal = sum(mine == theirs for mine, theirs in zip(got, expected, strict=True))
    return Row(dtype, setup, equal, len(expected), same / sum(map(len, expected)))


@click.command()
@click.option("--model", type=click.Path(path_type=Path), help="default: the default model")
@click.option("--dtype", "dtypes", multiple=True, default=("float32", "bfloat16"), show_default=True)
@click.option("--prompts", "num_prompts", default=24, show_default=True)
@click.option("--output-tokens", default=48, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="print the rows as JSON")
def main(model: Path | None, dtypes: tuple[str, ...], num_prompts: int, output_tokens: int, as_json: bool) -> None:
    """Compare hand-over and one engine."""
    model = model or default_model()
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    prompts = [tokenizer.encode(text, add_special_tokens=False).ids for text in questions(num_prompts)]
    spawn = multiprocessing.get_context("spawn")
    rows = []
    for dtype in dtypes:
        engine = VllmEngineConfig.model_validate({"model": model, "dtype": dtype, "max_model_len": 1024})
        with ProcessPoolExecutor(1, mp_context=spawn) as processes:
            expected, together = processes.submit(run, "alone", engine, prompts, output_tokens, (1, 8)).result()
        with ProcessPoolExecutor(1, mp_context=spawn) as processes:
            handed, handed_together = processes.submit(run, "pair", engine, prompts, output_tokens, (1, 8)).result()
        rows += [
            compare(dtype, "handed over, one by one", handed, expected),
            compare(dtype, "handed over, 8 at once", handed_together, expected),
            compare(dtype, "alone again, 8 at once", together, expected),
        ]
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=1))
        return
    click.echo(f"{'dtype':10}{'against one engine, one by one':32}{'equal answers':>15}{'equal prefix':>14}")
    for row in rows:
        click.echo(
            f"{row.dtype:10}{row.setup:32}{f'{row.equal_answers} of {row.num_answers}':>15}{row.equal_prefix:14.1%}"
        )


if __name__ == "__main__":
    main()
