"""``hexgen2 plan``: from a cluster, a model and a workload to a plan.yaml, a table and a report."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from hexgen2 import llm as llms
from hexgen2.cluster_file import find_cluster
from hexgen2.errors import ConfigError
from hexgen2.kv.codecs import CODECS, NONE
from hexgen2.placement import Placement, ReplicaPlan, to_yaml
from hexgen2.planner_examples import write_examples
from hexgen2.scheduler.changes import changes
from hexgen2.scheduler.efficiency import DEFAULT_ENGINE, engine, engines
from hexgen2.scheduler.problem import Problem
from hexgen2.scheduler.rent import cheapest, only, within_budget
from hexgen2.scheduler.report import html
from hexgen2.scheduler.schedule import EVALUATIONS, KINDS, solve
from hexgen2.scheduler.search import STRATEGIES
from hexgen2.simulator.planned import Planned
from hexgen2.simulator.settings import completed
from hexgen2.workload_file import find_workload

COLOURS = {"prefill": "blue", "decode": "green", "colocated": "magenta"}
POSITIVE = click.FloatRange(min=0, min_open=True)


@click.command("plan")
@click.argument("cluster", required=False)
@click.option("--model", help="A catalog name (llama-2-70b, opt-30b ...) or a Hugging Face config.json.")
@click.option(
    "--workload", default="hphd", show_default=True, help="HPLD, HPHD, LPHD, LPLD, a workload.yaml or a trace."
)
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Write the plan.yaml here.")
@click.option("--strategy", default="hexgen2", show_default=True, type=click.Choice(list(STRATEGIES)))
@click.option("--kind", default="auto", show_default=True, type=click.Choice(list(KINDS)), help="What a plan may be.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--evaluations", type=click.IntRange(min=1), default=EVALUATIONS, show_default=True, help="Of the search."
)
@click.option("--jobs", type=int, default=1, show_default=True, help="Processes; -1: one per core. Changes no plan.")
@click.option("--ttft", type=POSITIVE, metavar="S", help="Limit of the time to first token; wins over the workload's.")
@click.option(
    "--tpot", type=POSITIVE, metavar="S", help="Limit of the time per output token; wins over the workload's."
)
@click.option("--weight-dtype", help="What weights are kept in: fp8, int4 ...; default: as published.")
@click.option("--kv-dtype", help="What KV is kept in; default: as the weights, at least 8 bits.")
@click.option(
    "--kv-codecs",
    default=NONE,
    show_default=True,
    help=f"What KV may travel in between machines, where a link is the bottleneck: {','.join(CODECS)}. "
    "All but none cost accuracy.",
)
@click.option(
    "--engine", "profile", default=DEFAULT_ENGINE, show_default=True, type=click.Choice(engines()), help="Whose steps."
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="`hexgen2 status --json` of a running plan: devices count as slow as they were measured there.",
)
@click.option(
    "--example", type=click.Path(path_type=Path, file_okay=False), metavar="DIR", help="Write files to start from."
)
@click.option("--budget", type=POSITIVE, metavar="$/H", help="Rent for at most this out of CLUSTER's priced machines.")
@click.option("--target-rate", type=POSITIVE, metavar="RPS", help="Rent the cheapest machines that hold this rate.")
@click.option("--target-slo", metavar="TTFT:TPOT", help="Rent the cheapest that hold limits in seconds, and the rate.")
@click.option(
    "--report", type=click.Path(path_type=Path, dir_okay=False), help="Write a page with a picture here (HTML)."
)
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
def plan_command(cluster: str | None, model: str | None, example: Path | None, **options: Any) -> None:
    """Plan which GPUs of CLUSTER do prefill and which decode, how each replica is parallel, and what flows where.

    CLUSTER is a cluster.yaml or an example's name: paper-baseline, paper-setting-1 ... paper-setting-5, workstation,
    three-machines, multi-site-N with N GPUs.

    \b
      hexgen2 plan --example here
      hexgen2 plan here/cluster.yaml --model llama-3.1-8b --workload here/workload.yaml -o plan.yaml
    """
    if example is not None:
        if cluster is not None:
            raise click.UsageError("--example writes files and plans nothing: give it without CLUSTER")
        for path in write_examples(example):
            click.echo(f"wrote {path}")
        return
    if cluster is None or model is None:
        raise click.UsageError(
            "CLUSTER and --model are needed; `hexgen2 plan --example DIR` writes files to start from"
        )
    make_plan(cluster, model, **options)


def make_plan(
    cluster: str,
    model: str,
    *,
    workload: str,
    output: Path | None,
    as_json: bool,
    ttft: float | None,
    tpot: float | None,
    weight_dtype: str | None,
    kv_dtype: str | None,
    kv_codecs: str,
    profile: str,
    report: Path | None,
    budget: float | None,
    target_rate: float | None,
    target_slo: str | None,
    calibration: Path | None,
    **search: Any,
) -> None:
    """The command's work. Raises ConfigError."""
    if target_slo is not None:
        ttft, tpot = slo(target_slo)
    limits = {name: value for name, value in (("ttft_s", ttft), ("tpot_s", tpot)) if value is not None}
    problem = Problem(
        find_cluster(cluster),
        llms.find(model, weight_dtype=weight_dtype, kv_dtype=kv_dtype),
        find_workload(workload).model_copy(update=limits),
        codec_names(kv_codecs),
        engine(profile),
    )
    if calibration is not None:
        problem = _as_measured(problem, calibration)
    rate = target_rate or (problem.workload.rate if target_slo is not None else None)
    if target_slo is not None and rate is None:
        raise ConfigError("--target-slo: give --target-rate, too: this workload has no rate")
    if budget is not None and rate is not None:
        raise ConfigError("--budget and a target cannot both be met: give one of them")
    if budget is None and rate is None:
        found = with_progress(problem, **search)
    else:
        found = rent(problem, budget, rate or 0.0, **search)
        taken = {stage.machine for replica in found.replicas for stage in replica.stages}
        taken |= {idle.machine for idle in found.idle}
        problem = replace(problem, cluster=only(problem.cluster, taken))
    longest = problem.workload.longest_prompt_tokens
    found = completed(Planned(found, problem, longest))
    written = []
    if output is not None:
        written.append(write(output, to_yaml(found)))
    if report is not None:
        effort = {name: search[name] for name in ("kind", "evaluations", "seed")}
        # What would change is found by the default strategy, so it is compared with that alone.
        told = changes(problem, found.throughput_rps, **effort) if search["strategy"] == "hexgen2" else ()
        written.append(write(report, html(found, problem.cluster, told, problem.assumptions)))
    if as_json:
        click.echo(found.model_dump_json(indent=2))
        return
    show(found, Console())
    for sentence in problem.assumptions:
        click.echo(f"assumed: {sentence}")
    for path in written:
        click.echo(f"wrote {path}")


