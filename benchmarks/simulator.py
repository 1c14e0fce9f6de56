"""The simulator against real processes: the same requests, predicted and measured, and the error.

    python -m benchmarks.simulator emulated       engines whose times are figures; nothing is fitted
    python -m benchmarks.simulator vllm           vLLM here: step times fitted to a few requests, then predicted
    hexgen2 simulate --check                      closed forms

Every process runs on this machine, so other programs show in what is measured and not in what is predicted.
"""

import asyncio
import json
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from statistics import mean, median
from time import perf_counter

import click
import numpy as np

from hexgen2.cli.fleet import Fleet
from hexgen2.cli.fleet_config import FleetConfig
from hexgen2.config import EmulatedEngineConfig
from hexgen2.engine.base import Sampling
from hexgen2.rpc.client import channel
from hexgen2.rpc.convert import sampling_to_proto
from hexgen2.simulator.blueprint import Arrival, Given, ReplicaSpec
from hexgen2.simulator.engine import Limits
from hexgen2.simulator.fleet import Settings, Simulation
from hexgen2.simulator.step_times import Figures
from hexgen2.v1 import gateway_pb2, gateway_pb2_grpc

REQUEST_TIMEOUT_S = 300.0
LISTEN = {name: "127.0.0.1:0" for name in ("listen", "http_listen", "coordinator")}

#: Slow enough that what processes, sockets and timers add on a small machine is a small part of it.
EMULATED = {
    "kind": "emulated",
    "prefill_tokens_per_s": 2000.0,
    "decode_step_base_s": 0.03,
    "decode_step_per_request_s": 0.002,
    "num_layers": 2,
    "num_kv_heads": 1,
    "head_dim": 2,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 512,
}


@dataclass(frozen=True, slots=True)
class Served:
    """One request as its client saw it."""

    ttft_s: float
    tpot_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Row:
    what: str
    unit: str
    predicted: float
    measured: float
    allowed: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


class Client:
    """Asks a gateway over gRPC with made-up prompts of given lengths."""

    def __init__(self, stub: "gateway_pb2_grpc.GatewayAsyncStub", vocabulary: range) -> None:
        self._stub, self._vocabulary = stub, vocabulary
        self._chance = Random(7)

    async def ask(self, prompt_tokens: int, output_tokens: int, began: float) -> Served:
        sampling = Sampling(max_tokens=output_tokens, temperature=0.0, ignore_eos=True)
        request = gateway_pb2.GenerateRequest(sampling=sampling_to_proto(sampling))
        request.prompt_token_ids.ids.extend(self._chance.choices(self._vocabulary, k=prompt_tokens))
        asked = perf_counter()
        first = last = 0.0
        count = 0
        async for response in self._stub.Generate(request, timeout=REQUEST_TIMEOUT_S):
            if response.tokens:
                last = perf_counter()
                first = first or last
                count += len(response.tokens)
        if count != output_tokens:
            raise click.ClickException(f"an answer of {count} tokens, not {output_tokens}")
        return Served(first - asked, (last - first) / max(1, count - 1), last - began)

    async def replay(self, arrivals: Sequence[Arrival]) -> list[Served]:
        """Each request at its time."""
        began = perf_counter()

        async def one(arrival: Arrival) -> Served:
            await asyncio.sleep(max(0.0, arrival.time_s - (perf_counter() - began)))
            return await self.ask(arrival.prompt_tokens, arrival.output_tokens, began)

        async with asyncio.TaskGroup() as tasks:
            found = [tasks.create_task(one(arrival)) for arrival in arrivals]
        return [task.result() for task in found]


def arrivals(count: int, rate: float, prompts: tuple[int, int], outputs: tuple[int, int], seed: int) -> list[Arrival]:
    """Independent requests with lengths spread evenly."""
    chance, time_s, found = Random(seed), 0.0, []
    for _ in range(count):
        time_s += chance.expovariate(rate)
        found.append(Arrival(time_s, chance.randint(*prompts), chance.randint(*outputs)))
    return found


def predict(
    prefill: Figures,
    decode: Figures,
    limits: Limits,
    counts: tuple[int, int],
    asked: Sequence[Arrival],
    settings: Settings,
) -> tuple[float, float, float]:
    """Requests per second, median TTFT and median TPOT of a fleet in which all hand over to all."""
    roles = {f"prefill-{n}": "prefill" for n in range(counts[0])} | {f"decode-{n}": "decode" for n in range(counts[1])}
    specs = {
        (name, role): ReplicaSpec(prefill if role == "prefill" else decode, limits) for name, role in roles.items()
    }
    fleet = Given(roles, specs, ())
    outcome = Simulation(Given(roles, specs, fleet.reroute(roles)), asked, settings).run()
    return len(asked) / outcome.last_end_s, outcome.ttft.quantile(0.5), outcome.tpot.quantile(0.5)


def rows(predicted: tuple[float, float, float], served: Sequence[Served], allowed: tuple[float, float]) -> list[Row]:
    rate = len(served) / max(each.end_s for each in served)
    tpot = median(each.tpot_s for each in served if each.tpot_s > 0)
    return [
        Row("throughput", "1/s", predicted[0], rate, allowed[0]),
        Row("median TTFT", "s", predicted[1], median(each.ttft_s for each in served), allowed[1]),
        Row("median TPOT", "s", predicted[2], tpot, allowed[1]),
    ]


