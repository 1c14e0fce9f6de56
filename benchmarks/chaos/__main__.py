"""``python -m benchmarks.chaos``: see the package, and docs/chaos.md."""

import asyncio
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.chaos import report
from benchmarks.chaos.asks import asks
from benchmarks.chaos.faults import Strike, deck
from benchmarks.chaos.house import running
from benchmarks.chaos.outcome import Outcome
from benchmarks.chaos.run import Load, crashes, retried, run
from benchmarks.chaos.setting import Setting, settings
from benchmarks.chaos.verdict import judge
from benchmarks.chaos.watch import SpanTail
from hexgen2.bench import netns
from hexgen2.cli.fleet_config import default_model
from hexgen2.text.tokenizer import TextModel

#: Requests per second that two cores take, by engine.
RATES = {"emulated": 18.0, "vllm": 1.0}


@click.command()
@click.option("--seconds", default=600.0, show_default=True, help="of load, over all transports")
@click.option("--seed", default=1, show_default=True)
@click.option("--engine", type=click.Choice(["emulated", "vllm"]), default="emulated", show_default=True)
@click.option("--rate", type=float, help="requests per second; default: 18, with vLLM 1")
@click.option("--transport", type=click.Choice(["both", "tcp", "ucx"]), default="both", show_default=True)
@click.option("--cross", is_flag=True, help="two workers that serve both phases (both transports: after the others)")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="or vLLM's model; default: the default model")
@click.option("--grace", default=2.0, show_default=True, help="seconds that an answer may be later than its deadline")
@click.option("--free-within", default=1.0, show_default=True, help="seconds from cancel to free, in 99 of 100 cases")
@click.option("--folder", type=click.Path(path_type=Path), help="for logs and traces; default: a new one")
@click.option("--keep", is_flag=True, help="keep logs and traces also when nothing was found")
@click.option("--json", "as_json", is_flag=True, help="print the result as JSON")
def main(
    seconds: float,
    seed: int,
    engine: str,
    rate: float | None,
    transport: str,
    cross: bool,
    tokenizer: Path | None,
    grace: float,
    free_within: float,
    folder: Path | None,
    keep: bool,
    as_json: bool,
) -> None:
    """Load, faults and meddling; exit status 1 when anything happened that must not."""
    console = Console(stderr=as_json, width=None if sys.stdout.isatty() else 120)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    no_links = netns.why_not()
    if no_links:
        console.print(f"[yellow]faults of links are left out[/]: no network namespaces here ({no_links})")
    else:
        # Before any thread is started: all that follows, this process included, is alone on its own network.
        netns.enter()
    results = []
    for setting in settings(
        lambda name: Path(tempfile.mkdtemp(prefix=f"hexgen2-chaos-{name}-", dir=folder)),
        engine=engine,
        transports=["tcp", "ucx"] if transport == "both" else [transport],
        cross=cross,
        no_links=bool(no_links),
        model=tokenizer or default_model(),
        seconds=seconds,
        rate=rate or RATES[engine],
        seed=seed,
    ):
        with tempfile.TemporaryDirectory(prefix="hexgen2-") as scratch:
            # Of all processes: where traces go, and what those that are killed cannot clear away.
            os.environ |= {"HEXGEN2_HOME": str(setting.config.folder), "TMPDIR": scratch}
            result = asyncio.run(_one(setting, seed, grace, free_within, console))
        results.append(result)
        report.show(result, console)
        if result.ok and not keep:
            shutil.rmtree(result.folder, ignore_errors=True)
    if as_json:
        click.echo(json.dumps([report.to_json(result) for result in results], indent=1))
    sys.exit(0 if all(result.ok for result in results) else 1)


async def _one(setting: Setting, seed: int, grace: float, free_within: float, console: Console) -> report.Result:
    """Start the fleet, run, stop it, judge."""
    folder = setting.config.folder
    text = TextModel.load(setting.config.tokenizer)
    tail = SpanTail(folder / "traces")
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[now]}"),
        TimeElapsedColumn(),
        console=console,
    )
    with progress:
        task = progress.add_task(setting.title, total=int(setting.seconds * setting.rate), now="starting")

        def show(num: int, answered: int, strikes: int) -> None:
            progress.update(task, completed=num, now=f"{num} requests, {answered} answered, {strikes} faults")

        async with running(setting.config) as house:
            progress.update(task, now="the right answers")
            answers = await setting.answers(house)
            load = Load(
                asks(answers.known, answers.oversize, seed, setting.without),
                answers.known,
                setting.seconds,
                setting.rate,
                seed,
                setting.burst_every_s,
                setting.lanes,
                grace,
            )
            cards = deck(roles=setting.roles, links=setting.config.namespaces, seconds=setting.seconds)
            seen = await run(house, load, cards, text, tail, show)
    tail.read()
    tail.close()
    _save(folder / "requests.jsonl", seen.outcomes)
    _save(folder / "faults.jsonl", seen.strikes)
    seen.violations += crashes(house)
    verdict = judge(seen.outcomes, seen.strikes, tail.work, retried(house), free_within)
    return report.Result(setting.title, seen, verdict, str(folder))


def _save(file: Path, rows: Sequence[Outcome] | Sequence[Strike]) -> None:
    """For whoever looks into what happened when."""
    file.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