def _as_measured(problem: Problem, file: Path) -> Problem:
    """The problem with devices as slow as a running plan's were. Raises ConfigError."""
    # Reads messages, which no other plan needs.
    from hexgen2.calibration_file import load_calibration
    from hexgen2.device_factors import device_factors
    from hexgen2.scheduler.calibrated import calibrated

    factors = device_factors(*load_calibration(file))
    return replace(problem, cluster=calibrated(problem.cluster, factors, problem.engine))


def rent(problem: Problem, budget: float | None, rate: float, strategy: str, **search: Any) -> Placement:
    """The plan of the machines that a budget or a rate wants. Raises ConfigError."""
    if strategy != "hexgen2":
        raise ConfigError(f"--strategy {strategy}: what to rent is planned by the default strategy alone")
    if budget is not None:
        return within_budget(problem, budget, **search)
    return cheapest(problem, rate, **search)


def codec_names(text: str) -> tuple[str, ...]:
    """``none,int8``. Raises ConfigError."""
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in CODECS:
            raise ConfigError(f"--kv-codecs {text}: no `{name}`; there are: {', '.join(CODECS)}")
    return names


def slo(text: str) -> tuple[float, float]:
    """``0.5:0.05`` is half a second to the first token, 50 ms for each further one. Raises ConfigError."""
    try:
        ttft, tpot = (float(part) for part in text.split(":"))
    except ValueError:
        ttft = tpot = 0.0
    if not (ttft > 0 and tpot > 0):
        raise ConfigError(f"--target-slo {text}: expected two numbers of seconds, such as 0.5:0.05")
    return ttft, tpot


