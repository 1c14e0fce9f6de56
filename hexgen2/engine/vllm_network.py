"""The network by which vLLM's ranks on several machines reach each other.

Left alone vLLM takes the address that leads to the internet, and gloo the one that the host's own name stands for
(loopback, as Debian installs it). Neither need be one that the other machines are on.
"""

import os
import socket

from hexgen2.errors import ConfigError


def choose(master_addr: str, master_port: int) -> None:
    """Set this process's environment, and so its children's, for a replica whose first machine has ``master_addr``.
    What is set already stays. NCCL is left to find its own networks, which are often others.

    Raises:
        ConfigError: the first machine has no such address, or there is no way to it.
    """
    address = os.environ.setdefault("VLLM_HOST_IP", own_address(master_addr, master_port))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", interface_of(address))


def own_address(host: str, port: int) -> str:
    """This machine's address on the way to ``host``, which may be this machine. Sends nothing. Raises ConfigError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
        family, kind, protocol, _, peer = found[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(peer)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigError(f"engine.master_addr: no way to {host}: {error.strerror or error}") from error


def interface_of(address: str) -> str:
    """The network interface that has ``address``. Raises ConfigError where none has."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        # Of IPv6 on a link the interface is told with the address.
        if address in (each.address.partition("%")[0] for each in addresses):
            return str(name)
    raise ConfigError(f"VLLM_HOST_IP: {address} is no address of this machine")
