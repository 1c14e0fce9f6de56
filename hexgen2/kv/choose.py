"""Which transport a worker uses: what its configuration says, never another without a word."""

from importlib.util import find_spec

from hexgen2.config import KvConfig, TlsConfig
from hexgen2.errors import ConfigError
from hexgen2.kv.tcp import TcpTransport
from hexgen2.kv.transport import Transport
from hexgen2.kv.ucx import NIXL_MODULES, UcxTransport, has_rdma, is_loopback
from hexgen2.tls import load_tls


def transport_name(config: KvConfig, tls: TlsConfig | None = None) -> str:
    """``ucx``, ``tcp`` or ``tcp+tls``. ``tls``: the worker's certificates.

    ``auto`` is ucx where NIXL is installed and a READ needs no help of the peer: on one machine (CMA, CUDA IPC) and
    where there is RDMA. Elsewhere UCX would emulate it over TCP, where a reader that dies can take its peer with it
    (``kv.ucx``), and plain TCP is as fast.

    Raises:
        ConfigError: ucx is asked for and NIXL is not installed; TLS is required and cannot be.
    """
    if config.tls == "require":
        if tls is None:
            raise ConfigError("kv.tls: require needs certificates; see tls")
        if config.transport == "ucx":
            raise ConfigError("kv.tls: require, but UCX has no TLS; choose kv.transport: tcp")
        return "tcp+tls"
    tcp = "tcp" if tls is None or config.tls == "off" else "tcp+tls"
    have_nixl = any(find_spec(name) for name in NIXL_MODULES)
    if config.transport == "ucx" and not have_nixl:
        raise ConfigError("kv.transport: ucx needs NIXL; install nixl-cu12 (or nixl-cu13), or choose tcp")
    if config.transport == "auto":
        return "ucx" if have_nixl and (is_loopback(config.host) or has_rdma()) else tcp
    return tcp if config.transport == "tcp" else config.transport


def make_transport(name: str, host: str, tls: TlsConfig | None = None) -> Transport:
    """The transport of that name. ``host`` is the address that its plane binds; ``tls`` is for one that speaks TLS.

    Raises:
        ConfigError: an address or certificates that cannot be used.
    """
    if name == "ucx":
        return UcxTransport(host)
    return TcpTransport(host, load_tls(tls) if name == "tcp+tls" else None)
