"""Network namespaces joined by links of a chosen rate, for measurements and tests on one machine. Linux, as root.

Each link is a veth pair, so what crosses it goes through the kernel's whole TCP/IP stack; ``tc tbf`` at both ends holds
it to its rate. Everything is gone when the context ends; what a killed process left behind, when the next one begins.
"""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from hexgen2.errors import ConfigError

#: As an end of a link: the namespace that this process is in.
HOST = -1

_PREFIX = "hxns"
_FOLDER = Path("/var/run/netns")
_CLONE_NEWNET = 0x40000000
#: What may pass at once: at least a few of the largest segments that the kernel makes, and 2 ms of the rate.
_BURST_BYTES, _BURST_S = 256 << 10, 0.002


@dataclass(frozen=True, slots=True)
class Link:
    """Joins nodes ``a`` and ``b`` (or HOST), each direction at ``rate_mbit``; None: as fast as the kernel."""

    a: int
    b: int
    rate_mbit: float | None = None


def why_not() -> str | None:
    """Why there can be no namespaces here; None where there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"network namespaces need {' and '.join(missing)} (package iproute2)"
    probe = f"{_PREFIX}-{os.getpid()}-probe"
    try:
        _ip("netns", "add", probe)
        _ip("netns", "del", probe)
    except ConfigError as error:
        return str(error)
    return None


@dataclass(frozen=True, slots=True)
class Network:
    """Namespaces 0 to n-1. Made by ``network``."""

    names: tuple[str, ...]
    links: tuple[Link, ...]
    _rates: dict[int, float | None] = field(default_factory=dict)

    def address(self, link: int, node: int) -> str:
        """Of this node's end of the link."""
        ends = (self.links[link].a, self.links[link].b)
        return f"10.{208 + os.getpid() % 40}.{link}.{1 + ends.index(node)}"

    def command(self, node: int, args: Sequence[str]) -> list[str]:
        """``args`` so that they run in the node; the process id stays the command's own."""
        return list(args) if node == HOST else ["ip", "netns", "exec", self.names[node], *args]

    def start(
        self,
        node: int,
        args: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        stdout: "IO[bytes] | int | None" = None,
        stderr: "IO[bytes] | int | None" = None,
    ) -> "subprocess.Popen[bytes]":
        """Start a command in the node. It is the caller's to end, before the network is."""
        return subprocess.Popen(self.command(node, args), env=env, stdout=stdout, stderr=stderr)

    def up(self, link: int) -> None:
        """Let the link carry packets again."""
        for node, device in self._ends(link):
            _ip(*self._in(node), "link", "set", device, "up")

    def down(self, link: int) -> None:
        """Let the link drop everything, in both directions; connections stay open and silent."""
        for node, device in self._ends(link):
            _ip(*self._in(node), "link", "set", device, "down")

    def shape(self, link: int, rate_mbit: float | None) -> None:
        """Change the link's rate, both directions; None: as fast as the kernel."""
        had = self._rates.get(link)
        self._rates[link] = rate_mbit
        for node, device in self._ends(link):
            if rate_mbit is not None:
                burst = max(_BURST_BYTES, int(rate_mbit * 1e6 / 8 * _BURST_S))
                rate = ("rate", f"{rate_mbit * 1e6:.0f}bit", "burst", str(burst), "latency", "100ms")
                _run("tc", *self._in(node), "qdisc", "replace", "dev", device, "root", "tbf", *rate)
            elif had is not None:
                _run("tc", *self._in(node), "qdisc", "del", "dev", device, "root")

    def _in(self, node: int) -> tuple[str, ...]:
        return () if node == HOST else ("-n", self.names[node])

    def _ends(self, link: int) -> tuple[tuple[int, str], tuple[int, str]]:
        # A device's name has at most 15 characters.
        stem = f"hx{os.getpid() % 10**7}l{link}"
        return (self.links[link].a, f"{stem}a"), (self.links[link].b, f"{stem}b")


@contextmanager
def network(num_nodes: int, links: Sequence[Link]) -> Iterator[Network]:
    """Make the namespaces and links. Processes in them must have ended by the end of the block.

    Raises:
        ConfigError: it cannot be done; see ``why_not``.
    """
    _remove_left_behind()
    net = Network(tuple(f"{_PREFIX}-{os.getpid()}-{i}" for i in range(num_nodes)), tuple(links))
    try:
        for name in net.names:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        for number, link in enumerate(links):
            (a, device_a), (b, device_b) = net._ends(number)
            # Made within a namespace, so that it goes with it.
            first, second = ((b, device_b), (a, device_a)) if a == HOST else ((a, device_a), (b, device_b))
            there = str(os.getpid()) if second[0] == HOST else net.names[second[0]]
            _ip(
                *(*net._in(first[0]), "link", "add", first[1], "type", "veth"),
                *("peer", "name", second[1], "netns", there),
            )
            for node, device in ((a, device_a), (b, device_b)):
                _ip(*net._in(node), "addr", "add", f"{net.address(number, node)}/24", "dev", device)
            net.up(number)
            net.shape(number, link.rate_mbit)
        yield net
    finally:
        for name in net.names:
            with suppress(ConfigError):  # never made
                _ip("netns", "del", name)


def enter(name: str) -> None:
    """Move the calling thread, and what it starts from now on, into a namespace: first thing in a child process.

    Raises:
        OSError: no such namespace, or no right to it.
    """
    with (_FOLDER / name).open() as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _CLONE_NEWNET):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), name)


def _remove_left_behind() -> None:
    for path in _FOLDER.glob(f"{_PREFIX}-*-*") if _FOLDER.is_dir() else ():
        owner = path.name.split("-")[1]
        if owner.isdigit() and not Path("/proc", owner).exists():
            with suppress(ConfigError):  # somebody else is at it, too
                _ip("netns", "del", path.name)


def _ip(*args: str) -> None:
    _run("ip", *args)


def _run(*args: str) -> None:
    try:
        done = subprocess.run(args, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"network namespaces: {' '.join(args)}: {error}") from error
    if done.returncode:
        raise ConfigError(f"network namespaces: {' '.join(args)}: {done.stderr.strip()}")
