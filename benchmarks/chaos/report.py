"""The result as tables for people."""

from dataclasses import asdict, dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.chaos.run import Seen
from benchmarks.chaos.verdict import Freed, Row, Verdict

#: Of each kind of violation.
SHOWN = 5
MAX_TOLD = 15


@dataclass(frozen=True, slots=True)
class Result:
    """One fleet's run and what it means."""

    setting: str
    seen: Seen
    verdict: Verdict
    folder: str

    @property
    def ok(self) -> bool:
        """Nothing happened that must not."""
        return not self.verdict.violations and not self.seen.violations


def to_json(result: Result) -> dict[str, object]:
    """Everything but the requests and the strikes one by one, which are in the folder."""
    seen, verdict = asdict(result.seen), asdict(result.verdict)
    num_requests = len(seen.pop("outcomes"))
    del seen["strikes"]
    violations = [*verdict.pop("violations"), *seen.pop("violations")]
    return {
        "setting": result.setting,
        "ok": result.ok,
        "num_requests": num_requests,
        **verdict,
        **seen,
        "violations": violations,
        "folder": result.folder,
    }


def show(result: Result, console: Console) -> None:
    """Print it."""
    seen, verdict = result.seen, result.verdict
    console.print(f"\n[bold]{result.setting}[/]: {len(seen.outcomes)} requests in {seen.seconds:.0f} s")
    console.print(_faults(verdict.rows))
    if verdict.states:
        console.print(_states(verdict))
    if verdict.told:
        table = Table("what clients were told", "times", title="the commonest errors")
        for told, num in list(verdict.told.items())[:MAX_TOLD]:
            table.add_row(escape(told), str(num))
        console.print(table)
    if seen.meddling:
        table = Table("sent to workers: what came of it", "times", title="stale, repeated, forged, garbage")
        for trick, num in seen.meddling.items():
            table.add_row(trick, str(num))
        console.print(table)
    table = Table("process", "starts", "lives s", "RSS then MiB", "RSS now MiB", title="memory since the last start")
    for each in seen.memory:
        mebi = f"{each.first_bytes / 2**20:.1f}", f"{each.last_bytes / 2**20:.1f}"
        table.add_row(each.name, str(each.starts), f"{each.seconds:.0f}", *mebi)
    console.print(table)
    for name, value in _sums(result):
        console.print(f"{name:42} {value}", highlight=False)
    _violations(result, console)


def _faults(rows: tuple[Row, ...]) -> Table:
    names = ("fault", "strikes", "requests", "answered", "retried", "refused", "broken off", "deadline", "cancelled")
    table = Table(title="requests under way during faults, and what became of them")
    for name in names:
        table.add_column(name, justify="left" if name == "fault" else "right")
    for row in rows:
        counts = (row.strikes, row.requests, row.answered, row.retried)
        ends = (row.refused, row.broken_off, row.deadline, row.cancelled)
        table.add_row(row.fault, *map(str, (*counts, *ends)))
    return table


def _states(verdict: Verdict) -> Table:
    table = Table("fault", "state of transfers at the target: strikes that found one in it")
    for kind, counts in verdict.states.items():
        table.add_row(kind, ", ".join(f"{state} {num}" for state, num in counts.items()))
    return table


def _sums(result: Result) -> list[tuple[str, str]]:
    seen, verdict = result.seen, result.verdict
    return [
        ("answered of those whose client waited", f"{verdict.availability:.2%}"),
        ("and while the gateway was there", f"{verdict.availability_with_gateway:.2%}"),
        ("and without any fault", f"{verdict.availability_in_peace:.2%}"),
        ("cancel to free", _freed(verdict.freed)),
        ("cancel to free, worker out of reach", _freed(verdict.freed_under_fault)),
        ("this process itself woke late by, p99", f"{seen.late_p99_s:.3f} s"),
        ("left alone, all free after", f"{seen.quiesce_s:.1f} s"),
        ("leaked / still in quarantine", f"{seen.leaked_bytes:.0f} / {seen.quarantine_bytes:.0f} bytes"),
        ("most in one pool / in quarantine", f"{seen.max_used_bytes:.0f} / {seen.max_quarantine_bytes:.0f} bytes"),
    ]


def _freed(freed: Freed) -> str:
    return f"p50 {freed.p50_s:.3f} s, p99 {freed.p99_s:.3f} s, worst {freed.max_s:.3f} s of {freed.num}"


def _violations(result: Result, console: Console) -> None:
    violations = [*result.verdict.violations, *result.seen.violations]
    if not violations:
        console.print("[green]no violation[/]")
        return
    by_kind: dict[str, int] = {}
    for each in violations:
        by_kind[each.what] = by_kind.get(each.what, 0) + 1
        if by_kind[each.what] <= SHOWN:
            trace = f" (trace {each.trace_id})" if each.trace_id else ""
            console.print(f"[red]{each.what}[/]: {escape(each.detail)}{trace}", highlight=False)
    console.print(f"violations: {by_kind}; logs and traces are in {result.folder}", highlight=False)
