"""``hexgen2 deploy baremetal``: a folder with which Ansible puts a plan on the hosts of an inventory."""

import hashlib
import shlex
import shutil
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import click
import yaml

from hexgen2.config import Config
from hexgen2.deploy.baremetal import Process, names_of, processes, roles_of
from hexgen2.deploy.hosts_file import hosts_file, release_folder
from hexgen2.deploy.systemd import unit
from hexgen2.errors import ConfigError
from hexgen2.inventory import Inventory, load_inventory
from hexgen2.placement import load_placement
from hexgen2.security import certs
from hexgen2.write_file import write_file

#: Certificates are renewed by writing the folder again and running site.yaml: processes take them without a restart.
CERT_DAYS = 90


@click.command("baremetal")
@click.argument("plan", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--inventory", "inventory_file", required=True, type=click.Path(dir_okay=False, path_type=Path), metavar="FILE"
)
@click.option("-o", "--output", required=True, type=click.Path(file_okay=False, path_type=Path), metavar="DIR")
def baremetal_command(plan: Path, inventory_file: Path, output: Path) -> None:
    """Write DIR: systemd units, configuration and certificates of each host, and the Ansible playbooks that install,
    start, upgrade and remove them.

    \b
    hexgen2 deploy baremetal plan.yaml --inventory inventory.yaml -o rack
    ansible-playbook -i rack/hosts.yaml rack/site.yaml

    DIR/certs has the certificate authority: guard DIR, and keep it for the next time.
    """
    inventory, placement = load_inventory(inventory_file), load_placement(plan)
    found = processes(inventory, placement, str(inventory_file))
    wheels = _wheels(inventory, inventory_file)
    release = _release(inventory, inventory_file, wheels)
    command = shlex.join(
        ["hexgen2", "deploy", "baremetal", str(plan), "--inventory", str(inventory_file), "-o", str(output)]
    )
    output.mkdir(parents=True, exist_ok=True, mode=0o700)
    _playbooks(output)
    hosts = hosts_file(
        inventory,
        found,
        release,
        {each: path.name + each[len(each.partition("[")[0]) :] for each, path in wheels.items()},
        command,
    )
    (output / "hosts.yaml").write_text(hosts, encoding="utf-8")
    # Of the command alone: what an earlier plan had put there would be copied to the hosts.
    shutil.rmtree(output / "files", ignore_errors=True)
    _packages(inventory, inventory_file, wheels, output / "files" / "packages")
    for host in inventory.hosts:
        _host(inventory, inventory_file, plan, found[host.name], release, output / "files" / host.name)
    if inventory.tls:
        _certificates(inventory, found, output)
    _tell(inventory, found, output)


def _playbooks(output: Path) -> None:
    source = files("hexgen2.deploy") / "ansible"
    (output / "tasks").mkdir(exist_ok=True)
    for folder in ("", "tasks"):
        for entry in (source / folder if folder else source).iterdir():
            if entry.name.endswith(".yaml"):
                (output / folder / entry.name).write_text(entry.read_text(encoding="utf-8"), encoding="utf-8")


def _wheels(inventory: Inventory, file: Path) -> dict[str, Path]:
    """Packages that are files, relative to the inventory. Raises ConfigError where one is not there."""
    found = {}
    for number, package in enumerate(inventory.packages):
        path = file.parent / package.partition("[")[0]
        if path.suffix == ".whl" or path.name.endswith(".tar.gz"):
            if not path.is_file():
                raise ConfigError(f"{file}: packages.{number}: {path}: no such file")
            found[package] = path
    for field, extra in (("constraints", inventory.constraints), ("api_keys", inventory.api_keys)):
        if extra is not None and not (file.parent / extra).is_file():
            raise ConfigError(f"{file}: {field}: {file.parent / extra}: no such file")
    return found


def _release(inventory: Inventory, file: Path, wheels: Mapping[str, Path]) -> str:
    """A name that is another where the software is."""
    digest = hashlib.sha256()
    for package in (inventory.python, *inventory.packages):
        digest.update(package.encode() + b"\0")
        if package in wheels:
            digest.update(wheels[package].read_bytes())
    if inventory.constraints is not None:
        digest.update((file.parent / inventory.constraints).read_bytes())
    return digest.hexdigest()[:12]


def _packages(inventory: Inventory, file: Path, wheels: Mapping[str, Path], folder: Path) -> None:
    folder.mkdir(parents=True)
    for path in wheels.values():
        shutil.copyfile(path, folder / path.name)
    if inventory.constraints is not None:
        shutil.copyfile(file.parent / inventory.constraints, folder / "constraints.txt")


def _host(inventory: Inventory, file: Path, plan: Path, found: Sequence[Process], release: str, folder: Path) -> None:
    (folder / "units").mkdir(parents=True)
    (folder / "etc").mkdir()
    for process in found:
        text = unit(process, inventory.user, release_folder(release))
        (folder / "units" / process.unit).write_text(text, encoding="utf-8")
        settings = yaml.safe_dump(_settings(process.config), sort_keys=False, allow_unicode=True)
        (folder / "etc" / f"{process.name}.yaml").write_text(settings, encoding="utf-8")
        if process.name == "coordinator":
            shutil.copyfile(plan, folder / "etc" / "plan.yaml")
        if process.name == "gateway" and inventory.api_keys is not None:
            write_file(folder / "etc" / "api-keys", (file.parent / inventory.api_keys).read_bytes(), 0o600)


def _settings(config: Config) -> dict[str, Any]:
    """What differs from the defaults: a release that is a little older knows no newer field."""
    data = config.model_dump(mode="json", exclude_defaults=True)
    if (engine := getattr(config, "engine", None)) is not None:
        # Which engine it is decides what the other fields are.
        data["engine"] = {"kind": engine.kind} | data.get("engine", {})
    return data


def _certificates(inventory: Inventory, found: Mapping[str, Sequence[Process]], output: Path) -> None:
    authority = output / "certs"
    if not (authority / "ca.pem").exists():
        certs.init(authority)
    for host in inventory.hosts:
        for role in roles_of(inventory, found[host.name], host):
            name = f"{host.name}-{role}"
            certs.issue(authority, name, (role,), names_of(host), CERT_DAYS)
            folder = output / "files" / host.name / "etc" / "tls" / role
            folder.mkdir(parents=True, mode=0o700)
            for part, mode in (("ca.pem", 0o644), ("cert.pem", 0o644), ("key.pem", 0o600)):
                write_file(folder / part, (authority / name / part).read_bytes(), mode)


def _tell(inventory: Inventory, found: Mapping[str, Sequence[Process]], output: Path) -> None:
    for host in inventory.hosts:
        click.echo(f"{host.name} ({host.address}): {', '.join(each.name for each in found[host.name]) or 'nothing'}")
    click.echo(f"\nansible-playbook -i {output}/hosts.yaml {output}/site.yaml")
