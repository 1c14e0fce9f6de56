"""``hexgen2 simulate``: what a plan would do under a workload, request by request, before any GPU is rented."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from math import inf
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from hexgen2 import llm as llms
from hexgen2.arrival_trace import read_arrivals
from hexgen2.cli import plots
from hexgen2.cluster_file import find_cluster
from hexgen2.config_file import Place, dotted, line_of, read
from hexgen2.errors import ConfigError
from hexgen2.kv.codecs import CODECS
from hexgen2.placement import Placement, load_placement
from hexgen2.scheduler.problem import Problem
from hexgen2.simulator.closed_forms import checks
from hexgen2.simulator.happenings import load_happenings
from hexgen2.simulator.outcome import Slo
from hexgen2.simulator.planned import Planned, check
from hexgen2.simulator.report import Report
from hexgen2.simulator.run import Demand, Source, prepare, simulate
from hexgen2.simulator.sweep import AXES, COLUMNS, Point, axis, cells, sweep, write_csv
from hexgen2.workload_file import find_workload

POSITIVE = click.FloatRange(min=0, min_open=True)
FILE = click.Path(path_type=Path, dir_okay=False)


@click.command("simulate")
@click.argument("plan", required=False, type=FILE)
@click.option("--trace", type=FILE, help="CSV or JSON lines, maybe gzipped: arrival_s, input and output tokens.")
@click.option("--workload", help="Lengths when there is no trace, at random times; default: the plan's.")
@click.option("--rate", type=POSITIVE, metavar="RPS", help="Requests per second; default: the trace's, or 75 %.")
@click.option("--scale", type=POSITIVE, metavar="X", help="So many times as fast as the trace, or as 75 %.")
@click.option("--offline", is_flag=True, help="All requests at once.")
@click.option("--requests", type=click.IntRange(min=1), help="At most so many.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--slo-ttft", type=POSITIVE, metavar="S", help="Limit of the time to first token, for the goodput.")
@click.option("--slo-tpot", type=POSITIVE, metavar="S", help="Limit of the time per further token.")
@click.option("--warmup", type=click.FloatRange(min=0), default=0.0, metavar="S", help="Leave these seconds out.")
@click.option("--cluster", help="The plan's cluster.yaml; needed unless it is one of the examples.")
@click.option("--model", help="A config.json; default: the plan's model, from the catalog.")
@click.option("--weight-dtype", help="As the plan was made with.")
@click.option("--kv-dtype", help="As the plan was made with.")
@click.option("--codec", type=click.Choice(list(CODECS)), help="Of all KV; default: the plan's.")
@click.option("--chunked-prefill/--no-chunked-prefill", default=None, help="Default: the engine profile's.")
@click.option("--kv-pool-tokens", type=click.IntRange(min=128), help="What send buffer and staging hold, each.")
@click.option("--max-queued", type=click.IntRange(min=0), help="Requests that may wait for a pool; default: all.")
@click.option("--events", type=FILE, help="YAML: replicas that are lost, come back or change their role.")
@click.option("--repair", is_flag=True, help="Leave out or sort what a trace has wrong, and say so.")
@click.option("--sweep", "sweeps", multiple=True, metavar="AXIS=A,B", help=f"Try values: {', '.join(AXES)}.")
@click.option("--replan", is_flag=True, help="Plan anew for each value that is swept.")
@click.option("-o", "--output", type=click.Path(path_type=Path, file_okay=False), help="Folder for a sweep's files.")
@click.option("--check", "check_only", is_flag=True, help="Compare the simulator with closed forms, and end.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def simulate_command(plan: Path | None, check_only: bool, as_json: bool, **options: Any) -> None:
    """Simulate PLAN, a plan.yaml, under a trace or a workload.

    \b
      hexgen2 simulate plan.yaml --rate 6
      hexgen2 simulate plan.yaml --trace azure2023_conv.csv.gz --slo-ttft 2 --slo-tpot 0.2
      hexgen2 simulate plan.yaml --sweep rate=2,4,6,8 --sweep bandwidth=0.25,1 -o sweep/
    """
    if check_only:
        show_checks(as_json)
    elif plan is None:
        raise click.UsageError("PLAN is needed: `hexgen2 plan CLUSTER --model M -o plan.yaml` makes one")
    else:
        run(plan, as_json=as_json, **options)


def run(
    plan: Path,
    *,
    trace: Path | None,
    workload: str | None,
    cluster: str | None,
    model: str | None,
    weight_dtype: str | None,
    kv_dtype: str | None,
    codec: str | None,
    chunked_prefill: bool | None,
    kv_pool_tokens: int | None,
    sweeps: tuple[str, ...],
    replan: bool,
    output: Path | None,
    as_json: bool,
    repair: bool,
    **load: Any,
) -> None:
    """The command's work. Raises ConfigError."""
    axes = [axis(text) for text in sweeps]
    placement = load_placement(plan)
    if trace is not None and workload is not None:
        raise ConfigError("--trace and --workload: give one of them")
    notes: list[str] = []
    given = demand(trace, repair=repair, notes=notes, **load)
    problem = Problem(
        find_cluster(cluster or placement.cluster),
        llms.find(model or placement.model, weight_dtype=weight_dtype, kv_dtype=kv_dtype),
        # A plan says only the name of its workload: a file of that name, or a built-in one.
        find_workload(workload or (str(trace) if trace is not None else placement.workload)),
    )
    _, lines = read(plan)

    def where(place: Place) -> str:
        return f"{plan}:{line_of(lines, place)}: {dotted(place)}: "

    check(placement, problem, where)
    if axes:
        with bar("point", None) as tell:
            points = list(sweep(axes, problem, placement, given, replan=replan, progress=tell))
        show_sweep(axes, points, output, as_json=as_json)
        return
    blueprint = prepare(placement, problem, given, codec=codec, pool_tokens=kv_pool_tokens, mixes=chunked_prefill)
    with bar("simulating", given.count()) as tell:
        found = simulate(blueprint, given, problem.cluster.price_per_hour, lambda done, _: tell(done, given.count()))
    notes += blueprint.notes()
    if as_json:
        click.echo(json.dumps({"plan": _prediction(placement), "notes": notes, **found.to_json()}, indent=2))
        return
    show(found, blueprint, given, notes, Console())


