"""Which transport a worker uses: what its configuration says, never another without a word."""

from importlib.util import find_spec

from hexgen2.config import KvConfig
from hexgen2.errors import ConfigError
from hexgen2.kv.tcp import TcpTransport
from hexgen2.kv.transport import Transport
from hexgen2.kv.ucx import NIXL_MODULES, UcxTransport, has_rdma, is_loopback


def transport_name(config: KvConfig) -> str:
    """``ucx`` or ``tcp``.

    ``auto`` is ucx where NIXL is installed and a READ needs no help of the peer: on one machine (CMA, CUDA IPC) and
    where there is RDMA. Elsewhere UCX would emulate it over TCP, where a reader that dies can take its peer with it
    (``kv.ucx``), and plain TCP is as fast.

    Raises:
        ConfigError: ucx is asked for and NIXL is not installed.
    """
    have_nixl = any(find_spec(name) for name in NIXL_MODULES)
    if config.transport == "ucx" and not have_nixl:
        raise ConfigError("kv.transport: ucx needs NIXL; install nixl-cu12 (or nixl-cu13), or choose tcp")
    if config.transport == "auto":
        return "ucx" if have_nixl and (is_loopback(config.host) or has_rdma()) else "tcp"
    return config.transport


def make_transport(name: str, host: str) -> Transport:
    """The transport of that name. ``host`` is the address that its plane binds."""
    if name == "ucx":
        return UcxTransport(host)
    return TcpTransport(host)
