"""Goodput of one replica whose limits adapt to its requests' times, beside the same with limits that stay.

An open loop of requests whose kind turns back and forth, so that what a step should hold swings: many short prompts
with long answers, then few long prompts with short ones. A request is good when its first token and its further ones
came in time. An emulated engine in a process of its own behind a real gateway; or, with ``--virtual``, the engine and
what adapts it alone, on a clock that jumps to whatever comes next, which no other work on the machine disturbs. Run
from the root of the tree::

    python -m benchmarks.batching --virtual
"""

import asyncio
import json
import tempfile
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from statistics import mean
from time import perf_counter

import click
import grpc

from hexgen2.batching import Pace, Targets
from hexgen2.cli.fleet import Fleet
from hexgen2.cli.fleet_config import FleetConfig, default_model
from hexgen2.config import EmulatedEngineConfig, KvConfig
from hexgen2.engine.base import EngineRequest, Sampling
from hexgen2.engine.emulated import EmulatedEngine
from hexgen2.rpc.client import channel
from hexgen2.rpc.convert import sampling_to_proto
from hexgen2.v1 import gateway_pb2, gateway_pb2_grpc
from hexgen2.worker.adapting import Adapting
from hexgen2.worker.aio import now, owned

TTFT_S, TPOT_S = 8.0, 0.18
#: (requests per second, prompt tokens, output tokens) of the two kinds that take turns.
KINDS = ((4.0, 64, 64), (0.6, 1500, 64))
#: A step: 30 ms, 0.6 ms for each token of a prompt, 3 ms for each request in decode.
ENGINE = {
    "kind": "emulated",
    "prefill_tokens_per_s": 1 / 0.0006,
    "decode_step_base_s": 0.03,
    "decode_step_per_request_s": 0.003,
    "num_layers": 1,
    "num_kv_heads": 1,
}
#: By name: requests and tokens of a step; adaptive ones may use as much as the largest.
LARGEST = (128, 512)
WAYS = {
    "adaptive": LARGEST,
    "128 x 512": LARGEST,
    "48 x 512": (48, 512),
    "48 x 128": (48, 128),
    "24 x 64": (24, 64),
}
REQUEST_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Asked:
    """One request."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    kind: int


@dataclass(frozen=True, slots=True)
class Answered:
    """And how it went."""

    asked: Asked
    ttft_s: float
    tpot_s: float

    @property
    def good(self) -> bool:
        return self.ttft_s <= TTFT_S and self.tpot_s <= TPOT_S


@dataclass(frozen=True, slots=True)
class Row:
    """One way; rates over the whole trace, the last two by kind."""

    way: str
    asked_rps: float
    good_rps: float
    good_short: float
    good_long: float
    ttft_s: float
    tpot_s: float
    num_failed: int


def trace(phase_s: float, phases: int, load: float, seed: int) -> Iterator[Asked]:
    """Poisson arrivals at ``load`` times the usual rates, the kinds taking turns."""
    random = Random(seed)
    for phase in range(phases):
        kind = phase % 2
        rate, prompt, output = KINDS[kind]
        rate *= load
        at = phase * phase_s + random.expovariate(rate)
        while at < (phase + 1) * phase_s:
            yield Asked(at, prompt, output, kind)
            at += random.expovariate(rate)


async def run(way: str, asked: list[Asked], seconds: float, tokenizer: Path) -> Row:
    """The trace on a fleet of one replica that does both phases."""
    seqs, tokens = WAYS[way]
    slo = {"slo_ttft_s": TTFT_S, "slo_tpot_s": TPOT_S} if way == "adaptive" else {}
    config = FleetConfig.model_validate(
        {
            "prefill": 0,
            "decode": 1,
            "engine": ENGINE | {"max_num_seqs": seqs, "max_num_batched_tokens": tokens},
            "tokenizer": tokenizer,
            "kv": {"transport": "tcp"},
            "drain_s": 1,
            **slo,
            **dict.fromkeys(("listen", "http_listen", "coordinator"), "127.0.0.1:0"),
        }
    )
    answered: list[Answered] = []
    failed = 0

    async def ask(stub: "gateway_pb2_grpc.GatewayAsyncStub", each: Asked, began: float, random: Random) -> None:
        nonlocal failed
        await asyncio.sleep(max(0.0, began + each.at_s - perf_counter()))
        sampling = Sampling(max_tokens=each.output_tokens, temperature=0.0, ignore_eos=True)
        request = gateway_pb2.GenerateRequest(sampling=sampling_to_proto(sampling))
        request.prompt_token_ids.ids.extend(random.randrange(3, 250) for _ in range(each.prompt_tokens))
        sent, first = perf_counter(), 0.0
        try:
            async for response in stub.Generate(request, timeout=REQUEST_TIMEOUT_S):
                if response.tokens:
                    first = first or perf_counter()
        except grpc.aio.AioRpcError:
            failed += 1
            return
        answered.append(Answered(each, first - sent, (perf_counter() - first) / (each.output_tokens - 1)))

    with tempfile.TemporaryDirectory(prefix="hexgen2-") as folder:
        async with Fleet(config, Path(folder)) as fleet, channel(fleet.grpc_address) as gateway:
            fleet.hurry.set()
            stub: gateway_pb2_grpc.GatewayAsyncStub = gateway_pb2_grpc.GatewayStub(gateway)
            began = perf_counter()
            async with asyncio.TaskGroup() as tasks:
                for number, each in enumerate(asked):
                    tasks.create_task(ask(stub, each, began, Random(number)))

    return row(way, asked, answered, seconds, failed)


class VirtualLoop(asyncio.SelectorEventLoop):
    """Where nothing can run now, it is later at once."""

    now = 0.0

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:  # type: ignore[attr-defined]
            self.now = max(self.now, self._scheduled[0]._when)  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]


async def run_virtual(way: str, asked: list[Asked], seconds: float) -> Row:
    """The trace on the engine alone, without the agents that would move its KV, and what adapts it."""
    seqs, tokens = WAYS[way]
    limits = {"max_num_seqs": seqs, "max_num_batched_tokens": tokens}
    config = EmulatedEngineConfig.model_validate(ENGINE | limits)
    engine = EmulatedEngine(config, KvConfig(transport="tcp"), Path("unused"))
    engine._loop = asyncio.get_running_loop().create_task(engine._run())
    pace = Pace()
    adapting = Adapting(Targets(TTFT_S, TPOT_S) if way == "adaptive" else Targets(), pace)
    adapting.follow(engine)
    answered: list[Answered] = []

    async def ask(number: int, each: Asked) -> None:
        await asyncio.sleep(each.at_s)
        random = Random(number)
        prompt = tuple(random.randrange(3, 250) for _ in range(each.prompt_tokens))
        sampling = Sampling(max_tokens=each.output_tokens, temperature=0.0, ignore_eos=True)
        first, last = 0.0, now()
        sent = last
        async with aclosing(engine.generate(EngineRequest(str(number), prompt, sampling))) as outputs:
            async for output in outputs:
                # As a decode worker tells it.
                if first:
                    pace.gap(now() - last, len(output.tokens))
                else:
                    first = now()
                    pace.first(first - sent)
                last = now()
        answered.append(Answered(each, first - sent, (last - first) / (each.output_tokens - 1)))

    async with owned(adapting.run()), asyncio.TaskGroup() as tasks:
        for number, each in enumerate(asked):
            tasks.create_task(ask(number, each))
    await engine.stop()
    return row(way, asked, answered, seconds, 0)


def row(way: str, asked: list[Asked], answered: list[Answered], seconds: float, failed: int) -> Row:
    """What became of what was asked."""

    def part(kind: int) -> float:
        return sum(each.good for each in answered if each.asked.kind == kind) / sum(a.kind == kind for a in asked)

    return Row(
        way,
        len(asked) / seconds,
        sum(each.good for each in answered) / seconds,
        part(0),
        part(1),
        mean(each.ttft_s for each in answered),
        mean(each.tpot_s for each in answered),
        failed,
    )


@click.command()
@click.option("--way", "wanted", multiple=True, type=click.Choice(list(WAYS)), help="Default: all.")
@click.option("--load", default=1.0, show_default=True, help="Times the usual rates.")
@click.option("--phase", "phase_s", default=40.0, show_default=True, help="Seconds until the kind of requests turns.")
@click.option("--phases", default=4, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--virtual", is_flag=True, help="The engine alone, on a clock of its own.")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="A model folder; default: the default model's.")
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON.")
def main(
    wanted: tuple[str, ...],
    load: float,
    phase_s: float,
    phases: int,
    seed: int,
    virtual: bool,
    tokenizer: Path | None,
    as_json: bool,
) -> None:
    """Measure each way under the same trace."""
    asked = list(trace(phase_s, phases, load, seed))
    rows = []
    for way in wanted or tuple(WAYS):
        click.echo(f"{way} ...", err=True)
        if virtual:
            with asyncio.Runner(loop_factory=VirtualLoop) as runner:
                rows.append(runner.run(run_virtual(way, asked, phase_s * phases)))
        else:
            rows.append(asyncio.run(run(way, asked, phase_s * phases, tokenizer or default_model())))
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=1))
        return
    names = ("asked/s", "good/s", "good short", "good long", "TTFT s", "TPOT s", "failed", "adaptive/it")
    click.echo(f"{'requests x tokens':18}" + "".join(f"{name:>12}" for name in names))
    adaptive = next((row for row in rows if row.way == "adaptive"), None)
    for row in rows:
        ratio = f"{adaptive.good_rps / row.good_rps:12.2f}" if adaptive and row.good_rps else f"{'-':>12}"
        click.echo(
            f"{row.way:18}{row.asked_rps:12.2f}{row.good_rps:12.2f}{row.good_short:12.0%}{row.good_long:12.0%}"
            f"{row.ttft_s:12.2f}{row.tpot_s:12.3f}{row.num_failed:12}{ratio}"
        )


if __name__ == "__main__":
    main()
