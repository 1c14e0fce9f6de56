"""``hexgen2 keys``: whom a gateway serves."""

import json
from pathlib import Path

import click
from rich.table import Table

from hexgen2.cli.up import make_console
from hexgen2.security.api_keys import add_key, read_keys, remove_key

_file = click.option("--file", required=True, type=click.Path(path_type=Path, dir_okay=False), help="The file of keys.")
_as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


@click.group("keys")
def keys_command() -> None:
    """API keys of a gateway, which runs with `--api-keys FILE` and takes changes of FILE without a restart.

    FILE holds hashes: a key is shown once, when it is made.
    """


@keys_command.command()
@click.argument("name")
@_file
@click.option("--requests-per-minute", type=int)
@click.option("--max-concurrent-requests", type=int)
@click.option("--max-body-bytes", type=int, help="Of one request.")
@_as_json
def add(name: str, file: Path, as_json: bool, **limits: int | None) -> None:
    """Make a key and print it. NAME is whose it is: metrics and traces show it."""
    key = add_key(file, name, **limits)
    click.echo(json.dumps({"name": name, "key": key}) if as_json else key)


@keys_command.command()
@click.argument("name")
@_file
def remove(name: str, file: Path) -> None:
    """Forget a key: its next request is refused."""
    remove_key(file, name)


@keys_command.command("list")
@_file
@_as_json
def list_keys(file: Path, as_json: bool) -> None:
    """Show the names and limits of all keys."""
    keys = read_keys(file)
    if as_json:
        click.echo(json.dumps([key.model_dump(exclude={"sha256"}) for key in keys], indent=2))
        return
    table = Table("name", "a minute", "at once", "body", "", box=None, padding=(0, 2, 0, 0))
    for key in keys:
        limits = (key.requests_per_minute, key.max_concurrent_requests, key.max_body_bytes)
        shown = ("—" if limit is None else f"{limit:,}" for limit in limits)
        table.add_row(key.name, *shown, "disabled" if key.disabled else "")
    make_console().print(table)
