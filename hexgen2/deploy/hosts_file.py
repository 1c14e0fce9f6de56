"""What the Ansible playbooks beside this file are told: ``hosts.yaml``. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from hexgen2.address import format_address
from hexgen2.deploy.baremetal import PREFIX, Process, tls_folder
from hexgen2.inventory import Host, Inventory
from hexgen2.security.callers import Caller

#: Of a start: loading a model takes minutes. Each is three seconds.
RETRIES = 400

HEADER = """# Written by `{command}`: change plan and inventory, and write it again.
#
# ansible-playbook -i hosts.yaml site.yaml       install and start
# ansible-playbook -i hosts.yaml upgrade.yaml    new software or configuration, one host at a time, with drain
# ansible-playbook -i hosts.yaml remove.yaml     stop and remove
"""


def release_folder(release: str) -> str:
    """Where a release is on a host."""
    return str(PREFIX / "releases" / release)


def hosts_file(
    inventory: Inventory,
    found: Mapping[str, Sequence[Process]],
    release: str,
    wheels: Mapping[str, str],
    command: str,
) -> str:
    """The text of hosts.yaml. ``wheels``: of each package that is a file its name among the copied ones, with the
    extras that are asked for.
    """
    packages = [str(PREFIX / "packages" / wheels[each]) if each in wheels else each for each in inventory.packages]
    pip = ["--no-input", "--disable-pip-version-check", "--no-compile"]
    if inventory.constraints is not None:
        pip += ["-c", str(PREFIX / "packages" / "constraints.txt")]
    address = format_address(inventory.host(inventory.coordinator).address, inventory.ports.coordinator)
    tls = ["--tls", str(tls_folder(Caller.ADMIN))] if inventory.tls else []
    document = {
        "all": {
            "vars": {
                "hexgen2_user": inventory.user,
                "hexgen2_python": inventory.python,
                "hexgen2_model": str(inventory.model),
                "hexgen2_release": release,
                "hexgen2_pip": [*pip, *packages],
                "hexgen2_coordinator_host": inventory.coordinator,
                "hexgen2_status": [
                    str(PREFIX / "current/bin/hexgen2"),
                    "status",
                    "--json",
                    "--coordinator",
                    address,
                    *tls,
                ],
                "hexgen2_retries": RETRIES,
            },
            "hosts": {host.name: _host(inventory, host, found) for host in inventory.hosts},
        }
    }
    return HEADER.format(command=command) + yaml.safe_dump(document, sort_keys=False, width=120)


def _host(inventory: Inventory, host: Host, processes: Mapping[str, Sequence[Process]]) -> dict[str, Any]:
    found = processes[host.name]
    return {
        "ansible_host": host.ssh_host or host.address,
        "ansible_user": host.ssh_user,
        "ansible_port": host.ssh_port,
        **({} if host.ssh_user == "root" else {"ansible_become": True}),
        "hexgen2_replicas": [each.replica for each in found if each.replica],
        "hexgen2_processes": [_process(inventory, each, processes) for each in found],
    }


def _process(inventory: Inventory, process: Process, processes: Mapping[str, Sequence[Process]]) -> dict[str, Any]:
    told: dict[str, Any] = {"unit": process.unit, "health": _health(inventory, process)}
    if process.leader:
        (worker,) = (each for each in processes[process.leader] if each.replica == process.replica)
        told["leader"] = {"host": process.leader, "unit": worker.unit}
    return told


def _health(inventory: Inventory, process: Process) -> list[str]:
    """The command that says whether a process serves; of a node whether it runs, the rest its worker says."""
    if process.leader:
        return ["systemctl", "is-active", "--quiet", process.unit]
    speaks_tls = inventory.tls and (process.caller is not Caller.GATEWAY or inventory.serve_tls)
    words = [str(PREFIX / "current/bin/python"), "-m", "hexgen2.rpc.health", process.listen]
    return [*words, *([str(tls_folder(process.caller))] if speaks_tls else [])]
