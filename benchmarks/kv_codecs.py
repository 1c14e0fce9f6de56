"""What a codec costs in accuracy: a model reads prompts whose KV went through the codec, and goes on from there.

Per codec, against the same model with the KV as it was made: KL divergence of next-token distributions and change of
perplexity on the text that follows, and how far greedy answers stay the same. As in a fleet the first token comes from
exact KV, and the KV of what follows the prompt is made with the prompt's as it arrived. The arithmetic is the
hand-over's own (``hexgen2.kv.pieces``); the model runs in float32 by transformers, one thread. With ``--vllm N`` the
first N greedy answers are made once more by a vLLM pair. Run from the root of the tree:
``python -m benchmarks.kv_codecs``.
"""

import asyncio
import json
import multiprocessing
import secrets
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import click
import torch
from tokenizers import Tokenizer

from benchmarks.serving import pair
from hexgen2.cli.fleet_config import default_model
from hexgen2.config import KvConfig, VllmEngineConfig
from hexgen2.engine import vllm_env
from hexgen2.engine.base import Sampling
from hexgen2.kv.codecs import CODECS, NONE, transfer_bytes
from hexgen2.kv.pieces import PieceFormat
from hexgen2.kv.wire import KvShape, chunk_span, num_chunks

#: K and V of one layer, ``[prompt, kv_head, token, head_dim]``, for each layer.
Kv = list[tuple[torch.Tensor, torch.Tensor]]

#: A yardstick: not a codec but what a receiver in bfloat16 makes of a sender's float32.
TO_BFLOAT16 = "none, to bfloat16"


@dataclass(frozen=True, slots=True)
class Row:
    """One codec against exact KV."""

    codec: str
    #: Of bytes in bfloat16.
    share_of_bytes: float
    #: Mean over all positions, in nats.
    kl_divergence: float
    perplexity: float
    #: Against exact KV, as a share of its perplexity.
    perplexity_change: float
    #: Positions of the text at which the most likely token is the same.
    same_top: float
    #: Of greedy answers, tokens before the first that differs.
    greedy_prefix: float
    equal_answers: int
    num_answers: int
    #: The last three once more, made by a vLLM pair, against the same pair without a codec.
    vllm_greedy_prefix: float | None = None
    vllm_equal_answers: int | None = None
    vllm_num_answers: int | None = None


def passages(tokenizer: Tokenizer, num: int, num_tokens: int) -> list[list[int]]:
    """Evenly spaced pieces of Python's language reference, as it comes with every Python."""
    ids = tokenizer.encode("\n\n".join(topics[name] for name in sorted(topics)), add_special_tokens=False).ids
    step = (len(ids) - num_tokens) // num
    return [ids[i * step : i * step + num_tokens] for i in range(num)]


def through(codec: str, kv: Kv) -> Kv:
    """As decode would get it: each head of each chunk written and read by the hand-over's own code."""
    if codec == TO_BFLOAT16:
        return [(k.bfloat16().float(), v.bfloat16().float()) for k, v in kv]
    num_prompts, num_heads, num_tokens, head_dim = kv[0][0].shape
    shape = KvShape(len(kv), num_heads, head_dim, "float32")
    piece_format = PieceFormat(secrets.token_bytes(32), codec, shape, torch.device("cpu"))
    result: Kv = []
    for layer, (k, v) in enumerate(kv):
        dense = torch.stack((k, v), 2)
        got = torch.empty_like(dense)
        for prompt in range(num_prompts):
            for chunk in range(num_chunks(num_tokens)):
                start, stop = chunk_span(chunk, num_tokens)
                encoded = torch.empty(num_heads, piece_format.head_bytes(stop - start), dtype=torch.uint8)
                piece = dense[prompt, :, :, start:stop]
                piece_format.write(encoded, piece, layer=layer, chunk=chunk, first_head=0)
                piece_format.read(got[prompt, :, :, start:stop], encoded, layer=layer, chunk=chunk, first_head=0)
        result.append((got[:, :, 0], got[:, :, 1]))
    return result


