"""``python -m benchmarks.rack``: see the package, and docs/operations.md."""

import asyncio
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import click
from rich.console import Console

from benchmarks.rack import files, hosts, load, report, wheels
from benchmarks.rack.command import run
from hexgen2.cli.fleet_config import default_model
from hexgen2.config import home
from hexgen2.errors import HexgenError
from hexgen2.model import load_model
from hexgen2.placement import to_yaml

#: `make deploy-check` brings it.
ANSIBLE = wheels.TREE / "build/deploy-check/bin/ansible-playbook"
_PLAY_S, _ANSWERS_S, _COMMAND_S = 2400.0, 180.0, 120.0
#: What `remove.yaml` is to leave nothing of.
_REMOVED = "ls -d /opt/hexgen2 /etc/hexgen2 /etc/systemd/system/hexgen2-* 2>/dev/null || true"


@dataclass(frozen=True, slots=True)
class Rack:
    """What the steps share. ``seconds`` grows: of each step."""

    folder: Path
    model: Path
    ansible: str
    clients: int
    after_s: float
    console: Console
    seconds: dict[str, float] = field(default_factory=dict)

    @asynccontextmanager
    async def step(self, what: str) -> AsyncIterator[None]:
        """Tell it while it lasts, and note how long that was."""
        began = time.monotonic()
        with self.console.status(what):
            yield
        self.seconds[what] = time.monotonic() - began
        self.console.print(f"{what}: {self.seconds[what]:.0f} s", highlight=False)


@click.command()
@click.option("--base", default="docker.io/library/debian:bookworm-slim", show_default=True, help="What the hosts are.")
@click.option("--image", help="A host's image that is built already.")
@click.option(
    "--model", type=click.Path(file_okay=False, path_type=Path), help="Whose tokenizer is used; default: the default."
)
@click.option(
    "--ansible", help="ansible-playbook.  [default: what `make deploy-check` installed, or the one of the PATH]"
)
@click.option("--clients", default=2, show_default=True, help="Requests at a time while hosts are upgraded.")
@click.option("--after", "after_s", default=10.0, show_default=True, help="Seconds of load after the upgrade.")
@click.option("--folder", type=click.Path(path_type=Path), help="For logs and what is deployed; it stays.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def main(
    base: str,
    image: str | None,
    model: Path | None,
    ansible: str | None,
    clients: int,
    after_s: float,
    folder: Path | None,
    as_json: bool,
) -> None:
    """Three hosts made of podman's containers: site.yaml, upgrade.yaml under load, remove.yaml.

    For root. Exit status 1 when a request failed, or a host is not as it should be afterwards. pip and podman fetch
    what is not there; PIP_EXTRA_INDEX_URL names where PyTorch's builds for the CPU are, if pip does not know.
    """
    if os.geteuid() != 0:
        raise click.ClickException("only root can reach containers by their addresses")
    for word in ("podman", "ssh", "ssh-keygen"):
        if shutil.which(word) is None:
            raise click.ClickException(f"{word} is not here")
    playbook = ansible or (str(ANSIBLE) if ANSIBLE.exists() else shutil.which("ansible-playbook"))
    if playbook is None:
        raise click.ClickException("no ansible-playbook: `make deploy-check` installs one")
    console = Console(stderr=as_json, width=None if sys.stdout.isatty() else 120)
    kept = folder or Path(tempfile.mkdtemp(prefix="hexgen2-rack-"))
    kept.mkdir(parents=True, exist_ok=True)
    rack = Rack(kept, model or default_model(), playbook, clients, after_s, console)
    console.print(f"logs: {kept}", highlight=False)
    try:
        found = asyncio.run(_until_terminated(rack, base, image))
    except asyncio.CancelledError:
        raise click.Abort from None
    except HexgenError as error:
        raise click.ClickException(str(error)) from error
    report.show(found, console)
    if as_json:
        click.echo(json.dumps(report.to_json(found), indent=1))
    if found.ok and folder is None:
        shutil.rmtree(kept)
    sys.exit(0 if found.ok else 1)


