"""``hexgen2 doctor``: what is missing on this machine or in a fleet, each with its remedy."""

import asyncio
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import click
import grpc
from rich.table import Table

from hexgen2.cli.client import Access, get_plan
from hexgen2.cli.fleet_config import FleetConfig, default_model
from hexgen2.cli.up import make_console
from hexgen2.config import TlsConfig, home
from hexgen2.doctor import links, machine
from hexgen2.doctor.finding import Finding, State, failed, ok, warning
from hexgen2.errors import HexgenError
from hexgen2.plan import Replica, ReplicaState
from hexgen2.rpc.client import channel
from hexgen2.rpc.health import serves
from hexgen2.rpc.plan_convert import plan_from_proto, status_from_proto
from hexgen2.security.tls import TlsFiles

TIMEOUT_S = 5.0
_MARKS = {State.OK: "[green]✓", State.WARNING: "[yellow]!", State.FAILED: "[red]✗"}


@click.command("doctor")
@click.option("--model", type=click.Path(path_type=Path), help="A model's folder; default: the default model's.")
@click.option("--port", "ports", multiple=True, metavar="HOST:PORT", help="Must be free.  [default: those of `up`]")
@click.option(
    "--tls", type=click.Path(path_type=Path), envvar="HEXGEN2_TLS", help="Folder with a process's certificates."
)
@click.option("--coordinator", default="", metavar="HOST:PORT", help="Look at a running fleet, not at this machine.")
@click.option("--serve", default="", metavar="HOST:PORT", help="Wait here for --link from other hosts; Ctrl-C ends it.")
@click.option(
    "--link", "link_peers", multiple=True, metavar="HOST:PORT", help="Measure the way from where --serve runs."
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def doctor_command(
    model: Path | None,
    ports: Sequence[str],
    tls: Path | None,
    coordinator: str,
    serve: str,
    link_peers: Sequence[str],
    as_json: bool,
) -> None:
    """Say what is missing on this machine, or in a fleet, and what to do about it. Exit status 1 if anything fails."""
    if serve:
        lines = links.serve(serve)
        click.echo(f"serving {next(lines)}")
        for line in lines:
            click.echo(line)
        return
    if coordinator:
        findings = asyncio.run(check_fleet(coordinator, tls))
    else:
        findings = list(check_machine(model, ports or default_ports(), tls))
    for peer in link_peers:
        findings += links.measure(peer)
    show(findings, as_json=as_json)
    if any(each.state is State.FAILED for each in findings):
        raise SystemExit(1)


def default_ports() -> tuple[str, ...]:
    """Where ``hexgen2 up`` listens."""
    return tuple(FleetConfig.model_fields[name].default for name in ("listen", "http_listen", "coordinator"))


def check_machine(model: Path | None, ports: Sequence[str], tls: Path | None) -> Iterator[Finding]:
    """Everything that can be seen from here alone."""
    yield from machine.check_python()
    yield from machine.check_memory(home())
    yield from machine.check_gpus()
    yield from machine.check_kv_plane()
    yield from machine.check_ports(ports)
    if model is None and not default_model().exists():
        yield warning("model", "the default one is not there yet", "hexgen2 model prepare (`up` does it by itself)")
    else:
        yield from machine.check_model(model or default_model())
    if tls is not None:
        yield from machine.check_certificates(tls)


async def check_fleet(coordinator: str, tls: Path | None) -> list[Finding]:
    """The coordinator, and every replica that it knows, dialled from here."""
    files = None if tls is None else TlsFiles(TlsConfig.model_validate(tls))
    try:
        answer = await get_plan(coordinator, TIMEOUT_S, Access(files))
    except HexgenError as error:
        return [failed("coordinator", str(error), "start it, or name another: --coordinator HOST:PORT")]
    plan = plan_from_proto(answer.plan)
    states = {each.replica_id: each.state for each in map(status_from_proto, answer.statuses)}
    findings = [ok("coordinator", f"{coordinator}, plan epoch {plan.epoch}, {len(plan.replicas)} replicas")]
    if not plan.replicas:
        findings.append(failed("replicas", "none", "start workers with --coordinator " + coordinator))
    findings += await asyncio.gather(
        *(_check_replica(each, states.get(each.replica_id), files) for each in plan.replicas)
    )
    models = {each.model_sha256 for each in plan.replicas if each.model_sha256}
    if len(models) > 1:
        findings.append(failed("models", f"{len(models)} different ones", "all replicas must serve the same folder"))
    return findings


async def _check_replica(replica: Replica, state: ReplicaState | None, tls: TlsFiles | None) -> Finding:
    check = f"replica {replica.replica_id}"
    found = f"{replica.role}, {state or 'unknown'}, {replica.address}, KV by {replica.transport or 'nothing yet'}"
    async with channel(replica.address, tls) as peer:
        try:
            serving = await serves(peer, TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            why = error.details() or error.code().name
            return failed(check, f"{found}: {why[:200]}", "is the process running? is the address reachable from here?")
    if not serving:
        return warning(check, f"{found}: not serving yet", "look at its log")
    return ok(check, found)


def show(findings: Sequence[Finding], *, as_json: bool) -> None:
    """As a table for people or JSON for programs."""
    if as_json:
        click.echo(json.dumps([asdict(each) for each in findings], indent=2))
        return
    table = Table("", "", "", box=None, show_header=False, padding=(0, 2, 0, 0))
    for each in findings:
        table.add_row(_MARKS[each.state], each.check, each.found)
        if each.remedy:
            table.add_row("", "", f"[bold]→ {each.remedy}")
    console = make_console()
    console.print(table)
    bad = sum(each.state is State.FAILED for each in findings)
    console.print(f"{len(findings)} checks, {bad} failed" if bad else f"{len(findings)} checks, none failed")
