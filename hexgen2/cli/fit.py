"""``hexgen2 fit``: fit the cost model to measured tables, show its errors, and keep it if asked."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

from hexgen2 import catalog

if TYPE_CHECKING:
    from hexgen2.scheduler.fit import Error


@click.command("fit")
@click.option(
    "--data",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    required=True,
    help="Folder with the measured tables, which docs/cost-model.md names.",
)
@click.option(
    "--judge",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Also judge on this file's measurements, which are not fitted to (columns as llama2_70b_tp4_measured.csv).",
)
@click.option("--write", "keep", is_flag=True, help="Write the catalog's efficiencies, engines and workloads.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def fit_command(data: Path, judge: Path | None, keep: bool, as_json: bool) -> None:
    """Fit the cost model to measured times, and show how far off it is.

    With --write the built-in workloads are made from the traces, too.
    """
    # Here, since other commands need not wait for SciPy.
    from hexgen2.scheduler.fit import fit, judge_file
    from hexgen2.scheduler.fit_files import write, write_workloads
    from hexgen2.scheduler.fit_workloads import fit_workloads

    found = fit(data)
    errors = (*found.errors, *(judge_file(judge, found) if judge else ()))
    if as_json:
        click.echo(json.dumps({"errors": [asdict(e) for e in errors], "engine": found.engine}, indent=2))
    else:
        Console().print(draw(errors))
    if keep:
        for path in (*write(found, catalog.FOLDER), write_workloads(fit_workloads(data), catalog.FOLDER)):
            click.echo(f"written: {path}", err=as_json)


def draw(errors: "tuple[Error, ...]") -> Table:
    """The errors as a table."""
    table = Table(title="Predicted against measured, relative error")
    for name in ("what", "GPU", "in the fit"):
        table.add_column(name)
    for name in ("measurements", "median", "p90", "bias"):
        table.add_column(name, justify="right")
    for e in errors:
        row = (e.what, e.gpu, "no" if e.held_out else "yes", str(e.count))
        table.add_row(*row, f"{e.p50:.1%}", f"{e.p90:.1%}", f"{e.bias:+.1%}")
    return table
