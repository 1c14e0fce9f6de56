"""What came of it, as a table for people and as JSON for programs."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.rack.load import Tally

SHOWN = 10


@dataclass(frozen=True, slots=True)
class Result:
    """One run of the playbooks. ``failures``: of requests; ``left``: what is not as it should be afterwards."""

    hosts: int
    versions: tuple[str, str]
    seconds: Mapping[str, float]
    answered: Mapping[str, int]
    passed_over: Mapping[str, int]
    failures: tuple[str, ...]
    slowest_s: float
    left: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Requests were answered, none failed, and every host was as the playbooks promise."""
        return bool(sum(self.answered.values())) and not self.failures and not self.left


def result(
    hosts: int, versions: tuple[str, str], seconds: Mapping[str, float], tally: Tally, left: tuple[str, ...]
) -> Result:
    """Of what was seen."""
    told = (dict(tally.answered), dict(tally.passed_over), tuple(tally.failed), tally.slowest_s)
    return Result(hosts, versions, dict(seconds), *told, left)


def to_json(found: Result) -> dict[str, object]:
    """All of it."""
    return asdict(found) | {"ok": found.ok}


def show(found: Result, console: Console) -> None:
    """Print it."""
    table = Table(
        title=f"{found.hosts} hosts, {found.versions[0]} to {found.versions[1]} under load", show_header=False
    )
    table.add_column()
    table.add_column(justify="right")
    for step, taken in found.seconds.items():
        table.add_row(step, f"{taken / 60:.1f} min")
    table.add_section()
    table.add_row("requests answered", f"{sum(found.answered.values()):,}")
    for gateway, count in sorted(found.answered.items()):
        table.add_row(f"  by {escape(gateway)}", f"{count:,}")
    table.add_row("requests failed", f"{len(found.failures):,}")
    table.add_row("passes over a gateway that drains or is away", f"{sum(found.passed_over.values()):,}")
    table.add_row("slowest answer", f"{found.slowest_s:.1f} s")
    console.print(table)
    for problem in (*found.failures[:SHOWN], *found.left):
        console.print(f"[red]{escape(problem)}[/]")
