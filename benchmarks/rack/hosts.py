"""Hosts made of podman's containers: each with systemd, SSH and an address of its own. For root only."""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import click

from benchmarks.rack.command import run
from benchmarks.rack.files import HOSTS, MODELS, SUBNET

NETWORK = "hexgen2-rack"
_IMAGE = "localhost/hexgen2-rack-host"
_FILE = Path(__file__).with_name("host.Containerfile")
_BUILD_S, _START_S, _COMMAND_S = 900.0, 120.0, 60.0
#: pip's, on the hosts: only what is brought to them.
_PIP_CONF = "[global]\nno-index = true\nfind-links = /opt/wheels\n"


async def image(base: str) -> str:
    """The host's image on top of ``base``, built unless podman has it already."""
    build = ("podman", "build", "--network", "host", "--build-arg", f"BASE={base}", "--tag", _IMAGE)
    await run(*build, "--file", _FILE, _FILE.parent, limit_s=_BUILD_S)
    return _IMAGE


@asynccontextmanager
async def running(image: str, models: Path, wheels: Path, folder: Path) -> AsyncIterator[Path]:
    """The hosts, while the context lasts; the private key that opens them, in ``folder``.

    Raises:
        click.ClickException: podman cannot start them, or another rack is there.
    """
    if not await _fails("podman", "network", "exists", NETWORK):
        raise click.ClickException(f"a rack is there: end it, or clear away with `podman network rm -f {NETWORK}`")
    key = folder / "key"
    await run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key, limit_s=_COMMAND_S)
    (folder / "pip.conf").write_text(_PIP_CONF, encoding="utf-8")
    mounts = {
        models: MODELS,
        wheels: "/opt/wheels",
        folder / "pip.conf": "/etc/pip.conf",
        folder / "key.pub": "/root/.ssh/authorized_keys",
    }
    volumes = [f"--volume={source.resolve()}:{target}:ro" for source, target in mounts.items()]
    try:
        await run("podman", "network", "create", "--subnet", SUBNET, NETWORK, limit_s=_COMMAND_S)
        for name, address in HOSTS.items():
            # The units' own namespaces and read-only folders are mounts, which take rights to make.
            words = ("--detach", "--rm", "--systemd=always", "--privileged", *volumes)
            place = (f"--name={container(name)}", f"--hostname={name}", f"--network={NETWORK}", f"--ip={address}")
            await run("podman", "run", *words, *place, image, limit_s=_COMMAND_S)
        for name in HOSTS:
            await _booted(name)
        await _same_python(next(iter(HOSTS)))
        yield key
    finally:
        if not await _fails("podman", "network", "exists", NETWORK):
            await run("podman", "network", "rm", "--force", "--time", "2", NETWORK, limit_s=_COMMAND_S)


def container(host: str) -> str:
    """Its name in podman."""
    return f"hexgen2-rack-{host}"


async def on(host: str, *words: str) -> str:
    """What a command prints there."""
    return await run("podman", "exec", container(host), *words, limit_s=_COMMAND_S)


async def _booted(host: str) -> None:
    """Wait for systemd, which is there a moment after the container, and for SSH."""
    try:
        async with asyncio.timeout(_START_S):
            asks = ("podman", "exec", container(host), "systemctl", "is-active", "--quiet", "ssh")
            while await _fails(*asks):  # noqa: ASYNC110, another process is waited for
                await asyncio.sleep(0.5)
    except TimeoutError:
        raise click.ClickException(f"host {host}: no SSH after {_START_S:.0f} s") from None


async def _same_python(host: str) -> None:
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    there = (await on(host, "python3", "-c", "import sys; print('%d.%d' % sys.version_info[:2])")).strip()
    if here != there:
        raise click.ClickException(f"the hosts have Python {there}, and wheels are fetched for this one's, {here}")


async def _fails(*words: str) -> bool:
    try:
        await run(*words, limit_s=_COMMAND_S)
    except click.ClickException:
        return True
    return False