def demand(
    trace: Path | None,
    *,
    repair: bool,
    notes: list[str],
    rate: float | None,
    scale: float | None,
    offline: bool,
    requests: int | None,
    seed: int,
    slo_ttft: float | None,
    slo_tpot: float | None,
    warmup: float,
    max_queued: int | None,
    events: Path | None,
) -> Demand:
    """What the options ask. Raises ConfigError."""
    if sum((rate is not None, scale is not None, offline)) > 1:
        raise ConfigError("--rate, --scale and --offline: give one of them")
    source = None
    if trace is not None:
        rows = read_arrivals(trace, repair=repair, limit=requests)
        notes += rows.notes
        source = Source(rows, len(rows), rows.rate, rows.longest_prompt)  # type: ignore[arg-type]
    return Demand(
        source,
        rate,
        scale,
        offline,
        requests,
        seed,
        Slo(slo_ttft or inf, slo_tpot or inf),
        warmup,
        1_000_000 if max_queued is None else max_queued,
        load_happenings(events) if events is not None else (),
    )


@contextmanager
def bar(what: str, total: int | None) -> Iterator[Any]:
    """A bar on standard error where somebody sees it; yields what is told ``(done, total)``."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    ) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done, out_of: progress.update(task, completed=done, total=out_of)


def show(found: Report, blueprint: Planned, given: Demand, notes: list[str], console: Console) -> None:
    """The report as tables."""
    plan = blueprint.placement
    for note in notes:
        console.print(f"[yellow]{note}[/]", highlight=False)
    console.print(
        f"[bold]{found.finished:,} of {found.requests:,} requests served[/] in {found.seconds:,.0f} s of simulated time"
        + "".join(f"; {number} failed: {reason}" for reason, number in found.failed.items()),
        highlight=False,
    )
    if found.retried or found.moved:
        console.print(f"{found.retried} tried again, {found.moved} moved to another decode replica", highlight=False)
    table = Table("", "mean", "p50", "p90", "p95", "p99", "plan", box=None, padding=(0, 2, 0, 0))
    for column in range(1, 7):
        table.columns[column].justify = "right"
    for name, times, told in (
        ("TTFT", found.ttft, plan.ttft_s),
        ("TPOT", found.tpot, plan.tpot_s),
        ("end to end", found.e2e, None),
    ):
        table.add_row(name, *map(seconds, asdict(times).values()), "" if told is None else seconds(told))
    console.print(table)
    offered = "" if not found.offered_rps else f" of {found.offered_rps:.3g} offered"
    console.print(
        f"{found.throughput_rps:.3g} requests/s{offered} (steadily {found.steady_rps:.3g}; the plan's most is "
        f"{plan.throughput_rps:.3g}), {found.output_tokens_per_s:,.0f} output tokens/s",
        highlight=False,
    )
    if given.slo != Slo():
        console.print(
            f"goodput {found.goodput_rps:.3g} requests/s: {found.slo_attainment:.1%} of all requests in time",
            highlight=False,
        )
    if found.price_per_million_output_tokens is not None:
        console.print(
            f"{found.price_per_hour:.2f} $/h, {found.price_per_million_output_tokens:.2f} $ per million output tokens "
            f"(plan: {plan.price_per_million_output_tokens or 0.0:.2f} at its most)",
            highlight=False,
        )
    table = Table("replica", "busy", "plan at its most", "KV memory", "pre-empted", box=None, padding=(0, 2, 0, 0))
    planned = {each.id: each.utilisation for each in plan.replicas}
    for use in found.replicas:
        memory = f"{use.mean_kv_tokens / use.kv_tokens:.0%}" if use.kv_tokens else ""
        at_most = f"{planned.get(use.replica_id, 0.0):.0%}"
        table.add_row(use.replica_id, f"{use.busy:.0%}", at_most, memory, str(use.preemptions or ""))
    console.print(table)
    if found.wires:
        table = Table("link", "busy", "MB/s", box=None, padding=(0, 2, 0, 0))
        for wire in found.wires:
            table.add_row(wire.name, f"{wire.busy:.0%}", f"{wire.bytes_per_s / 1e6:,.0f}")
        console.print(table)


def seconds(value: float) -> str:
    """``0.53 s``, ``131 ms``."""
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def show_sweep(axes: Any, points: list[Point], output: Path | None, *, as_json: bool) -> None:
    """A table, and the files that were asked for."""
    names = [each.name for each in axes]
    if output is not None:
        try:
            output.mkdir(parents=True, exist_ok=True)
            write_csv(output / "sweep.csv", axes, points)
        except OSError as error:
            raise ConfigError(f"{output}: {error.strerror}") from error
        draw_sweep(axes, points, output)
    if as_json:
        rows = [
            {**dict(zip(names, p.values, strict=True)), **dict(zip(COLUMNS, cells(p), strict=True)), "error": p.error}
            for p in points
        ]
        click.echo(json.dumps(rows, indent=2))
        return
    shown = ("throughput_rps", "goodput_rps", "slo_attainment", "ttft_p50_s", "tpot_p50_s", "price_per_hour")
    table = Table(*names, *shown, box=None, padding=(0, 2, 0, 0))
    for point in points:
        row = dict(zip(COLUMNS, cells(point), strict=True))
        texts = [f"{row[name]:.3g}" if isinstance(row[name], float) else "" for name in shown]
        table.add_row(*point.values, *texts)
    console = Console()
    console.print(table)
    for point in points:
        if point.error:
            console.print(f"[red]{', '.join(point.values)}: {point.error}[/]", highlight=False)
    if output is not None:
        console.print(f"wrote {output / 'sweep.csv'}", highlight=False)
        if not plots.available():
            console.print("no pictures: matplotlib is not installed (pip install 'hexgen2[plots]')", highlight=False)


def draw_sweep(axes: Any, points: list[Point], folder: Path) -> None:
    """Goodput over the first axis, and goodput over price."""
    if not plots.available():
        return
    done = [(point.values, point.report) for point in points if point.report is not None]
    first = axes[0]
    try:
        places = {value: float(value) for value in first.values}
    except ValueError:
        places = {value: float(number) for number, value in enumerate(first.values)}
    series: dict[str, list[tuple[float, float]]] = {}
    for values, found in done:
        series.setdefault(", ".join(values[1:]) or "goodput", []).append((places[values[0]], found.goodput_rps))
    plots.lines(folder / "sweep.svg", series, title="goodput", x=first.name, y="requests/s within the limits")
    priced = [(", ".join(v), found.price_per_hour, found.goodput_rps) for v, found in done if found.price_per_hour]
    if priced:
        plots.pareto(folder / "pareto.svg", priced, title="goodput against price")


def show_checks(as_json: bool) -> None:
    """Closed forms: predicted, measured, error."""
    rows = []
    if not as_json:
        click.echo(f"{'':52}{'predicted':>12}{'measured':>12}{'error':>9}")
    for each in checks():
        rows.append(asdict(each) | {"error": each.error})
        if not as_json:
            click.echo(f"{each.what:52}{each.predicted:12.5g}{each.measured:12.5g}{each.error:9.2%}")
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    worst = max(abs(row["error"]) for row in rows)
    if worst > 0.01:
        raise click.ClickException(f"{worst:.1%} off a closed form; 1 % is allowed")


def _prediction(plan: Placement) -> dict[str, Any]:
    fields = {"throughput_rps", "load_rps", "ttft_s", "tpot_s", "price_per_million_output_tokens"}
    return plan.model_dump(include=fields)
