"""Which transport a worker uses: what its configuration says, never another without a word."""

import os
from importlib.util import find_spec

from hexgen2.address import is_loopback
from hexgen2.config import KvConfig, TlsConfig
from hexgen2.errors import ConfigError
from hexgen2.kv.tcp import TcpTransport
from hexgen2.kv.transport import MAX_ROUTES, Transport
from hexgen2.kv.ucx import NIXL_MODULES, UcxTransport, has_rdma, network_interfaces, rdma_devices
from hexgen2.security.tls import load_tls


def transport_name(config: KvConfig, tls: TlsConfig | None = None) -> str:
    """``ucx``, ``tcp`` or ``tcp+tls``. ``tls``: the worker's certificates.

    ``auto`` is ucx where NIXL is installed and a READ needs no help of the peer: on one machine (CMA, CUDA IPC) and
    where there is RDMA. Elsewhere UCX would emulate it over TCP, where a reader that dies can take its peer with it
    (``kv.ucx``), and plain TCP is as fast.

    Raises:
        ConfigError: ucx is asked for and NIXL is not installed; TLS or RDMA is required and cannot be.
    """
    if config.devices and config.transport == "tcp":
        raise ConfigError("kv.devices: only ucx takes devices; name addresses in kv.host for tcp")
    if config.require == "rdma":
        _check_rdma(config)
        return "ucx"
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


def _check_rdma(config: KvConfig) -> None:
    """Raise ConfigError unless UCX may, and can, use an RDMA device; says what it has instead."""
    chosen = [f"{name}={os.environ[name]}" for name in ("UCX_TLS", "UCX_NET_DEVICES") if name in os.environ]
    devices = rdma_devices()
    wanted = _parts(config.devices) or [
        each for each in _parts(os.environ.get("UCX_NET_DEVICES", "")) if each not in ("all", "lo")
    ]
    if config.transport == "tcp":
        why = "kv.transport is tcp"
    elif config.tls == "require":
        why = "kv.tls is require, and UCX has no TLS"
    elif not any(find_spec(name) for name in NIXL_MODULES):
        why = "NIXL, which drives UCX, is not installed"
    elif not devices:
        why = "this machine has no RDMA device (/sys/class/infiniband)"
    elif wanted and not any(each.partition(":")[0] in devices for each in wanted):
        why = f"of the devices that UCX is given, {', '.join(wanted)}, none is an RDMA device"
    elif not _may_rdma(os.environ.get("UCX_TLS", "all")):
        why = "UCX_TLS leaves out RDMA's transports"
    else:
        return
    has = [f"{name} (RDMA)" for name in devices] + [f"{name} (TCP)" for name in network_interfaces()]
    told = "; ".join((", ".join(has) or "no network", *chosen))
    raise ConfigError(
        f"kv.require: rdma, but {why}; UCX offers here: {told}. Mend that, or accept with kv.require: any that the "
        "hand-over is slower than planned"
    )


def _may_rdma(tls: str) -> bool:
    """Whether UCX_TLS lets a transport of InfiniBand or RoCE be taken."""
    names = {name.strip() for name in tls.removeprefix("^").split(",")}
    rdma = {"all", "ib", "rc", "rc_x", "rc_v", "rc_mlx5", "rc_verbs", "dc", "dc_x", "dc_mlx5"}
    return not names & {"ib", "rc"} if tls.startswith("^") else bool(names & rdma)


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
