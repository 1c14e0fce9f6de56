"""Output tokens per second through all four services, beside the same two engines without them, and one vLLM alone.

Closed loop: so many requests at a time, random prompts, every answer of the same length. Each set-up runs by itself,
one after the other, in processes of its own; what bounds all of them on a CPU is the engines' arithmetic. Run from
the root of the tree: ``python -m benchmarks.serving``.
"""

import asyncio
import json
import multiprocessing
import secrets
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import aclosing, asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from statistics import median
from time import perf_counter
from typing import Literal, Protocol

import click

from hexgen2.cli.fleet import Fleet
from hexgen2.cli.fleet_config import FleetConfig, default_model
from hexgen2.config import KvConfig, VllmEngineConfig, WorkerConfig
from hexgen2.engine.base import Engine, EngineOutput, EngineRequest, Sampling
from hexgen2.kv.codecs import NONE
from hexgen2.kv.handoff import FirstToken
from hexgen2.kv.ranks import Ranks
from hexgen2.plan import Role
from hexgen2.rpc.client import channel
from hexgen2.rpc.convert import sampling_to_proto
from hexgen2.v1 import gateway_pb2, gateway_pb2_grpc
from hexgen2.worker.aio import PageQueue
from hexgen2.worker.decode import DecodeJob, DecodeWorker
from hexgen2.worker.loading import loading
from hexgen2.worker.prefill import PrefillJob, PrefillWorker
from hexgen2.worker.receive import RemoteKv

START_TIMEOUT_S = 240.0
REQUEST_TIMEOUT_S = 600.0

#: One request: the tokens of its answer, as they come.
Ask = Callable[[Sequence[int], Sampling], AsyncIterator[list[int]]]


class AskPair(Protocol):
    """An ``Ask`` whose KV may travel in a codec."""

    def __call__(self, prompt: Sequence[int], sampling: Sampling, codec: str = NONE, /) -> AsyncIterator[list[int]]: ...


@dataclass(frozen=True, slots=True)
class Row:
    """One set-up; times are medians over its requests."""

    setup: str
    output_tokens_per_s: float
    ttft_s: float
    tpot_s: float


@dataclass(frozen=True, slots=True)
class Load:
    """What every set-up is asked."""

    num_requests: int
    concurrency: int
    prompt_tokens: int
    output_tokens: int


def prompts(load: Load, seed: int) -> list[list[int]]:
    """No two share a prefix, so that no cache helps."""
    return [
        [Random(f"{seed}/{i}/{k}").randrange(300, 40_000) for k in range(load.prompt_tokens)]
        for i in range(load.num_requests)
    ]


async def measure(setup: str, ask: Ask, load: Load) -> Row:
    """Warm up with as many requests as run at a time, then measure."""
    sampling = Sampling(max_tokens=load.output_tokens, temperature=0.0, ignore_eos=True)
    ttft: list[float] = []
    tpot: list[float] = []

    async def client(queue: list[list[int]], *, record: bool) -> None:
        while queue:
            began = perf_counter()
            first, num_tokens = 0.0, 0
            async for tokens in ask(queue.pop(), sampling):
                num_tokens += len(tokens)
                first = first or perf_counter()
            if num_tokens != load.output_tokens:
                raise RuntimeError(f"{setup}: an answer of {num_tokens} tokens, not {load.output_tokens}")
            if record:
                ttft.append(first - began)
                tpot.append((perf_counter() - first) / max(1, num_tokens - 1))

    warm = Load(load.concurrency, load.concurrency, load.prompt_tokens, load.output_tokens)
    for queue, record in ((prompts(warm, seed=1), False), (prompts(load, seed=2), True)):
        began = perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(load.concurrency):
                tasks.create_task(client(queue, record=record))
    seconds = perf_counter() - began
    return Row(setup, load.num_requests * load.output_tokens / seconds, median(ttft), median(tpot))


def token_ids(output: EngineOutput) -> list[int]:
    """What an engine has added."""
    return [token.token_id for token in output.tokens]


@asynccontextmanager
async def services(engine: VllmEngineConfig, kv: KvConfig) -> AsyncIterator[Ask]:
    """Gateway, coordinator, one prefill and one decode worker, asked over gRPC."""
    config = FleetConfig.model_validate(
        {"engine": engine.model_dump(), "kv": kv.model_dump()}
        | {name: "127.0.0.1:0" for name in ("listen", "http_listen", "coordinator")}
    )
    with tempfile.TemporaryDirectory(prefix="hexgen2-") as folder:
        async with Fleet(config, Path(folder)) as fleet, channel(fleet.grpc_address) as gateway:
            stub = gateway_pb2_grpc.GatewayStub(gateway)

            async def ask(prompt: Sequence[int], sampling: Sampling) -> AsyncIterator[list[int]]:
                request = gateway_pb2.GenerateRequest(sampling=sampling_to_proto(sampling))
                request.prompt_token_ids.ids.extend(prompt)
                async for response in stub.Generate(request, timeout=REQUEST_TIMEOUT_S):
                    if response.tokens:
                        yield [token.token_id for token in response.tokens]
                    if response.finish_reason and not response.timing.HasField("kv"):
                        click.echo(f"served without a hand-over by {response.timing.decode_replica_id}", err=True)

            yield ask


