"""``hexgen2 bench kv``: what it takes, and its tables."""

import asyncio
import json

import click
import msgspec
from rich.console import Console
from rich.table import Table

from hexgen2.bench import kv
from hexgen2.bench.idle import measure_idle
from hexgen2.bench.kv_measure import Row
from hexgen2.kv.codecs import CODECS

IDLE_TARGET = 0.02


@click.command("kv")
@click.option("--transport", "names", multiple=True, type=click.Choice(["tcp", "ucx"]), help="Default: all there are.")
@click.option("--codec", "codecs", multiple=True, type=click.Choice(CODECS), default=CODECS, help="Default: all.")
@click.option("--mib", "sizes", multiple=True, type=click.IntRange(4, 512), default=(16, 64), show_default=True)
@click.option("--repeat", type=click.IntRange(1, 1000), default=9, show_default=True)
@click.option("--shaped/--no-shaped", default=True, show_default=True, help="Links of 1 and 5 Gbit/s; as root.")
@click.option("--idle", "idle_s", type=click.FloatRange(min=1), metavar="S", help="Only what idle workers cost.")
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON.")
def bench_kv(
    names: tuple[str, ...],
    codecs: tuple[str, ...],
    sizes: tuple[int, ...],
    repeat: int,
    shaped: bool,
    idle_s: float | None,
    as_json: bool,
) -> None:
    """KV hand-overs between processes, beside the bare transport; two minutes or so."""
    names = names or kv.transports()
    console = Console(stderr=as_json)
    if idle_s is not None:
        _idle(names, idle_s, console, as_json=as_json)
        return
    rows: list[Row] = []
    with console.status("measuring") as status:

        def note(row: Row) -> None:
            rows.append(row)
            status.update(f"{row.transport}, {row.link}: {row.stage} {row.codec} {row.bytes >> 20} MiB")

        for name in names:
            for row in kv.local_rows(name, codecs, sizes, repeat):
                note(row)
        reason = kv.why_not_shaped() if shaped else "not asked for"
        if shaped and not reason:
            for row in kv.shaped_rows(codecs, max(sizes), min(repeat, 5)):
                note(row)
    if as_json:
        click.echo(json.dumps([msgspec.to_builtins(row) for row in rows], indent=1))
    else:
        console.print(_table(rows))
    if reason:
        console.print(f"shaped links are left out: {reason}")


def _table(rows: list[Row]) -> Table:
    table = Table(
        "transport",
        "link",
        "codec",
        "stage",
        "MiB",
        "GB/s",
        "bare",
        "ratio",
        "target",
        "CPU s/GB",
        "of bound",
        box=None,
    )
    for row in rows:
        target = kv.target(row)
        sign = "≤" if row.stage == "exposed" else "≥"
        met = target is not None and (row.ratio <= target if row.stage == "exposed" else row.ratio >= target)
        shown = "" if target is None else f"{sign} {target:g}" + ("" if met else " missed")
        table.add_row(
            *(row.transport, row.link, row.codec, row.stage, str(row.bytes >> 20)),
            *(f"{row.gb_per_s:.3f}", f"{row.raw_gb_per_s:.3f}", f"{row.ratio:.3f}", shown),
            *(f"{row.cpu_s_per_gb:.2f}", f"{row.of_bound:.2f}" if row.of_bound else ""),
        )
    return table


def _idle(names: tuple[str, ...], seconds: float, console: Console, *, as_json: bool) -> None:
    with console.status("measuring workers that do nothing"):
        rows = [row for name in names for row in asyncio.run(measure_idle(name, seconds))]
    if as_json:
        click.echo(json.dumps([msgspec.to_builtins(row) for row in rows], indent=1))
        return
    for row in rows:
        met = "" if row.cores < IDLE_TARGET else "  missed"
        console.print(f"{row.worker:8} {row.transport:4} {row.cores:7.2%} of a core over {row.seconds:g} s{met}")
