"""Network namespaces joined by links that can be shaped, silenced and cut: a small network on one Linux machine.

For root only (``why_not`` says). Namespaces have no names and are held by file descriptors of this process, so that
nothing is left behind however it ends::

    enter()                                         # this process, into a namespace of its own
    here, there = Namespace.here(), Namespace.new()
    link = Link.between(here, "10.1.0.1", there, "10.1.0.2")
    subprocess.Popen([*there.command, "iperf", ...])
    link.shape(bits_per_s=1e9)
"""

import ctypes
import os
import shutil
import subprocess
from dataclasses import dataclass
from itertools import count

_CLONE_NEWNET = 0x40000000
_TOOLS = ("ip", "tc", "nsenter")
#: Bytes that may leave a shaped link at once: a few milliseconds of it, and never less than a few packets.
_BURST_S = 0.004
_MIN_BURST_BYTES = 16 << 10
#: What may wait for a shaped link; the rest is dropped, as routers do.
_LATENCY = "200ms"
#: The address of a network card.
_NOBODY = "02:00:00:00:00:99"

_numbers = count()


class NetnsError(RuntimeError):
    """The kernel or its tools refused; says what they said."""


def why_not() -> str:
    """Why there can be no namespaces here; empty when there can."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "not root"
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not installed"
    # In a process of its own: containers may forbid any of it.
    probe = [
        "unshare",
        "--net",
        "sh",
        "-c",
        "ip link add h2a type veth peer name h2b && tc qdisc add dev h2a root tbf ",
    ]
    probe[-1] += "rate 1mbit burst 16kb latency 50ms"
    try:
        done = subprocess.run(probe, capture_output=True, text=True, timeout=10.0, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return done.stderr.strip().splitlines()[-1] if done.returncode and done.stderr.strip() else ""


def enter() -> None:
    """Move this thread, and whatever it starts from now on, to a new namespace with loopback and forwarding.

    Call it in the main thread, before any other thread is started.
    """
    _call("unshare", _CLONE_NEWNET)
    _run("ip", "link", "set", "lo", "up")
    with open("/proc/sys/net/ipv4/ip_forward", "w") as file:
        file.write("1")


@dataclass(frozen=True, slots=True)
class Namespace:
    """``command`` goes before a command that is to run there (it becomes that command: same process id)."""

    path: str

    @classmethod
    def here(cls) -> "Namespace":
        """That of this thread."""
        return cls(_held(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)))

    @classmethod
    def new(cls) -> "Namespace":
        """A new one, with loopback and nothing else."""
        here = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _call("unshare", _CLONE_NEWNET)
            try:
                made = cls.here()
            finally:
                _call("setns", here, _CLONE_NEWNET)
        finally:
            os.close(here)
        made.run("ip", "link", "set", "lo", "up")
        return made

    @property
    def command(self) -> tuple[str, ...]:
        """See the class."""
        return ("nsenter", f"--net={self.path}", "--")

    def run(self, *command: str) -> None:
        """Run a command there to its end. Raises NetnsError when it fails."""
        _run(*self.command, *command)


@dataclass(frozen=True, slots=True)
class Link:
    """A veth pair: ``a`` in one namespace, ``b`` in another, each with a /24 address."""

    a_side: Namespace
    b_side: Namespace
    a: str
    b: str
    a_address: str
    b_address: str

    @classmethod
    def between(cls, a_side: Namespace, a_address: str, b_side: Namespace, b_address: str) -> "Link":
        """A new link that is up."""
        number = next(_numbers)
        made = cls(a_side, b_side, f"h2a{number}", f"h2b{number}", a_address, b_address)
        _run(
            *("ip", "link", "add", made.a, "netns", a_side.path),
            *("type", "veth", "peer", "name", made.b, "netns", b_side.path),
        )
        for side, device, address in ((a_side, made.a, a_address), (b_side, made.b, b_address)):
            side.run("ip", "address", "add", f"{address}/24", "dev", device)
            side.run("ip", "link", "set", device, "up")
        return made

    def route_all_through(self, gateway: str) -> None:
        """Let ``b``'s side reach everything else through ``a``'s address."""
        self.b_side.run("ip", "route", "replace", "default", "via", gateway, "dev", self.b)

    def down(self) -> None:
        """Cut: ``a`` knows at once, ``b`` loses its carrier."""
        self.a_side.run("ip", "link", "set", self.a, "down")

    def up(self) -> None:
        """Mend what ``down`` cut."""
        self.a_side.run("ip", "link", "set", self.a, "up")

    def silence(self) -> None:
        """Lose every packet both ways without a word, as a switch that died does.

        Each is sent, to a card that nobody has. What is dropped before it leaves tells its sender: TCP then goes easy,
        and notices after 45 s what it would notice after 15.
        """
        for (side, device), peer in zip(self._ends, (self.b_address, self.a_address), strict=True):
            side.run("ip", "neigh", "replace", peer, "lladdr", _NOBODY, "nud", "permanent", "dev", device)

    def speak(self) -> None:
        """End ``silence``."""
        for (side, device), peer in zip(self._ends, (self.b_address, self.a_address), strict=True):
            side.run("ip", "neigh", "del", peer, "dev", device)

    def shape(self, bits_per_s: float) -> None:
        """Let so much through each way."""
        burst = max(_MIN_BURST_BYTES, int(bits_per_s / 8 * _BURST_S))
        limits = ("rate", f"{bits_per_s:.0f}bit", "burst", f"{burst}b", "latency", _LATENCY)
        for side, device in self._ends:
            side.run("tc", "qdisc", "replace", "dev", device, "root", "tbf", *limits)

    def unshape(self) -> None:
        """End ``shape``."""
        for side, device in self._ends:
            side.run("tc", "qdisc", "delete", "dev", device, "root")

    @property
    def _ends(self) -> tuple[tuple[Namespace, str], ...]:
        return ((self.a_side, self.a), (self.b_side, self.b))


def _held(descriptor: int) -> str:
    """A path to a descriptor that stays open as long as this process."""
    return f"/proc/{os.getpid()}/fd/{descriptor}"


def _call(name: str, *arguments: int) -> None:
    # os.unshare and os.setns came with Python 3.12.
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments):
        raise NetnsError(f"{name}: {os.strerror(ctypes.get_errno())}")


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=10.0, check=False)
    if done.returncode:
        raise NetnsError(f"{' '.join(command)}: {done.stderr.strip()}")