async def _until_terminated(rack: Rack, base: str, image: str | None) -> report.Result:
    """SIGTERM ends it as Ctrl-C does: hosts are removed."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await _run(rack, base, image)


async def _run(rack: Rack, base: str, image: str | None) -> report.Result:
    vocab_size, shared = load_model(rack.model).vocab_size, home() / "rack-wheels"
    versions = wheels.releases()
    async with rack.step("wheels"):
        built = [await wheels.build(version, rack.folder) for version in versions]
        await wheels.download(built[0], shared)
    (rack.folder / "plan.yaml").write_text(to_yaml(files.plan()), encoding="utf-8")
    shutil.copyfile(wheels.TREE / "constraints.txt", rack.folder / "constraints.txt")
    async with rack.step("host image"):
        image = image or await hosts.image(base)
    began = time.monotonic()
    async with hosts.running(image, rack.model.resolve().parent, shared, rack.folder) as key:
        rack.seconds["hosts"] = time.monotonic() - began
        await _deploy(rack, built[0], vocab_size)
        await _play(rack, "site.yaml", key)
        gateways = [f"https://{files.HOSTS[name]}:8000" for name in files.GATEWAYS]
        tls = rack.folder / "rack/certs" / f"{next(iter(files.HOSTS))}-admin"
        async with load.loading(gateways, rack.model.name, tls, rack.clients) as tally:
            await _answered(tally)
            await _deploy(rack, built[1], vocab_size)
            await _play(rack, "upgrade.yaml", key)
            await asyncio.sleep(rack.after_s)
        left = [each for host in files.HOSTS async for each in _not_upgraded(host, versions[1])]
        await _play(rack, "remove.yaml", key)
        for host in files.HOSTS:
            left += [f"{host}: {each} is still there" for each in (await hosts.on(host, "sh", "-c", _REMOVED)).split()]
    return report.result(len(files.HOSTS), versions, rack.seconds, tally, tuple(left))


async def _deploy(rack: Rack, wheel: Path, vocab_size: int) -> None:
    text = files.inventory(rack.model.name, vocab_size, wheel.name)
    (rack.folder / "inventory.yaml").write_text(text, encoding="utf-8")
    words = ("deploy", "baremetal", rack.folder / "plan.yaml", "--inventory", rack.folder / "inventory.yaml")
    command = (sys.executable, "-m", "hexgen2.cli.main", *words, "-o", rack.folder / "rack")
    await run(*command, limit_s=_COMMAND_S)


async def _play(rack: Rack, playbook: str, key: Path) -> None:
    env = {
        "ANSIBLE_HOME": str(rack.folder / "ansible"),
        "ANSIBLE_NOCOLOR": "1",
        "ANSIBLE_PRIVATE_KEY_FILE": str(key),
        # The hosts are new each time, and their connections end with them.
        "ANSIBLE_HOST_KEY_CHECKING": "False",
        "ANSIBLE_SSH_ARGS": "-o ControlMaster=auto -o ControlPersist=5s -o UserKnownHostsFile=/dev/null",
    }
    words = (rack.ansible, "-i", rack.folder / "rack/hosts.yaml", rack.folder / "rack" / playbook)
    async with rack.step(playbook):
        await run(*words, limit_s=_PLAY_S, env=env, log=rack.folder / f"{playbook}.log")


async def _answered(tally: load.Tally) -> None:
    """Wait until every prompt's answer is known: later ones are held against it."""
    try:
        async with asyncio.timeout(_ANSWERS_S):
            await tally.known.wait()
    except TimeoutError:
        seen = "; ".join(tally.failed[:3]) or f"passed over {dict(tally.passed_over)}"
        raise click.ClickException(f"no answers after {_ANSWERS_S:.0f} s: {seen}") from None


async def _not_upgraded(host: str, version: str) -> AsyncIterator[str]:
    """What a host has beside the new release."""
    told = await hosts.on(host, "/opt/hexgen2/current/bin/hexgen2", "--version")
    if told.split()[-1] != version:
        yield f"{host}: runs {told.strip()}"
    releases = (await hosts.on(host, "ls", "/opt/hexgen2/releases")).split()
    if len(releases) != 1:
        yield f"{host}: releases {', '.join(releases)}"


if __name__ == "__main__":
    main()
