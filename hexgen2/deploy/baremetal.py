"""Which process runs on which host of an inventory, and as what: a plan's replicas, coordinator, gateways. Pure.

Every host's processes are known by address; each has its unit (``systemd``), its configuration and its certificates.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from hexgen2.address import format_address
from hexgen2.config import (
    PAGE_PORT,
    Config,
    CoordinatorConfig,
    EmulatedEngineConfig,
    EngineConfig,
    GatewayConfig,
    KvConfig,
    NodeConfig,
    TlsConfig,
    WorkerConfig,
)
from hexgen2.deploy.pools import catalog_model, planned_pools
from hexgen2.deploy.replicas import planned_engine, planned_environment
from hexgen2.devices import Machine, Share, missing, shares
from hexgen2.errors import ConfigError
from hexgen2.inventory import Host, Inventory
from hexgen2.placement import Placement, ReplicaPlan
from hexgen2.security.callers import Caller

#: Where things are on a host.
CONFIG, STATE, PREFIX = PurePosixPath("/etc/hexgen2"), PurePosixPath("/var/lib/hexgen2"), PurePosixPath("/opt/hexgen2")

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,63}")


@dataclass(frozen=True, slots=True)
class Process:
    """One unit: ``hexgen2 COMMAND --config CONFIG/NAME.yaml`` with the certificates of ``caller``."""

    name: str
    command: str
    caller: Caller
    config: Config
    listen: str
    environment: Mapping[str, str] = field(default_factory=dict)
    #: Of the CPU; 0: no limit.
    cores: float = 0.0
    #: Uses GPUs or RDMA devices.
    devices: bool = False
    drain_s: float = 0.0
    #: Of the plan, which it runs.
    replica: str = ""
    #: The host of the replica's worker, where this is another with further ranks of it.
    leader: str = ""

    @property
    def unit(self) -> str:
        """The unit's name."""
        return f"hexgen2-{self.name}.service"


@dataclass(frozen=True, slots=True)
class Split:
    """A replica on several machines, the first of which has its worker. ``number``: among such replicas."""

    machines: tuple[str, ...]
    inventory: Inventory
    number: int

    @property
    def address(self) -> str:
        """Of the first machine."""
        return self.inventory.host(self.machines[0]).address

    @property
    def leader(self) -> str:
        """Where the worker waits for the other machines."""
        return format_address(self.address, self.inventory.ports.engine + 2 * self.number + 1)

    def engine(self, rank: int) -> dict[str, object]:
        """Of vLLM's own settings those of one machine."""
        port = self.inventory.ports.engine + 2 * self.number
        return {"nnodes": len(self.machines), "node_rank": rank, "master_addr": self.address, "master_port": port}


def processes(inventory: Inventory, placement: Placement, file: str) -> dict[str, list[Process]]:
    """Of each host, in the order of their start; a host without any has an empty list. ``file`` is named in errors.

    Raises:
        ConfigError: a machine of the plan is not in the inventory, or has other hardware; an id that names no file.
    """
    places = _places(inventory, placement, file)
    found: dict[str, list[Process]] = {host.name: [] for host in inventory.hosts}
    found[inventory.coordinator].append(_coordinator(inventory))
    num_split = 0
    for replica in placement.replicas:
        machines = tuple(dict.fromkeys(stage.machine for stage in replica.stages))
        split = Split(machines, inventory, num_split) if len(machines) > 1 else None
        num_split += split is not None
        for rank, machine in enumerate(machines):
            host, share = inventory.host(machine), places[machine][replica.id]
            if rank and split is not None:
                found[machine].append(_node(inventory, host, placement, replica, share, split, rank, file))
                continue
            number = sum(process.command == "flexible" for process in found[machine])
            found[machine].append(_worker(inventory, host, placement, replica, share, number, split, file))
    for name in inventory.gateways:
        found[name].append(_gateway(inventory, inventory.host(name)))
    return found


def ucx_environment(host: Host) -> dict[str, str]:
    """What UCX may use on a host. Where it has RDMA, TCP is left out: nothing is to fall back to it unseen."""
    found = {}
    cuda = ",cuda" if host.gpus else ""
    if host.ucx_tls:
        found["UCX_TLS"] = host.ucx_tls
    elif host.infiniband:
        found["UCX_TLS"] = f"rc,sm,self{cuda}"
    elif host.ucx_net_devices:
        found["UCX_TLS"] = f"tcp,sm,self{cuda}"
    if host.ucx_net_devices:
        found["UCX_NET_DEVICES"] = host.ucx_net_devices
    return found


