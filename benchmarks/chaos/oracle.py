"""Prompts and the only right answers to them. An emulated model's answers follow from its definition alone; a real
model's are asked of one engine beforehand, without a hand-over.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from hexgen2.config import EmulatedEngineConfig
from hexgen2.engine.base import FinishReason
from hexgen2.engine.emulated_kv import MASK, kv_values, next_token, prefix_hashes, read_kv
from hexgen2.rpc.client import channel
from hexgen2.text.tokenizer import TextModel
from hexgen2.v1 import decode_pb2, decode_pb2_grpc, types_pb2

#: A real model on a busy CPU.
ASK_TIMEOUT_S = 300.0
#: No answer is longer.
MAX_TOKENS = 24
#: Around the edges of chunks (128 tokens), and between.
_EDGES = (1, 2, 17, 127, 128, 129, 255, 256, 257, 640)


@dataclass(frozen=True, slots=True)
class Known:
    """A prompt and its greedy continuation."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


def make_prompts(num: int, longest: int, vocabulary: range, seed: int) -> list[tuple[int, ...]]:
    """Prompts of one to several chunks; some share their beginning, so that a prefix taken for another shows."""
    random = Random(f"prompts/{seed}")
    shared = [random.choice(vocabulary) for _ in range(300)]
    prompts = []
    for number in range(num):
        if number < len(_EDGES) and _EDGES[number] <= longest:
            length = _EDGES[number]
        else:
            length = int(min(longest, 1 + random.expovariate(1 / (longest / 4))))
        begin = shared[: min(length - 1, 300)] if random.random() < 0.2 else []
        prompts.append((*begin, *(random.choice(vocabulary) for _ in range(length - len(begin)))))
    return prompts


def emulated_answer(config: EmulatedEngineConfig, prompt: Sequence[int], num_tokens: int = MAX_TOKENS) -> Known:
    """What a right fleet of emulated engines answers."""
    tokens = list(prompt)
    heads = range(config.num_kv_heads)
    hashes = prefix_hashes(tokens)
    first, checksum = 0, 0
    while True:
        for layer in range(config.num_layers):
            kv = kv_values(hashes, layer, heads, config.head_dim)
            checksum += read_kv(kv.view("uint8"), layer, heads, first)
        if len(tokens) == len(prompt) + num_tokens:
            return Known(tuple(prompt), tuple(tokens[len(prompt) :]))
        tokens.append(next_token(checksum & MASK, len(tokens), config.vocab_size))
        first = len(tokens) - 1
        hashes = prefix_hashes(tokens[-1:], int(hashes[-1]))


async def asked_answer(address: str, prompt: Sequence[int], num_tokens: int = MAX_TOKENS) -> Known:
    """What one decode replica answers by itself, prompt and all."""
    request = decode_pb2.DecodeRequest(
        request_id=f"oracle-{len(prompt)}",
        prompt_token_ids=prompt,
        sampling=types_pb2.SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True),
    )
    async with channel(address) as peer:
        stub: decode_pb2_grpc.DecodeAsyncStub = decode_pb2_grpc.DecodeStub(peer)
        call = stub.Decode(request, timeout=ASK_TIMEOUT_S)
        tokens = [token.token_id async for response in call for token in response.tokens.tokens]
    return Known(tuple(prompt), tuple(tokens))


def wrong_tokens(known: Known, got: Sequence[int]) -> str:
    """Where ``got`` is no beginning of the right answer; empty when it is."""
    for index, token in enumerate(got):
        if index >= len(known.answer) or token != known.answer[index]:
            right = known.answer[index] if index < len(known.answer) else "none"
            return f"token {index} is {token}, not {right}"
    return ""


def wrong_end(known: Known, got: Sequence[int], max_tokens: int, stop: int | None, finish: FinishReason | None) -> str:
    """Why an answer with an OK status is not whole; empty when it is."""
    right = known.answer[:max_tokens]
    expected = FinishReason.LENGTH
    if stop is not None and stop in right:
        right, expected = right[: right.index(stop) + 1], FinishReason.STOP
    if len(got) != len(right):
        return f"{len(got)} tokens, not {len(right)}"
    return "" if finish is expected else f"finished by {finish}, not {expected}"


def text_of(model: TextModel, prompt: Sequence[int], tokens: Sequence[int], *, whole: bool) -> str:
    """The text of ``tokens`` after ``prompt``; unless ``whole``, without what a next token could still change."""
    detokenizer = model.detokenizer(tuple(prompt))
    text = "".join(detokenizer.step(token) for token in tokens)
    return text + detokenizer.flush() if whole else text
