"""``make paper``: every cell that is not there yet, then ``docs/results.md`` with its tables and pictures.

python -m benchmarks.paper --traces ../shared/data --jobs 2
"""

import json
import time
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.paper.cell import CLASSES, Cell, Effort, Outcome, work
from benchmarks.paper.render import render
from hexgen2.scheduler import speed

BASELINE = "paper-baseline"
SETTINGS = tuple(f"paper-setting-{number}" for number in range(1, 6))
MODELS = ("llama-2-70b", "opt-30b")
ABLATIONS = ("paper", "no-refinement", "lp-start", "random-swap", "hill-climb", "genetic")
SIZES = (64, 128, 256, 320)


def cells(models: tuple[str, ...]) -> list[Cell]:
    """All of them, what matters most first."""
    one = (models[0], "HPHD", SETTINGS[0])
    pairs = [(model, workload) for model in models for workload in CLASSES]
    found = []
    for pair in pairs:
        found.append(Cell(*pair, BASELINE, "distserve"))
        found += [Cell(*pair, cluster, "hexgen2") for cluster in (*SETTINGS, BASELINE)]
    found += [Cell(*one, system) for system in ABLATIONS]
    found += [Cell(*one, "hexgen2", codec, bandwidth) for bandwidth in (1.0, 0.1) for codec in ("none", "int8", "int4")]
    for pair in pairs:
        found.append(Cell(*pair, BASELINE, "colocated", mixes=True))
        found += [Cell(*pair, cluster, "hexgen") for cluster in SETTINGS]
    for pair in pairs:
        found += [Cell(*pair, cluster, "colocated", mixes=True) for cluster in SETTINGS]
    return found


@click.command()
@click.option("--traces", type=click.Path(path_type=Path), default=Path("../shared/data"), show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=Path("docs"), show_default=True)
@click.option("--kept", type=click.Path(path_type=Path), default=Path(".paper"), show_default=True, help="Cells done.")
@click.option("--model", "models", multiple=True, type=click.Choice(MODELS), help="Default: both.")
@click.option("--offline", default=3000, show_default=True, help="Requests.")
@click.option("--online", default=1500, show_default=True, help="Requests.")
@click.option("--evaluations", default=1000, show_default=True)
@click.option("--jobs", default=1, show_default=True)
@click.option("--minutes", type=float, default=600.0, show_default=True, help="Begin no cell after so long.")
@click.option("--render-only", is_flag=True)
def main(
    traces: Path,
    output: Path,
    kept: Path,
    models: tuple[str, ...],
    offline: int,
    online: int,
    evaluations: int,
    jobs: int,
    minutes: float,
    render_only: bool,
) -> None:
    """Make the evaluation again."""
    effort = Effort(traces, offline, online, evaluations)
    kept.mkdir(parents=True, exist_ok=True)
    if not render_only:
        run(cells(models or MODELS), effort, kept, jobs, minutes)
        scheduler_times(kept, minutes)
    for path in render(kept, output, effort):
        click.echo(f"wrote {path}")


def run(asked: list[Cell], effort: Effort, kept: Path, jobs: int, minutes: float) -> None:
    """Each cell in a process; its outcome is kept as soon as it is there, so that a run may go on where one ended."""
    missing = [cell for cell in asked if not (kept / f"{cell.key}.json").exists()]
    end = time.monotonic() + 60 * minutes
    with (
        ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as processes,
        Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
        ) as bar,
    ):
        task = bar.add_task("cells", total=len(missing))
        waiting = list(reversed(missing))
        running: dict[Future[Outcome], Cell] = {}
        while waiting or running:
            while waiting and len(running) < jobs and time.monotonic() < end:
                cell = waiting.pop()
                running[processes.submit(work, cell, effort)] = cell
            if not running:
                return
            done = next(as_completed(running))
            cell = running.pop(done)
            text = json.dumps(done.result().to_json() | {"effort": asdict(effort) | {"folder": ""}}, indent=1)
            (kept / f"{cell.key}.json").write_text(text, encoding="utf-8")
            bar.update(task, advance=1, description=cell.key)


def scheduler_times(kept: Path, minutes: float) -> None:
    """Seconds of planning by the number of GPUs."""
    path = kept / "scheduler.json"
    if not path.exists() and minutes > 0:
        path.write_text(json.dumps([row.to_json() for row in speed.rows(SIZES)], indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