def tls_folder(caller: Caller) -> PurePosixPath:
    """Where processes of a role find their certificates on a host."""
    return CONFIG / "tls" / caller


def _places(inventory: Inventory, placement: Placement, file: str) -> dict[str, Mapping[str, Share]]:
    """What each replica gets of each host."""
    known = {host.name: number for number, host in enumerate(inventory.hosts)}
    problems = [
        f"hosts: the plan has machine `{machine}`, and there is no host of that name; there are: {', '.join(known)}"
        for machine in placement.machines
        if machine not in known
    ]
    for replica in placement.replicas:
        if not _ID.fullmatch(replica.id):
            problems.append(f"hosts: the plan's replica {replica.id[:80]!r} cannot be named so")
        elif problem := _splits_badly(replica):
            problems.append(f"hosts: the plan's replica {replica.id} is on several machines, {problem}")
    for name, count in Counter(each.id for each in placement.replicas).items():
        if count > 1:
            problems.append(f"hosts: the plan has {count} replicas called {name}")
    found: dict[str, Mapping[str, Share]] = {}
    for host in inventory.hosts:
        parts = tuple(each for replica in placement.replicas if (each := _part(replica, host.name)) is not None)
        part, machine = placement.model_copy(update={"replicas": parts}), Machine(host.gpus, host.cores)
        if isinstance(inventory.the_engine, EmulatedEngineConfig):
            # Rehearses the plan on whatever there is.
            found[host.name] = {each.id: Share() for each in parts}
        elif lacking := missing(part, machine):
            problems.append(f"hosts.{known[host.name]}: the plan's part of {host.name}: {'; '.join(lacking)}")
        else:
            found[host.name] = shares(part, machine)
        if host.name in placement.rdma and not host.infiniband and any(placement.needs_rdma(part.id) for part in parts):
            problems.append(
                f"hosts.{known[host.name]}.infiniband: {host.name} was planned with RDMA: say `infiniband: true`, or "
                "plan with the network card that it has"
            )
    if problems:
        raise ConfigError("\n".join(f"{file}: {problem}" for problem in problems))
    return found


def _splits_badly(replica: ReplicaPlan) -> str:
    """Why vLLM's multi-node executor cannot run it; empty: it can, or need not. It numbers ranks machine by machine."""
    order = [stage.machine for stage in replica.stages]
    machines = list(dict.fromkeys(order))
    counts = {
        machine: sum(s.tensor_parallel_size for s in replica.stages if s.machine == machine) for machine in machines
    }
    if order != sorted(order, key=machines.index):
        return "and its stages go to and fro between them: vLLM takes a machine's stages one after the other"
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{count} GPUs of {machine}" for machine, count in counts.items())
        return f"with {told}: vLLM takes as many of each"
    return ""


def _part(replica: ReplicaPlan, machine: str) -> ReplicaPlan | None:
    stages = tuple(stage for stage in replica.stages if stage.machine == machine)
    return replica.model_copy(update={"stages": stages}) if stages else None


def _tls(inventory: Inventory, caller: Caller) -> TlsConfig | None:
    return TlsConfig.model_validate(str(tls_folder(caller))) if inventory.tls else None


def _address(inventory: Inventory) -> str:
    return format_address(inventory.host(inventory.coordinator).address, inventory.ports.coordinator)


def _coordinator(inventory: Inventory) -> Process:
    host = inventory.host(inventory.coordinator)
    config = CoordinatorConfig(
        listen=_address(inventory),
        metrics_listen=format_address(host.address, inventory.ports.metrics),
        # For people on that host, or through its SSH: it asks nobody for a key.
        page_listen=format_address("127.0.0.1", PAGE_PORT),
        codec=inventory.codec,
        plan=Path(CONFIG / "plan.yaml"),
        state_file=Path(STATE / "coordinator.db"),
        tls=_tls(inventory, Caller.COORDINATOR),
    )
    return Process(
        "coordinator",
        "coordinator",
        Caller.COORDINATOR,
        config,
        config.listen,
        host.environment,
        drain_s=config.drain_s,
    )