def write(path: Path, text: str) -> Path:
    """Raises ConfigError."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    return path


def with_progress(problem: Problem, strategy: str, **search: Any) -> Placement:
    """Solve, with a bar on standard error where somebody sees it."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[flow]}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    ) as bar:
        task = bar.add_task("costs of groups", total=1.0, flow="")

        def tell(what: str, share: float, flow: float) -> None:
            bar.update(task, description=what, completed=share, flow=f"{flow:.3g} requests/s")

        return solve(problem, strategy, progress=tell, **search)


def show(plan: Placement, console: Console) -> None:
    """The plan as a table and a few sentences."""
    console.print(
        f"[bold]{plan.throughput_rps:.3g} requests/s[/] ({plan.output_tokens_per_s:,.0f} output tokens/s) of "
        f"{plan.workload} with {plan.model} on {plan.cluster}: {plan.kind}"
    )
    console.print(f"{plan.why}; bottleneck: {plan.bottleneck}")
    taken = sorted({m for each in plan.replicas for m, _ in each.gpus} | {idle.machine for idle in plan.idle})
    if len(taken) <= 20:
        console.print(f"machines: {', '.join(taken)}", highlight=False)
    table = Table(
        "replica", "GPUs", "stages (TP x layers)", "does", "of", "batch", "time", box=None, padding=(0, 2, 0, 0)
    )
    for column in (3, 4, 5, 6):
        table.columns[column].justify = "right"
    for replica in plan.replicas:
        colour = COLOURS[replica.role]
        table.add_row(
            f"[{colour}]{replica.id}[/]",
            gpus(replica),
            stages(replica),
            f"{replica.flow_rps:.3g}/s",
            f"{replica.capacity_rps:.3g}/s",
            str(replica.batch or ""),
            times(replica),
        )
    console.print(table)
    for idle in plan.idle:
        console.print(f"idle: {idle.count} {idle.gpu} on {idle.machine}")
    for route in plan.routes if len(plan.routes) <= 20 else ():
        console.print(
            f"{route.prefill} -> {route.decode}: {route.flow_rps:.3g}/s, KV in {route.transfer_s * 1e3:.0f} ms"
            + (f" as {route.codec}" if route.codec != NONE else ""),
            highlight=False,
        )
    if plan.colocate_max_prompt_tokens:
        told = (
            f"prompts of up to {plan.colocate_max_prompt_tokens} tokens are answered sooner by a decode replica alone"
        )
        console.print(told, highlight=False)
    if len(plan.routes) > 20:
        console.print(f"{len(plan.routes)} routes: see the plan.yaml")
    ttft = "more than the replicas carry" if plan.ttft_s is None else f"{plan.ttft_s:.3g} s"
    console.print(f"at {plan.load_rps:.3g} requests/s: TTFT {ttft}, TPOT {plan.tpot_s * 1e3:.3g} ms", highlight=False)
    if plan.gap is not None:
        console.print(
            f"bound ({plan.bound_method}): {plan.bound_rps:.4g}/s; this is {plan.gap:.1%} below it", highlight=False
        )
    else:
        console.print("no bound: a group is larger or more mixed than those that the bound counts")
    if plan.price_per_hour is not None:
        million = plan.price_per_million_output_tokens or 0.0
        console.print(f"{plan.price_per_hour:.2f} $/h, {million:.2f} $ per million output tokens", highlight=False)


def gpus(replica: ReplicaPlan) -> str:
    """``2 A100-SXM on a, 4 L40 on b``."""
    return ", ".join(f"{count} {gpu} on {machine}" for (machine, gpu), count in replica.gpus.items())


def stages(replica: ReplicaPlan) -> str:
    """``4x40, 2x20, 2x20``."""
    return ", ".join(f"{stage.tensor_parallel_size}x{stage.num_layers}" for stage in replica.stages)


def times(replica: ReplicaPlan) -> str:
    """Prefill's seconds, decode's per token, or both."""
    parts = []
    if replica.prefill_s is not None:
        parts.append(f"{replica.prefill_s:.2f} s")
    if replica.tpot_s is not None:
        parts.append(f"{replica.tpot_s * 1e3:.0f} ms")
    return " ".join(parts)
