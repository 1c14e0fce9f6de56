"""``hexgen2 certs``: the certificates of a fleet."""

import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from hexgen2.cli.up import make_console
from hexgen2.security import certs
from hexgen2.security.callers import Caller
from hexgen2.security.certs import CA_DAYS, LEAF_DAYS, Issued

LOOPBACK = ("localhost", "127.0.0.1", "::1")

_folder = click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
_as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def _days(default: float) -> Callable[[Callable[..., None]], Callable[..., None]]:
    limits = click.FloatRange(min=0, min_open=True)
    return click.option("--days", type=limits, default=default, show_default=True, help="How long it is to be good.")


@click.group("certs")
def certs_command() -> None:
    """Certificates for TLS between the services.

    \b
    One machine:
      hexgen2 certs fleet DIR           everything for a fleet on this machine
      hexgen2 up --tls DIR
      hexgen2 status --tls DIR/client
    Several: keep DIR where you administrate, copy DIR/NAME alone to the host of NAME.
      hexgen2 certs init DIR
      hexgen2 certs issue DIR worker-1 --role worker --host 10.0.0.7
      hexgen2 certs renew DIR           new keys and certificates; processes take them without a restart
    """


@certs_command.command()
@_folder
@_days(CA_DAYS)
@_as_json
def init(folder: Path, days: float, as_json: bool) -> None:
    """Make a certificate authority in FOLDER. Guard FOLDER/ca.key."""
    _show([certs.init(folder, days=days)], as_json=as_json)


@certs_command.command()
@_folder
@click.argument("name")
@click.option(
    "--role",
    "roles",
    multiple=True,
    required=True,
    type=click.Choice([each.value for each in Caller]),
    help="May be repeated.",
)
@click.option("--host", "hosts", multiple=True, help="Name or address that others dial; may be repeated.")
@_days(LEAF_DAYS)
@_as_json
def issue(folder: Path, name: str, roles: Sequence[str], hosts: Sequence[str], days: float, as_json: bool) -> None:
    """Make (or replace) key and certificate in FOLDER/NAME."""
    _show([certs.issue(folder, name, map(Caller, roles), hosts, days)], as_json=as_json)


@certs_command.command()
@_folder
@click.option("--host", "hosts", multiple=True, default=LOOPBACK, help="Names and addresses.  [default: this machine]")
@_days(LEAF_DAYS)
@_as_json
def fleet(folder: Path, hosts: Sequence[str], days: float, as_json: bool) -> None:
    """Make an authority, where there is none, and a certificate for each role, as `hexgen2 up --tls FOLDER` needs."""
    if not (folder / "ca.pem").exists():
        certs.init(folder)
    _show([certs.issue(folder, role, (role,), hosts, days) for role in Caller], as_json=as_json)


@certs_command.command()
@_folder
@_days(LEAF_DAYS)
@_as_json
def renew(folder: Path, days: float, as_json: bool) -> None:
    """Make every key and certificate in FOLDER anew, with the roles and hosts that it has."""
    _show(certs.renew(folder, days), as_json=as_json)


@certs_command.command()
@_folder
@_as_json
def show(folder: Path, as_json: bool) -> None:
    """List the certificates in FOLDER, or those that one process uses."""
    authority = certs.read(folder / "ca.pem")
    own = folder / "cert.pem"
    _show([authority, *([certs.read(own)] if own.exists() else certs.issued(folder))], as_json=as_json)


def _show(found: Sequence[Issued], *, as_json: bool) -> None:
    now = datetime.now(UTC)
    if as_json:
        rows: list[dict[str, Any]] = [
            {
                "name": each.name,
                "roles": each.callers,
                "hosts": each.hosts,
                "not_before": each.not_before.isoformat(),
                "not_after": each.not_after.isoformat(),
                "path": str(each.path),
            }
            for each in found
        ]
        click.echo(json.dumps(rows, indent=2))
        return
    table = Table("name", "roles", "hosts", "expires", "file", box=None, padding=(0, 2, 0, 0))
    for each in found:
        left_days = (each.not_after - now).total_seconds() / 86400
        left = f"in {left_days:.0f} days" if left_days >= 1 else f"in {left_days * 24:.0f} hours"
        when = left if left_days > 0 else "[red]expired"
        table.add_row(each.name, ", ".join(each.callers), ", ".join(each.hosts), when, str(each.path))
    make_console().print(table)