class Reference:
    """The model, by transformers."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def prefill(self, prompts: torch.Tensor) -> tuple[Kv, torch.Tensor]:
        """KV of prompts ``[prompt, token]`` and the most likely token after each."""
        layers, first = [], []
        for prompt in prompts:
            out = self._model(prompt[None], use_cache=True, logits_to_keep=1)
            layers.append([(layer.keys, layer.values) for layer in out.past_key_values.layers])
            first.append(out.logits[0, -1].argmax())
        kv = [(torch.cat([k for k, _ in each]), torch.cat([v for _, v in each])) for each in zip(*layers, strict=True)]
        return kv, torch.stack(first)

    @torch.inference_mode()
    def log_probs(self, kv: Kv, prompt: int, text: torch.Tensor) -> torch.Tensor:
        """``[token, vocabulary]``: of what follows each token of ``text``, which follows the prompt."""
        out = self._model(text[None], past_key_values=_cache([(k[prompt, None], v[prompt, None]) for k, v in kv]))
        return torch.log_softmax(out.logits[0], -1)

    @torch.inference_mode()
    def greedy(self, kv: Kv, first: torch.Tensor, num_tokens: int) -> list[list[int]]:
        """Answers of ``num_tokens`` to all prompts, beginning with ``first``."""
        cache, tokens = _cache(kv), [first]
        while len(tokens) < num_tokens:
            logits = self._model(tokens[-1][:, None], past_key_values=cache, use_cache=True).logits
            tokens.append(logits[:, -1].argmax(-1))
        answers: list[list[int]] = torch.stack(tokens, 1).tolist()
        return answers


def _cache(kv: Kv) -> Any:
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer, (k, v) in enumerate(kv):
        cache.update(k, v, layer)
    return cache


def measure(folder: Path, texts: Sequence[Sequence[int]], num_follow: int, codecs: Sequence[str]) -> list[Row]:
    """One row for each codec; the last ``num_follow`` tokens of each text are what follows its prompt."""
    model = Reference(folder)
    tokens = torch.tensor(texts)
    prompts, follow = tokens[:, :-num_follow], tokens[:, -num_follow:]
    kv, first = model.prefill(prompts)
    shape = KvShape(len(kv), kv[0][0].shape[1], kv[0][0].shape[3], "bfloat16")
    exact_answers = model.greedy(kv, first, num_follow)
    expected = [model.log_probs(kv, i, text)[:-1] for i, text in enumerate(follow)]
    num = follow[:, 1:].numel()
    exact_perplexity = _perplexity(expected, follow)
    rows: list[Row] = []
    for codec in codecs:
        arrived = through(codec, kv)
        got = [model.log_probs(arrived, i, text)[:-1] for i, text in enumerate(follow)]
        both = list(zip(expected, got, strict=True))
        perplexity = _perplexity(got, follow)
        prefix, equal = compare(model.greedy(arrived, first, num_follow), exact_answers)
        raw = transfer_bytes(NONE, shape, prompts.shape[1])
        name = NONE if codec == TO_BFLOAT16 else codec
        rows.append(
            Row(
                codec=codec,
                share_of_bytes=transfer_bytes(name, shape, prompts.shape[1]) / raw,
                kl_divergence=sum(float((a.exp() * (a - b)).sum()) for a, b in both) / num,
                perplexity=perplexity,
                perplexity_change=perplexity / exact_perplexity - 1,
                same_top=sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in both) / num,
                greedy_prefix=prefix,
                equal_answers=equal,
                num_answers=len(exact_answers),
            )
        )
        click.echo(f"{codec}: done", err=True)
    return rows


def _perplexity(log_probs: Sequence[torch.Tensor], follow: torch.Tensor) -> float:
    """Of every token of ``follow``, ``[prompt, token]``, but the first, which the prompt itself predicts."""
    losses = [-each.gather(1, text[1:, None]) for each, text in zip(log_probs, follow, strict=True)]
    return float(torch.cat(losses).mean().exp())


def compare(got: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]) -> tuple[float, int]:
    """Share of tokens before the first difference, and equal answers."""
    same = 0
    for mine, theirs in zip(got, expected, strict=True):
        same += next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b), len(theirs))
    return same / sum(map(len, expected)), sum(list(a) == list(b) for a, b in zip(got, expected, strict=True))


def vllm_answers(folder: Path, prompts: Sequence[Sequence[int]], num_tokens: int) -> dict[str, list[list[int]]]:
    """Greedy answers of a vLLM pair in float32 for each codec; in a process of its own."""
    engine = VllmEngineConfig.model_validate({"model": folder, "dtype": "float32", "max_model_len": 1024})
    sampling = Sampling(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)

    async def main() -> dict[str, list[list[int]]]:
        async with pair(engine, KvConfig(transport="tcp")) as ask:

            async def one(prompt: Sequence[int], codec: str) -> list[int]:
                return [token async for tokens in ask(prompt, sampling, codec) for token in tokens]

            return {codec: await asyncio.gather(*(one(prompt, codec) for prompt in prompts)) for codec in CODECS}

    return asyncio.run(main())


@click.command()
@click.option("--model", type=click.Path(path_type=Path), help="default: the default model")
@click.option("--prompts", "num_prompts", default=20, show_default=True)
@click.option("--prompt-tokens", default=384, show_default=True)
@click.option("--output-tokens", default=64, show_default=True)
@click.option("--vllm", "num_vllm", default=0, help="greedy answers to make by a vLLM pair as well")
@click.option("--json", "as_json", is_flag=True, help="print the rows as JSON")
def main(
    model: Path | None, num_prompts: int, prompt_tokens: int, output_tokens: int, num_vllm: int, as_json: bool
) -> None:
    """Measure what each codec costs in accuracy."""
    folder = model or default_model()
    vllm_env.prepare(1, cpu=True)
    torch.set_num_threads(1)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = passages(tokenizer, num_prompts, prompt_tokens + output_tokens)
    rows = measure(folder, texts, output_tokens, (NONE, TO_BFLOAT16, *CODECS[1:]))
    if num_vllm:
        prompts = [text[:prompt_tokens] for text in texts[:num_vllm]]
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as processes:
            answers = processes.submit(vllm_answers, folder, prompts, output_tokens).result()
        rows = [_with_vllm(row, answers) for row in rows]
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=1))
        return
    click.echo(f"{'codec':20}{'bytes':>8}{'KL, nats':>11}{'perplexity':>13}{'change':>9}{'same top':>10}", nl=False)
    click.echo(f"{'greedy prefix':>15}{'equal answers':>15}{'by vLLM: prefix, equal':>25}")
    for row in rows:
        click.echo(
            f"{row.codec:20}{row.share_of_bytes:8.0%}{row.kl_divergence:11.5f}{row.perplexity:13.3f}"
            f"{row.perplexity_change:9.2%}{row.same_top:10.1%}{row.greedy_prefix:15.1%}"
            f"{f'{row.equal_answers} of {row.num_answers}':>15}",
            nl=row.vllm_greedy_prefix is None,
        )
        if row.vllm_greedy_prefix is not None:
            click.echo(f"{row.vllm_greedy_prefix:14.1%}, {row.vllm_equal_answers} of {row.vllm_num_answers}")


def _with_vllm(row: Row, answers: dict[str, list[list[int]]]) -> Row:
    if row.codec not in answers:
        return row
    prefix, equal = compare(answers[row.codec], answers[NONE])
    return replace(row, vllm_greedy_prefix=prefix, vllm_equal_answers=equal, vllm_num_answers=len(answers[NONE]))


if __name__ == "__main__":
    main()
