"""What ``hexgen2 trace --why-slow`` shows."""

import asyncio
import json
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from hexgen2 import why_slow
from hexgen2.cli.client import Access, get_plan
from hexgen2.errors import HexgenError
from hexgen2.placement import Placement, from_json, load_placement
from hexgen2.traces import Trace


def show(
    trace: Trace,
    plan: Path | None,
    coordinator: str,
    timeout_s: float,
    access: Access,
    console: Console,
    *,
    as_json: bool,
) -> None:
    """The parts of a request's time. The plan is a file's, or that of the coordinator, where there is one.

    Raises:
        HexgenError: the file cannot be used.
    """
    placement, missing = (load_placement(plan), "") if plan else _running(coordinator, timeout_s, access)
    told = why_slow.why_slow(trace, placement)
    if as_json:
        click.echo(json.dumps(told.to_json(), indent=2))
        return
    console.print(table(told))
    if missing:
        console.print(missing, style="dim", highlight=False)
    if told.bottleneck is None:
        console.print("nothing took longer than promised" if placement else "nothing took long", highlight=False)
    else:
        part = told.bottleneck
        more = f"{part.excess_s:.3f} s more than promised" if part.promised_s is not None else f"{part.seconds:.3f} s"
        console.print(f"[bold]held up by {part.resource}[/]: {part.name}, {more}", highlight=False)


def _running(coordinator: str, timeout_s: float, access: Access) -> tuple[Placement | None, str]:
    """The plan in force, or why none is known."""
    try:
        text = asyncio.run(get_plan(coordinator, timeout_s, access)).plan_json
    except HexgenError as error:
        return None, f"no promises: {error} (--plan FILE gives them without a coordinator)"
    return (from_json(text), "") if text else (None, "no promises: the fleet runs without a plan.yaml")


def table(told: why_slow.WhySlow) -> Table:
    """For people."""
    found = Table("", "took", "promised", "more", "on", "", box=None, padding=(0, 2, 0, 0))
    for part in told.parts:
        style = "bold red" if part is told.bottleneck else ""
        found.add_row(part.name, *_times(part.seconds, part.promised_s), part.resource, part.note, style=style)
    found.add_row("all", *_times(told.seconds, told.promised_s), "", "", style="bold")
    return found


def _times(seconds: float, promised_s: float | None) -> tuple[str, str, str]:
    if promised_s is None:
        return f"{seconds:.4f} s", "-", ""
    return f"{seconds:.4f} s", f"{promised_s:.4f} s", f"{seconds - promised_s:+.4f} s"
