"""An open loop: requests come when they come, in phases of a rate and lengths, and every token is checked."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from time import perf_counter

import grpc

from benchmarks.chaos.oracle import emulated_answer
from hexgen2.config import EmulatedEngineConfig
from hexgen2.engine.base import Sampling
from hexgen2.rpc.client import channel
from hexgen2.rpc.convert import sampling_to_proto
from hexgen2.v1 import gateway_pb2, gateway_pb2_grpc

REQUEST_TIMEOUT_S = 180.0
#: Of an engine's vocabulary: below are special tokens.
FIRST_TOKEN, LAST_TOKEN = 3, 250


@dataclass(frozen=True, slots=True)
class Phase:
    """So many requests per second of such lengths for so long."""

    seconds: float
    rate: float
    prompt_tokens: int
    output_tokens: int


@dataclass(slots=True)
class Answer:
    """One request: when it came (seconds from the begin), its phase, and what became of it."""

    at_s: float
    phase: int
    ttft_s: float = 0.0
    tpot_s: float = 0.0
    #: The longest pause between two tokens.
    gap_s: float = 0.0
    tokens: list[int] = field(default_factory=list)
    error: str = ""
    #: It was still under way when nobody waited any more.
    open: bool = False
    wrong: bool = False

    @property
    def ended(self) -> bool:
        """Whether all of it came, and is right."""
        return not (self.error or self.open or self.wrong)

    def good(self, ttft_s: float, tpot_s: float) -> bool:
        """Whether it came within the limits."""
        return self.ended and self.ttft_s <= ttft_s and self.tpot_s <= tpot_s


def arrivals(phases: Sequence[Phase], seed: int) -> list[Answer]:
    """When requests come: the same for the same seed."""
    random, begin_s, found = Random(seed), 0.0, list[Answer]()
    for number, phase in enumerate(phases):
        at_s = begin_s + random.expovariate(phase.rate)
        while at_s < begin_s + phase.seconds:
            found.append(Answer(at_s, number))
            at_s += random.expovariate(phase.rate)
        begin_s += phase.seconds
    return found


async def drive(
    address: str,
    phases: Sequence[Phase],
    seed: int,
    *,
    wait_s: float,
    engine: EmulatedEngineConfig | None = None,
    show: Callable[[int, int], None] = lambda ended, all: None,
) -> list[Answer]:
    """Ask the gateway at ``address``; ``wait_s`` after the last phase what is under way is given up.

    With ``engine`` every token is compared with what that engine's definition says.
    """
    answers = arrivals(phases, seed)
    over = 0
    async with channel(address) as gateway:
        stub: gateway_pb2_grpc.GatewayAsyncStub = gateway_pb2_grpc.GatewayStub(gateway)

        async def one(number: int, answer: Answer) -> None:
            nonlocal over
            random = Random(f"{seed}/{number}")
            phase = phases[answer.phase]
            prompt = [random.randrange(FIRST_TOKEN, LAST_TOKEN) for _ in range(phase.prompt_tokens)]
            await _ask(stub, answer, prompt, phase.output_tokens)
            if engine is not None and answer.tokens:
                right = emulated_answer(engine, prompt, phase.output_tokens).answer
                answer.wrong = tuple(answer.tokens) != right[: len(answer.tokens)]
            over += 1
            show(over, len(answers))

        began = perf_counter()
        tasks = []
        for number, answer in enumerate(answers):
            await asyncio.sleep(max(0.0, began + answer.at_s - perf_counter()))
            answer.open = True
            tasks.append(asyncio.create_task(one(number, answer)))
        _, late = await asyncio.wait(tasks, timeout=wait_s)
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late)
    for task in tasks:
        if not task.cancelled():
            task.result()
    return answers


async def _ask(
    stub: "gateway_pb2_grpc.GatewayAsyncStub", answer: Answer, prompt: Sequence[int], output_tokens: int
) -> None:
    sampling = Sampling(max_tokens=output_tokens, temperature=0.0, ignore_eos=True)
    request = gateway_pb2.GenerateRequest(sampling=sampling_to_proto(sampling))
    request.prompt_token_ids.ids.extend(prompt)
    began = last = perf_counter()
    first = 0.0
    try:
        async for response in stub.Generate(request, timeout=REQUEST_TIMEOUT_S):
            if not response.tokens:
                continue
            now = perf_counter()
            if answer.tokens:
                answer.gap_s = max(answer.gap_s, now - last)
            first, last = first or now, now
            answer.tokens += [token.token_id for token in response.tokens]
        answer.open = False
        answer.wrong = len(answer.tokens) != output_tokens
    except grpc.aio.AioRpcError as error:
        answer.open = False
        answer.error = f"{error.code().name}: {error.details()}"
    answer.ttft_s = first - began if first else 0.0
    answer.tpot_s = (last - first) / max(1, len(answer.tokens) - 1)
