"""``python -m benchmarks.replan shift|kill|scale``: see the package, and docs/replanning.md."""

import asyncio
import json
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import click

from benchmarks.replan import setting
from benchmarks.replan.load import Answer, Phase, drive
from benchmarks.replan.scale import scale
from hexgen2.cli.client import get_plan
from hexgen2.cli.fleet import Fleet
from hexgen2.cli.fleet_config import default_model
from hexgen2.config import EmulatedEngineConfig

tokenizer = click.option("--tokenizer", type=click.Path(path_type=Path), help="Model folder; default: the default one.")
as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
seed = click.option("--seed", default=1, show_default=True)
half = click.option("--half", "half_s", default=120.0, show_default=True, help="Seconds of each half of the trace.")


@dataclass(frozen=True, slots=True)
class Shift:
    """One run of the trace. Goodput is by when requests came: of the first half, the second, and both."""

    replan: bool
    requests: int
    goodput_rps: tuple[float, float, float]
    failed: int
    wrong: int
    unfinished: int
    changes: tuple[str, ...]


@click.group()
def main() -> None:
    """Plans that follow their workload, and lost workers."""


@main.command()
@half
@click.option("--rates", nargs=2, type=float, default=(1.2, 4.5), show_default=True, help="Requests/s of each half.")
@seed
@tokenizer
@as_json
def shift(half_s: float, rates: tuple[float, float], seed: int, tokenizer: Path | None, as_json: bool) -> None:
    """A trace that turns from long prompts to long answers half way: with re-planning and without."""
    runs = [asyncio.run(_shift(replan, half_s, rates, seed, tokenizer or default_model())) for replan in (False, True)]
    gains = [
        new / old if old else float("inf") for old, new in zip(runs[0].goodput_rps, runs[1].goodput_rps, strict=True)
    ]
    if as_json:
        click.echo(json.dumps({"runs": [asdict(run) for run in runs], "gains": gains}, indent=1))
        return
    names = ("first half/s", "second half/s", "whole/s", "requests", "failed", "wrong", "unfinished")
    click.echo(f"{'plan':12}" + "".join(f"{name:>15}" for name in names))
    for run in runs:
        rates_told = "".join(f"{rate:15.3f}" for rate in run.goodput_rps)
        counts = "".join(f"{count:15}" for count in (run.requests, run.failed, run.wrong, run.unfinished))
        click.echo(f"{'re-planned' if run.replan else 'static':12}{rates_told}{counts}")
    click.echo(f"{'gain':12}" + "".join(f"{gain:15.2f}" for gain in gains))
    for change in runs[1].changes:
        click.echo(change)


async def _shift(replan: bool, half_s: float, rates: tuple[float, float], seed: int, tokenizer: Path) -> Shift:
    phases = [
        Phase(half_s, rate, *lengths)
        for rate, lengths in zip(rates, (setting.LONG_PROMPTS, setting.LONG_ANSWERS), strict=True)
    ]
    with tempfile.TemporaryDirectory(prefix="hexgen2-replan-") as name:
        folder = Path(name)
        setting.plan(folder)
        async with Fleet(setting.config(folder, tokenizer, replan=replan), folder / "run") as fleet:
            fleet.hurry.set()
            answers = await drive(
                fleet.grpc_address, phases, seed, wait_s=half_s / 4, engine=_engine(fleet), show=_progress
            )
            changes = (await get_plan(fleet.coordinator_address, 10.0)).changes
            told = tuple(f"{each.what}: {each.why}" for each in reversed(changes))
    return Shift(
        replan,
        len(answers),
        _goodput(answers, half_s),
        sum(bool(each.error) for each in answers),
        sum(each.wrong for each in answers),
        sum(each.open for each in answers),
        told,
    )


def _goodput(answers: Sequence[Answer], half_s: float) -> tuple[float, float, float]:
    good = [each.phase for each in answers if each.good(setting.TTFT_S, setting.TPOT_S)]
    return good.count(0) / half_s, good.count(1) / half_s, len(good) / (2 * half_s)


def _engine(fleet: Fleet) -> EmulatedEngineConfig:
    """As the workers have it: its vocabulary is the tokenizer's."""
    from hexgen2.model import load_model

    engine = fleet.config.engine
    assert isinstance(engine, EmulatedEngineConfig)
    assert fleet.config.tokenizer is not None
    return engine.model_copy(update={"vocab_size": load_model(fleet.config.tokenizer).vocab_size})


@dataclass(frozen=True, slots=True)
class Kill:
    """One worker of four killed under load."""

    victim: str
    requests: int
    answered: int
    #: Told an error before a token, and after one.
    lost: int
    broken: int
    wrong: int
    continued: int
    usual_gap_s: float
    #: The longest pause that a client whose answer was continued saw.
    longest_gap_s: float
    changes: tuple[str, ...]


@main.command()
@click.option("--seconds", default=60.0, show_default=True)
@click.option("--rate", default=2.0, show_default=True, help="Requests/s.")
@click.option("--victim", default="decode-0", show_default=True)
@seed
@tokenizer
@as_json
def kill(seconds: float, rate: float, victim: str, seed: int, tokenizer: Path | None, as_json: bool) -> None:
    """Kill -9 one of four workers under load, with re-planning."""
    found = asyncio.run(_kill(seconds, rate, victim, seed, tokenizer or default_model()))
    if as_json:
        click.echo(json.dumps(asdict(found), indent=1))
    else:
        for field, value in asdict(found).items():
            click.echo(f"{field:16} {value}")
    sys.exit(1 if found.lost or found.broken or found.wrong else 0)


async def _kill(seconds: float, rate: float, victim: str, seed: int, tokenizer: Path) -> Kill:
    phases = [Phase(seconds, rate, 100, 32)]
    with tempfile.TemporaryDirectory(prefix="hexgen2-replan-") as name:
        folder = Path(name)
        setting.plan(folder)
        async with Fleet(setting.config(folder, tokenizer, replan=True), folder / "run") as fleet:
            fleet.hurry.set()

            async def strike() -> None:
                await asyncio.sleep(seconds / 2)
                fleet[victim].send(signal.SIGKILL)

            striking = asyncio.create_task(strike())
            answers = await drive(fleet.grpc_address, phases, seed, wait_s=60.0, engine=_engine(fleet), show=_progress)
            await striking
            log = fleet["gateway"].log_file.read_text(encoding="utf-8", errors="replace")
            changes = (await get_plan(fleet.coordinator_address, 10.0)).changes
    gaps = sorted(each.gap_s for each in answers if each.ended)
    return Kill(
        victim,
        len(answers),
        sum(each.ended for each in answers),
        sum(not each.ended and not each.tokens for each in answers),
        sum(not each.ended and bool(each.tokens) for each in answers),
        sum(each.wrong for each in answers),
        log.count('"continued"'),
        median(gaps) if gaps else 0.0,
        gaps[-1] if gaps else 0.0,
        tuple(f"{each.what}: {each.why}" for each in reversed(changes)),
    )


def _progress(over: int, all_of_them: int) -> None:
    if sys.stderr.isatty():
        click.echo(f"\r{over} of {all_of_them} requests", nl=over == all_of_them, err=True)


main.add_command(scale)

if __name__ == "__main__":
    main()