def show(found: Sequence[Row], *, as_json: bool) -> None:
    """A table; fails when an error is larger than it may be."""
    if as_json:
        click.echo(json.dumps([asdict(row) | {"error": row.error} for row in found], indent=2))
    else:
        click.echo(f"{'':14}{'predicted':>12}{'measured':>12}{'error':>9}{'allowed':>9}")
        for row in found:
            click.echo(
                f"{row.what:14}{row.predicted:12.4g}{row.measured:12.4g}{row.error:9.1%}{row.allowed:9.0%}  {row.unit}"
            )
    if any(abs(row.error) > row.allowed for row in found):
        raise click.ClickException("an error is larger than it may be")


@asynccontextmanager
async def client(config: FleetConfig, vocabulary: range) -> AsyncIterator[Client]:
    """A fleet for the length of a block."""
    with tempfile.TemporaryDirectory(prefix="hexgen2-") as folder:
        async with Fleet(config, Path(folder)) as fleet, channel(fleet.grpc_address) as gateway:
            yield Client(gateway_pb2_grpc.GatewayStub(gateway), vocabulary)


@click.group()
def main() -> None:
    """Predict, measure, compare."""


@main.command()
@click.option("--requests", default=120, show_default=True)
@click.option("--rate", default=3.0, show_default=True, help="Requests per second.")
@click.option("--prefill", default=2, show_default=True, help="Workers.")
@click.option("--decode", default=2, show_default=True, help="Workers.")
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def emulated(requests: int, rate: float, prefill: int, decode: int, seed: int, as_json: bool) -> None:
    """A fleet of emulated engines, each worker a process."""
    config = FleetConfig.model_validate({"engine": EMULATED, "prefill": prefill, "decode": decode, **LISTEN})
    engine = config.engine
    assert isinstance(engine, EmulatedEngineConfig)
    asked = arrivals(requests, rate, (100, 900), (10, 70), seed)
    figures = Figures(1 / engine.prefill_tokens_per_s, engine.decode_step_base_s, engine.decode_step_per_request_s)
    limits = Limits(max_num_seqs=engine.max_num_seqs, max_num_batched_tokens=engine.max_num_batched_tokens)
    predicted = predict(figures, figures, limits, (prefill, decode), asked, Settings())

    async def measure() -> list[Served]:
        async with client(config, range(3, 500)) as asking:
            await asking.replay(arrivals(4, 100.0, (100, 200), (5, 6), 99))
            return await asking.replay(asked)

    show(rows(predicted, asyncio.run(measure()), (0.10, 0.15)), as_json=as_json)


@dataclass(frozen=True, slots=True)
class Fit:
    """Of one vLLM fleet: what a few requests took."""

    prefill: Figures
    decode: Figures


async def calibrate(asking: Client) -> Fit:
    """Prompts of several lengths alone, and decode of one, four and eight requests at once."""
    lengths, seconds = [], []
    for prompt in (32, 128, 256, 384, 512):
        for _ in range(3):
            served = await asking.ask(prompt, 2, 0.0)
            lengths.append(prompt)
            seconds.append(served.ttft_s)
    slope, base = np.polyfit(lengths, seconds, 1)
    batches, steps = [], []
    for batch in (1, 4, 8):
        found = await asking.replay([Arrival(0.0, 64, 48)] * batch)
        batches.append(batch)
        steps.append(mean(each.tpot_s for each in found))
    per_request, step = np.polyfit(batches, steps, 1)
    return Fit(
        Figures(float(slope), 0.0, 0.0, prompt_s=max(0.0, float(base))),
        Figures(float(slope), float(step), max(0.0, float(per_request))),
    )


@main.command()
@click.option("--requests", default=40, show_default=True)
@click.option("--rate", default=0.8, show_default=True, help="Requests per second.")
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def vllm(requests: int, rate: float, dtype: str, seed: int, as_json: bool) -> None:
    """One prefill and one decode worker with vLLM and the default model."""
    config = FleetConfig.model_validate({"engine": {"kind": "vllm", "dtype": dtype, "max_model_len": 1024}, **LISTEN})
    asked = arrivals(requests, rate, (64, 512), (8, 48), seed)

    async def measure() -> tuple[Fit, list[Served]]:
        async with client(config, range(300, 40_000)) as asking:
            await asking.replay([Arrival(0.0, 256, 8)] * 4)
            fit = await calibrate(asking)
            return fit, await asking.replay(asked)

    fit, served = asyncio.run(measure())
    if not as_json:
        click.echo(
            f"fitted: prompts {fit.prefill.prompt_s * 1e3:.1f} ms + {fit.prefill.prompt_token_s * 1e3:.3f} ms/token"
        )
        click.echo(f"fitted: decode {fit.decode.step_s * 1e3:.1f} ms + {fit.decode.request_s * 1e3:.2f} ms/request")
    limits = Limits(max_num_seqs=32, max_num_batched_tokens=256)
    show(
        rows(predict(fit.prefill, fit.decode, limits, (1, 1), asked, Settings()), served, (0.20, 0.20)), as_json=as_json
    )


if __name__ == "__main__":
    main()
