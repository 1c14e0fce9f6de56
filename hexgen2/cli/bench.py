"""``hexgen2 bench``: how fast the scheduler is, how good its plans are; how fast KV is handed over."""

import json
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from hexgen2.cli.lazy import LazyCommand
from hexgen2.scheduler import compare, quality, speed
from hexgen2.scheduler.exhaustive import MOST_STATES
from hexgen2.scheduler.schedule import EVALUATIONS
from hexgen2.scheduler.search import STRATEGIES

as_json = click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON.")


@click.group("bench")
def bench() -> None:
    """Measure the scheduler and the KV hand-over on this machine."""


@bench.command("scheduler")
@click.option(
    "--gpus", multiple=True, type=click.IntRange(min=8), help="A size; may be repeated. Default: 64 to 1,024."
)
@click.option("--model", default="llama-2-70b", show_default=True)
@click.option("--workload", default="hphd", show_default=True)
@click.option("--strategy", default="hexgen2", show_default=True, type=click.Choice(list(STRATEGIES)))
@click.option("--evaluations", type=click.IntRange(min=1), default=EVALUATIONS, show_default=True)
@click.option("--jobs", type=int, default=1, show_default=True, help="Processes; -1: one per core.")
@as_json
def bench_scheduler(gpus: tuple[int, ...], as_json: bool, **options: Any) -> None:
    """Seconds that a plan takes, by the size of the cluster."""
    rows = []
    for row in speed.rows(gpus or speed.SIZES, **options):
        rows.append(row.to_json())
        if not as_json:
            gap = "no bound" if row.gap is None else f"{row.gap:.2%} below the bound"
            click.echo(f"{row.num_gpus:5} GPUs  {row.seconds:6.1f} s  {row.throughput_rps:8.2f} requests/s, {gap}")
    if as_json:
        click.echo(json.dumps(rows, indent=2))


@bench.command("strategies")
@click.option("--cluster", "clusters", multiple=True, help="May be repeated. Default: the paper's, and 64 to 320 GPUs.")
@click.option("--workload", "workloads", multiple=True, help="May be repeated. Default: the paper's four.")
@click.option("--model", default="llama-2-70b", show_default=True)
@click.option("--evaluations", type=click.IntRange(min=1), default=compare.EVALUATIONS, show_default=True)
@click.option("--seeds", type=click.IntRange(min=1), default=compare.SEEDS, show_default=True)
@as_json
def bench_strategies(clusters: tuple[str, ...], workloads: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Search strategies in equal evaluations, as shares of the bound."""
    rows = []
    if not as_json:
        click.echo(f"{'cluster':16} {'workload':9}" + "".join(f"{name:>14}" for name in compare.COMPARED))
    for row in compare.rows(clusters or compare.CLUSTERS, workloads or compare.WORKLOADS, **options):
        rows.append(row)
        if not as_json:
            shares = "".join(f"{row.shares[name]:14.3f}" for name in compare.COMPARED)
            click.echo(f"{row.cluster:16} {row.workload:9}{shares}")
    told = compare.summary(rows)
    if as_json:
        click.echo(json.dumps({"rows": [row.to_json() for row in rows], "summary": told}, indent=2))
        return
    for rival, lead in told.items():
        click.echo(f"over {rival}: {lead['mean_lead']:+.1%} on average, {lead['least_lead']:+.1%} at least")


@bench.command("quality")
@click.option(
    "--instances", type=click.IntRange(min=1), default=50, show_default=True, help="Small clusters to compare on."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Which random clusters.")
@click.option("--least-states", type=click.IntRange(min=1), default=20, show_default=True, help="Of an instance.")
@click.option(
    "--most-states", type=click.IntRange(1, MOST_STATES), default=60_000, show_default=True, help="Of an instance."
)
@click.option("--max-gpus", type=click.IntRange(min=4), default=7, show_default=True, help="Of an instance.")
@as_json
def bench_quality(instances: int, as_json: bool, **options: Any) -> None:
    """Plans against exhaustive search, on small random clusters; a third of them have slow network cards."""
    rows = []
    for args in quality.instances(instances, **options):
        rows.append(quality.compare(*args))
        if not as_json:
            row = rows[-1]
            click.echo(
                f"{row.instance:3}  {row.num_gpus} GPUs  {row.states:6} states  {row.model:13} {row.workload}  "
                f"best {row.optimum_rps:7.3f}/s  found {row.found_rps:7.3f}/s  gap {row.gap:6.2%}  ({row.cluster})"
            )
    told = quality.summary(rows)
    if as_json:
        click.echo(json.dumps({"rows": [row.to_json() for row in rows], "summary": told}, indent=2))
        return
    table = Table("", "", box=None, show_header=False)
    for name, value in told.items():
        table.add_row(name, f"{value:.4g}")
    Console().print(table)


bench.add_command(
    LazyCommand("kv", "hexgen2.cli.bench_kv", "bench_kv", "KV hand-overs between processes, beside the bare transport.")
)
