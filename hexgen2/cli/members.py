"""Which processes a fleet on this machine has, and each one's configuration: as many as asked for, or a plan's."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hexgen2.address import format_address, parse_address
from hexgen2.cli.fleet_config import FleetConfig, default_model
from hexgen2.config import (
    Config,
    CoordinatorConfig,
    EmulatedEngineConfig,
    EngineConfig,
    GatewayConfig,
    TlsConfig,
    VllmEngineConfig,
    WorkerConfig,
)
from hexgen2.deploy.pools import catalog_model, planned_pools
from hexgen2.deploy.replicas import planned_engine, planned_environment
from hexgen2.devices import Share, here, shares
from hexgen2.model import load_model
from hexgen2.placement import Placement, ReplicaPlan, load_placement

COORDINATOR, GATEWAY = "coordinator", "gateway"


@dataclass(frozen=True, slots=True)
class Member:
    """One process: which service, its configuration, and what it gets of this machine (None: whatever is free)."""

    name: str
    service: str
    settings: Config
    environment: Mapping[str, str] = field(default_factory=dict)
    share: Share | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """Where a worker runs and listens: ``launcher`` goes before its command and must become it (``nsenter``...)."""

    host: str
    launcher: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where clients and workers come in; of gateways after the first, both addresses of each. Workers that have no
    place of their own are where the coordinator is.
    """

    coordinator: str
    grpc: str
    http: str
    more: tuple[tuple[str, str], ...] = ()
    page: str = ""
    workers: Mapping[str, Place] = field(default_factory=dict)

    def host_of(self, worker: str) -> str:
        """Where a worker listens."""
        return self.workers[worker].host if worker in self.workers else parse_address(self.coordinator)[0]


def members(config: FleetConfig, addresses: Addresses, run_dir: Path) -> list[Member]:
    """Coordinator, workers, gateways, in the order of their start. A plan's figures for emulated engines are written
    to ``run_dir``.

    Raises:
        ConfigError: the plan cannot run here, or not with this model; says what differs.
    """
    engine, tokenizer, served_name = _model(config)
    placement = load_placement(config.plan) if config.plan is not None else None
    coordinator = CoordinatorConfig(
        listen=addresses.coordinator,
        page_listen=addresses.page,
        codec=config.codec,
        plan=config.plan.absolute() if config.plan is not None else None,
        replan=config.replan and config.plan is not None,
        replanning=config.replanning.model_copy(
            update={
                "cluster": config.replanning.cluster or config.cluster,
                "workload": config.replanning.workload or config.workload,
            }
        ),
        state_file=(run_dir / "coordinator.db").absolute(),
        tls=_tls(config, COORDINATOR),
    )
    found = [Member(COORDINATOR, COORDINATOR, coordinator)]
    if placement is None:
        found += [
            _worker(config, addresses, f"{role}-{number}", role, engine)
            for role, count in (("prefill", config.prefill), ("decode", config.decode))
            for number in range(count)
        ]
    else:
        found += _planned(config, addresses, placement, engine, run_dir)
    for number, (grpc, http) in enumerate(((addresses.grpc, addresses.http), *addresses.more)):
        name = f"{GATEWAY}-{number}" if number else GATEWAY
        gateway = GatewayConfig(
            gateway_id=name,
            listen=grpc,
            http_listen=http,
            coordinator=addresses.coordinator,
            model=tokenizer,
            served_model_name=served_name,
            tls=_tls(config, GATEWAY),
            api_keys=config.api_keys,
            drain_s=config.drain_s,
        )
        found.append(Member(name, GATEWAY, gateway))
    return found


def _model(config: FleetConfig) -> tuple[EngineConfig, Path, str]:
    """The engine, the folder of its tokenizer and what clients call it."""
    engine = config.engine
    if isinstance(engine, VllmEngineConfig):
        return engine, config.tokenizer or engine.model, config.served_model_name
    tokenizer = config.tokenizer or default_model()
    if "vocab_size" not in engine.model_fields_set:
        # Its tokens must be the tokenizer's, both ways.
        engine = engine.model_copy(update={"vocab_size": load_model(tokenizer).vocab_size})
    return engine, tokenizer, config.served_model_name or engine.name


def _tls(config: FleetConfig, role: str) -> TlsConfig | None:
    return None if config.tls is None else TlsConfig.model_validate((config.tls / role).absolute())


def _worker(
    config: FleetConfig,
    addresses: Addresses,
    name: str,
    service: str,
    engine: EngineConfig,
    environment: Mapping[str, str] | None = None,
    share: Share | None = None,
    planned: ReplicaPlan | None = None,
) -> Member:
    host = addresses.host_of(name)
    kv = config.kv if planned is None else planned_pools(config.kv, engine, planned)
    if name in addresses.workers and "host" not in kv.model_fields_set:
        kv = kv.model_copy(update={"host": host})
    settings = WorkerConfig.model_validate(
        {
            "role": service,
            "replica_id": name,
            "listen": format_address(host, 0),
            "metrics_listen": format_address(host, 0),
            "coordinator": addresses.coordinator,
            "engine": engine,
            "kv": kv,
            "slo_ttft_s": config.slo_ttft_s or (planned and planned.engine and planned.engine.slo_ttft_s),
            "slo_tpot_s": config.slo_tpot_s or (planned and planned.engine and planned.engine.slo_tpot_s),
            "tls": _tls(config, "worker"),
            "drain_s": config.drain_s,
        }
    )
    return Member(name, service, settings, environment or {}, share)


def _planned(
    config: FleetConfig, addresses: Addresses, placement: Placement, engine: EngineConfig, run_dir: Path
) -> list[Member]:
    """Each replica as a flexible worker, so that another plan can change its role without loading anything."""
    if isinstance(engine, EmulatedEngineConfig):
        # The planner is heavy, and most fleets need none.
        from hexgen2.cli.planned_costs import write_costs

        if "max_model_len" not in engine.model_fields_set and (model := catalog_model(placement.model)):
            engine = engine.model_copy(update={"max_model_len": model.max_position_embeddings})
        costs = write_costs(config, placement, run_dir)
        return [
            _worker(config, addresses, each.id, "flexible", _emulated(engine, each, costs[each.id]), planned=each)
            for each in placement.replicas
        ]
    found = shares(placement, here())
    spec = load_model(engine.model)
    members = []
    for replica in placement.replicas:
        share = found[replica.id]
        environment = planned_environment(replica, share.gpus)
        planned = planned_engine(engine, replica, spec.num_layers, config.plan)
        quota = share if share.cores and config.cpu_quotas else None
        members.append(_worker(config, addresses, replica.id, "flexible", planned, environment, quota, replica))
    return members


def _emulated(engine: EmulatedEngineConfig, replica: ReplicaPlan, cost_file: Path) -> EmulatedEngineConfig:
    """Its KV has a rank per GPU of a stage, as far as the emulated model's heads go."""
    ranks = min(engine.num_kv_heads, max(stage.tensor_parallel_size for stage in replica.stages))
    return engine.model_copy(update={"cost_file": cost_file.absolute(), "tensor_parallel_size": ranks})
