"""A closed loop of requests on a running fleet: what is finished in a window, and how much of it within limits."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from statistics import mean
from time import perf_counter

import grpc

from hexgen2.engine.base import Sampling
from hexgen2.rpc.client import channel
from hexgen2.rpc.convert import sampling_to_proto
from hexgen2.v1 import gateway_pb2, gateway_pb2_grpc

REQUEST_TIMEOUT_S = 300.0
VOCABULARY = 250


@dataclass(frozen=True, slots=True)
class Ended:
    """One answer: when its last token came, and its times."""

    at_s: float
    ttft_s: float
    tpot_s: float


@dataclass(frozen=True, slots=True)
class Measured:
    """Of one window. ``goodput_rps``: of requests within the limit of time per token."""

    throughput_rps: float
    goodput_rps: float
    ttft_s: float
    tpot_s: float
    num_finished: int
    num_failed: int


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked: so many at a time, for so long after so long."""

    prompt_tokens: int
    output_tokens: int
    in_flight: int
    warm_s: float
    measure_s: float
    tpot_s: float


async def measure(addresses: Sequence[str], load: Load) -> Measured:
    """Run the loop against a fleet's gateways."""
    ended: list[Ended] = []
    failed = 0
    began = perf_counter()
    until = began + load.warm_s + load.measure_s

    async def client(number: int) -> None:
        nonlocal failed
        random = Random(number)
        async with channel(addresses[number % len(addresses)]) as gateway:
            stub: gateway_pb2_grpc.GatewayAsyncStub = gateway_pb2_grpc.GatewayStub(gateway)
            # Not all at once: later prompts would come in the same waves as the first ones.
            await asyncio.sleep(load.warm_s / 2 * number / load.in_flight)
            while perf_counter() < until:
                try:
                    ended.append(await _ask(stub, load, random))
                except grpc.aio.AioRpcError:
                    failed += 1
                    await asyncio.sleep(0.5)

    try:
        async with asyncio.timeout(load.warm_s + load.measure_s), asyncio.TaskGroup() as tasks:
            for number in range(load.in_flight):
                tasks.create_task(client(number))
    except TimeoutError:
        # What is still under way at the window's end is not counted.
        pass
    since = began + load.warm_s
    inside = [each for each in ended if each.at_s >= since]
    good = sum(each.tpot_s <= load.tpot_s for each in inside)
    return Measured(
        throughput_rps=len(inside) / load.measure_s,
        goodput_rps=good / load.measure_s,
        ttft_s=mean(each.ttft_s for each in inside) if inside else 0.0,
        tpot_s=mean(each.tpot_s for each in inside) if inside else 0.0,
        num_finished=len(inside),
        num_failed=failed,
    )


async def _ask(stub: "gateway_pb2_grpc.GatewayAsyncStub", load: Load, random: Random) -> Ended:
    sampling = Sampling(max_tokens=load.output_tokens, temperature=0.0, ignore_eos=True)
    request = gateway_pb2.GenerateRequest(sampling=sampling_to_proto(sampling))
    request.prompt_token_ids.ids.extend(random.randrange(3, VOCABULARY) for _ in range(load.prompt_tokens))
    began, first, num_tokens = perf_counter(), 0.0, 0
    async for response in stub.Generate(request, timeout=REQUEST_TIMEOUT_S):
        if response.tokens:
            num_tokens += len(response.tokens)
            first = first or perf_counter()
    now = perf_counter()
    if num_tokens != load.output_tokens:
        raise RuntimeError(f"an answer of {num_tokens} tokens, not {load.output_tokens}")
    return Ended(now, first - began, (now - first) / max(1, num_tokens - 1))
