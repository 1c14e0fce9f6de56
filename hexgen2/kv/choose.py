"""Which transport a worker uses: what its configuration says, never another without a word."""

from importlib.util import find_spec

from hexgen2.config import KvConfig, TlsConfig
from hexgen2.errors import ConfigError
from hexgen2.kv.tcp import TcpTransport
from hexgen2.kv.transport import MAX_ROUTES, Transport
from hexgen2.kv.ucx import NIXL_MODULES, UcxTransport, has_rdma, is_loopback
from hexgen2.security.tls import load_tls


def transport_name(config: KvConfig, tls: TlsConfig | None = None) -> str:
    """``ucx``, ``tcp`` or ``tcp+tls``. ``tls``: the worker's certificates.

    ``auto`` is ucx where NIXL is installed and a READ needs no help of the peer: on one machine (CMA, CUDA IPC) and
    where there is RDMA. Elsewhere UCX would emulate it over TCP, where a reader that dies can take its peer with it
    (``kv.ucx``), and plain TCP is as fast.

    Raises:
        ConfigError: ucx is asked for and NIXL is not installed; TLS is required and cannot be.
    """
    if config.devices and config.transport == "tcp":
        raise ConfigError("kv.devices: only ucx takes devices; name addresses in kv.host for tcp")
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
        loopback = all(map(is_loopback, _parts(config.host)))
        return "ucx" if have_nixl and (loopback or has_rdma()) else tcp
    return tcp if config.transport == "tcp" else config.transport


def make_transports(name: str, host: str, devices: str = "", tls: TlsConfig | None = None) -> list[Transport]:
    """One transport of that name for each address in ``host`` (tcp) or each of ``devices`` (ucx); commas separate them.

    A peer's k-th is reached from our k-th, so both ends list their networks in the same order. ``tls`` is for one that
    speaks TLS.

    Raises:
        ConfigError: an address, a device or certificates that cannot be used, or too many.
    """
    hosts = _parts(host) or [host]
    ways = _parts(devices) or [""] if name == "ucx" else hosts
    if len(ways) > MAX_ROUTES or len(set(ways)) < len(ways):
        field = "kv.devices" if name == "ucx" else "kv.host"
        raise ConfigError(f"{field}: {len(ways)} given; at most {MAX_ROUTES}, all different")
    if name == "ucx":
        return [UcxTransport(hosts[0], device) for device in ways]
    files = load_tls(tls) if name == "tcp+tls" else None
    return [TcpTransport(each, files, bind=len(ways) > 1) for each in ways]


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
