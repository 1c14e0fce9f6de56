"""host:port as people write it: parsed, and checked to be free before a server binds it.

Why before: gRPC binds ``localhost`` on whichever address family is still free and prints its own stack on failure.
"""

import errno
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from random import SystemRandom

from hexgen2.errors import ConfigError

#: Below those that systems give to whoever asks for any (Linux: 32768 and up): such a one could go to somebody else
#: between when it was found free and when its server binds it.
_PORTS = range(20_000, 32_000)


def parse_address(address: str, *, what: str = "address") -> tuple[str, int]:
    """Host and port of ``host:port`` or ``[v6]:port``; port 0 means any. ``what`` names the field in errors.

    Raises:
        ConfigError: not of that form, or a port above 65535.
    """
    host, colon, port = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ConfigError(f"{what}: {address!r} is not host:port (an IPv6 address goes in brackets)")
    if not colon or not host or not (port.isascii() and port.isdigit()):
        raise ConfigError(f"{what}: {address!r} is not host:port")
    if int(port) > 65535:
        raise ConfigError(f"{what}: port {port} is above 65535")
    return host, int(port)


def format_address(host: str, port: int) -> str:
    """The inverse of ``parse_address``."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether ``host`` is this machine's loopback."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def port_in_use(listen: str) -> ConfigError:
    """What to tell somebody whose port is taken."""
    return ConfigError(f"{listen} is in use: stop the process that listens there, or choose another port")


@contextmanager
def held_port(host: str) -> Iterator[int]:
    """A free port of this host, held to the end of the block, for a server that binds it soon after.

    Raises:
        ConfigError: none is found.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in SystemRandom().sample(_PORTS, 100):
        with socket.socket(family) as probe:
            try:
                probe.bind((host, port))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    continue
                raise ConfigError(f"{format_address(host, port)}: {error.strerror}") from None
            yield port
            return
    raise ConfigError(f"{host} has no free port from {_PORTS.start} to {_PORTS.stop - 1}")


def check_free(listen: str, *, what: str = "listen") -> None:
    """Bind and release ``listen`` on every address that its host has.

    Raises:
        ConfigError: in use, not an address of this machine, or not permitted; one line with the remedy.
    """
    host, port = parse_address(listen, what=what)
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigError(f"{what}: {host!r} cannot be resolved ({error.strerror})") from None
    free = 0
    for family, kind, protocol, _, sockaddr in infos:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(sockaddr)
                probe.listen(1)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise port_in_use(listen) from None
            if error.errno == errno.EACCES:
                raise ConfigError(f"{listen}: ports below 1024 need privileges; choose another port") from None
            # A host name may have a family that this machine does not: one that works is enough.
            continue
        free += 1
    if not free:
        raise ConfigError(f"{what}: {host!r} is not an address of this machine")