@asynccontextmanager
async def bare_engine(
    engine_config: VllmEngineConfig, kv: KvConfig, role: Literal["prefill", "decode"]
) -> AsyncIterator[tuple[Engine, Ranks, PageQueue]]:
    """One vLLM engine with its agents, no service around it."""
    async with loading(WorkerConfig(role=role, engine=engine_config, kv=kv)) as loaded:
        pools = await loaded.start()
        yield loaded.engine, loaded.ranks, pools.of(Role(role))


@asynccontextmanager
async def pair(engine: VllmEngineConfig, kv: KvConfig) -> AsyncIterator[AskPair]:
    """The same engines and the same hand-over, joined by function calls in one process."""
    async with bare_engine(engine, kv, "prefill") as p, bare_engine(engine, kv, "decode") as d:
        prefill = PrefillWorker(*p)
        decode = DecodeWorker(*d, lambda kv, resume: prefill.fetch(kv.transfer_id, kv.token, resume=resume))

        async def ask(prompt: Sequence[int], sampling: Sampling, codec: str = NONE) -> AsyncIterator[list[int]]:
            transfer_id, token, ids = secrets.token_hex(8), secrets.token_bytes(32), tuple(prompt)
            job = DecodeJob(f"d{transfer_id}", ids, sampling, RemoteKv(transfer_id, token, "", codec))
            made = prefill.run(PrefillJob(f"p{transfer_id}", transfer_id, token, ids, sampling, True, codec))
            started: asyncio.Queue[EngineOutput | object | None] = asyncio.Queue()

            async def follow() -> None:
                async with aclosing(decode.run(job)) as outputs:
                    async for output in outputs:
                        started.put_nowait(output)
                started.put_nowait(None)

            async with aclosing(made), asyncio.TaskGroup() as tasks:
                tasks.create_task(follow())
                async for event in made:
                    if isinstance(event, FirstToken):
                        yield [event.token.token_id]
                        break
                while (output := await started.get()) is not None:
                    if isinstance(output, EngineOutput):
                        yield token_ids(output)
                    else:
                        await made.aclose()

        yield ask


@asynccontextmanager
async def alone(engine_config: VllmEngineConfig, kv: KvConfig) -> AsyncIterator[Ask]:
    """One vLLM engine that does both phases."""
    async with bare_engine(engine_config, kv, "decode") as (engine, _, _):

        async def ask(prompt: Sequence[int], sampling: Sampling) -> AsyncIterator[list[int]]:
            request = EngineRequest(secrets.token_hex(8), tuple(prompt), sampling)
            async with aclosing(engine.generate(request)) as outputs:
                async for output in outputs:
                    yield token_ids(output)

        yield ask


def run_one(setup: str, engine: VllmEngineConfig, kv: KvConfig, load: Load) -> Row:
    """One set-up from start to end; called in a process of its own."""
    make = {"services": services, "pair": pair}.get(setup, alone)

    async def run() -> Row:
        async with make(engine, kv) as ask:
            return await measure(setup, ask, load)

    return asyncio.run(run())


@click.command()
@click.option("--model", type=click.Path(path_type=Path), help="default: the default model")
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--transport", default="auto", show_default=True, type=click.Choice(["auto", "ucx", "tcp"]))
@click.option("--requests", "num_requests", default=64, show_default=True)
@click.option("--concurrency", default=16, show_default=True)
@click.option("--prompt-tokens", default=256, show_default=True)
@click.option("--output-tokens", default=32, show_default=True)
@click.option("--setup", "setups", multiple=True, help="services, pair, alone, alone-2-threads; default: all")
@click.option("--json", "as_json", is_flag=True, help="print the rows as JSON")
def main(
    model: Path | None,
    dtype: str,
    transport: str,
    num_requests: int,
    concurrency: int,
    prompt_tokens: int,
    output_tokens: int,
    setups: tuple[str, ...],
    as_json: bool,
) -> None:
    """Measure each set-up under the same load."""
    kv = KvConfig.model_validate({"transport": transport})
    load = Load(num_requests, concurrency, prompt_tokens, output_tokens)
    rows = []
    spawn = multiprocessing.get_context("spawn")
    for setup in setups or ("services", "pair", "alone", "alone-2-threads"):
        threads = 2 if setup == "alone-2-threads" else 1
        engine = VllmEngineConfig.model_validate(
            {"model": model or default_model(), "dtype": dtype, "max_model_len": 1024, "omp_num_threads": threads}
        )
        click.echo(f"{setup} ...", err=True)
        with ProcessPoolExecutor(1, mp_context=spawn) as processes:
            rows.append(processes.submit(run_one, setup, engine, kv, load).result())
        click.echo(f"{setup}: {rows[-1].output_tokens_per_s:.1f} output tok/s", err=True)
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=1))
        return
    best = rows[0].output_tokens_per_s
    click.echo(f"{'set-up':18}{'output tok/s':>14}{'TTFT s':>9}{'TPOT ms':>9}{'services / it':>15}")
    for row in rows:
        click.echo(
            f"{row.setup:18}{row.output_tokens_per_s:14.1f}{row.ttft_s:9.2f}{row.tpot_s * 1e3:9.1f}"
            f"{best / row.output_tokens_per_s:15.2f}"
        )


if __name__ == "__main__":
    main()