def _gateway(inventory: Inventory, host: Host) -> Process:
    config = GatewayConfig(
        gateway_id=f"gateway-{host.name}"[:64],
        listen=format_address(host.address, inventory.ports.grpc),
        http_listen=format_address(host.address, inventory.ports.http),
        coordinator=_address(inventory),
        model=inventory.model,
        served_model_name=inventory.served_model_name,
        tls=_tls(inventory, Caller.GATEWAY),
        api_keys=Path(CONFIG / "api-keys") if inventory.api_keys is not None else None,
        serve_tls=inventory.serve_tls,
        drain_s=inventory.drain_s,
    )
    return Process(
        "gateway", "gateway", Caller.GATEWAY, config, config.listen, host.environment, drain_s=config.drain_s
    )


def _worker(
    inventory: Inventory,
    host: Host,
    placement: Placement,
    replica: ReplicaPlan,
    share: Share,
    number: int,
    split: Split | None,
    file: str,
) -> Process:
    ports = inventory.ports
    engine = _engine(inventory, replica, split, 0, file)
    config = WorkerConfig(
        role="flexible",
        replica_id=replica.id,
        listen=format_address(host.address, ports.worker + number),
        # The coordinator's metrics are on the first port.
        metrics_listen=format_address(host.address, ports.metrics + 1 + number),
        coordinator=_address(inventory),
        engine=engine,
        kv=_kv(inventory, host, placement, replica, engine),
        nodes_listen=split.leader if split is not None else "",
        tls=_tls(inventory, Caller.WORKER),
        drain_s=inventory.drain_s,
    )
    return Process(
        f"worker-{replica.id}",
        "flexible",
        Caller.WORKER,
        config,
        config.listen,
        _environment(host, replica, share),
        cores=share.cores,
        devices=bool(share.gpus) or host.infiniband,
        drain_s=config.drain_s,
        replica=replica.id,
    )


def _node(
    inventory: Inventory,
    host: Host,
    placement: Placement,
    replica: ReplicaPlan,
    share: Share,
    split: Split,
    rank: int,
    file: str,
) -> Process:
    engine = _engine(inventory, replica, split, rank, file)
    config = NodeConfig.model_validate(
        {
            "replica_id": replica.id,
            "leader": split.leader,
            "engine": engine,
            "kv": _kv(inventory, host, placement, replica, engine),
            "tls": _tls(inventory, Caller.WORKER),
        }
    )
    return Process(
        f"node-{replica.id}",
        "node",
        Caller.WORKER,
        config,
        "",
        _environment(host, replica, share),
        cores=share.cores,
        devices=bool(share.gpus) or host.infiniband,
        replica=replica.id,
        leader=split.machines[0],
    )


def _kv(inventory: Inventory, host: Host, placement: Placement, replica: ReplicaPlan, engine: EngineConfig) -> KvConfig:
    # On one host KV need not leave it; elsewhere ``auto`` takes RDMA where there is some, and TCP.
    kv_host = (host.kv_host or host.address) if len(placement.machines) > 1 else "127.0.0.1"
    rdma = {"require": "rdma"} if placement.needs_rdma(replica.id) else {}
    kv = inventory.kv.model_copy(update={"host": kv_host, **rdma})
    model = catalog_model(placement.model)
    if model is None and not isinstance(engine, EmulatedEngineConfig):
        # Of a model that is nowhere here; its hand-over has the usual memory.
        return kv
    return planned_pools(kv, engine, replica, model)


def _environment(host: Host, replica: ReplicaPlan, share: Share) -> dict[str, str]:
    return {**ucx_environment(host), **planned_environment(replica, share.gpus), **host.environment}


def _engine(inventory: Inventory, replica: ReplicaPlan, split: Split | None, rank: int, file: str) -> EngineConfig:
    engine = inventory.the_engine
    if isinstance(engine, EmulatedEngineConfig):
        if split is not None:
            raise ConfigError(f"{file}: engine: replica {replica.id} is on several machines, which only vLLM can be")
        return engine
    planned = planned_engine(engine, replica, sum(stage.num_layers for stage in replica.stages), Path(file))
    return planned if split is None else planned.model_copy(update=split.engine(rank))


def names_of(host: Host) -> Sequence[str]:
    """By which others dial a host's processes, and it itself."""
    kv_hosts = [part.strip() for part in host.kv_host.split(",") if part.strip()]
    return tuple(dict.fromkeys((host.address, host.name, *kv_hosts, "localhost", "127.0.0.1")))


def roles_of(inventory: Inventory, found: Sequence[Process], host: Host) -> Iterator[Caller]:
    """Whose certificates a host needs: its processes', and on the coordinator's host those of who asks it."""
    yield from dict.fromkeys(process.caller for process in found)
    if host.name == inventory.coordinator:
        yield Caller.ADMIN
