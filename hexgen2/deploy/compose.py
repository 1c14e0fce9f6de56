"""A compose file out of a fleet's configuration: one machine, one container per process. Pure.

Inside its network every service listens on the same ports and is known by its name. Published to this machine alone are
the gateway and the coordinator's page.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hexgen2.config import PAGE_PORT, CoordinatorConfig, GatewayConfig, TlsConfig, WorkerConfig
from hexgen2.config_flags import flags_of
from hexgen2.security.callers import Caller

GRPC_PORT, HTTP_PORT, COORDINATOR_PORT, WORKER_PORT, METRICS_PORT = 50051, 8000, 50052, 50061, 9400
HOME = "/var/lib/hexgen2"
#: Released versions. What they do is configured by ``observability``.
COLLECTOR = "docker.io/otel/opentelemetry-collector-contrib:0.119.0"
JAEGER = "docker.io/jaegertracing/jaeger:2.3.0"
PROMETHEUS = "docker.io/prom/prometheus:v3.1.0"
GRAFANA = "docker.io/grafana/grafana:11.5.1"

#: The service whose namespaces the workers share.
NAMESPACES = "namespaces"
#: Where every process finds its own certificates, and nobody else's.
TLS = f"{HOME}/tls"
#: Where the coordinator finds the plan.
PLAN = "/etc/hexgen2/plan.yaml"

Service = dict[str, Any]

_COMPLETED = {"condition": "service_completed_successfully"}


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker's container. ``gpus``: as NVIDIA's tools number them, rank by rank, and ``peer_gpus`` those of workers
    that it hands KV to or from; ``cpus``: a share of the machine's cores.
    """

    config: WorkerConfig
    gpus: tuple[int, ...] = ()
    peer_gpus: tuple[int, ...] = ()
    cpus: float | None = None
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of the service, and in the plan."""
        return self.config.replica_id


@dataclass(frozen=True, slots=True)
class Deployment:
    """What runs. ``default_model``: the model is made by a container that runs first. ``variant``: told apart by it
    from other deployments in the same folder; ``planned``: the plan is beside the file, as ``file("plan.yaml")``.
    """

    workers: Sequence[Worker]
    gateway: GatewayConfig
    coordinator: CoordinatorConfig = field(default_factory=CoordinatorConfig)
    engine: str = "cpu"
    default_model: bool = True
    rdma: bool = False
    variant: str = ""
    planned: bool = False

    def file(self, name: str) -> str:
        """``plan.yaml`` of the variant ``gpu`` is ``plan.gpu.yaml``."""
        stem, dot, suffix = name.rpartition(".")
        return f"{stem}.{self.variant}{dot}{suffix}" if self.variant else name


def metrics_targets(deployment: Deployment) -> list[str]:
    """host:port of every process's metrics, inside the network."""
    names = ["coordinator", *(worker.name for worker in deployment.workers)]
    return [f"gateway:{HTTP_PORT}", *(f"{name}:{METRICS_PORT}" for name in names)]


def compose(deployment: Deployment) -> dict[str, Any]:
    """The document of a compose file."""
    services: dict[str, Service] = {}
    if deployment.default_model:
        services["model"] = _model(deployment)
    services["certs"] = _certs(deployment)
    services["coordinator"] = _coordinator(deployment)
    shares_memory = any(worker.config.kv.transport in ("auto", "ucx") for worker in deployment.workers)
    if shares_memory:
        services[NAMESPACES] = _namespaces()
    for worker in deployment.workers:
        services[worker.name] = _worker(worker, deployment, shares_memory=shares_memory)
    services["gateway"] = _gateway(deployment)
    services["admin"] = _admin()
    services |= _observability(deployment)
    return {
        "name": "hexgen2",
        "services": services,
        "volumes": dict.fromkeys(("models", "traces", "certs", *(f"certs-{role}" for role in Caller))),
    }


def to_yaml(document: Mapping[str, Any], header: str) -> str:
    """The text of a compose file under ``header``, lines of a comment."""
    comment = "".join(f"# {line}".rstrip() + "\n" for line in header.splitlines())
    return comment + yaml.safe_dump(dict(document), sort_keys=False, width=120)


def _base(target: str, engine: str) -> Service:
    image = f"hexgen2-{target}" + ("-gpu" if target == "worker" and engine == "vllm" else "")
    build: dict[str, Any] = {
        "context": "${HEXGEN2_SOURCE:-..}",
        "dockerfile": "deploy/Dockerfile",
        "target": target,
        "args": {"BASE": "${HEXGEN2_BASE_IMAGE:-docker.io/library/python:3.11-slim-bookworm}"},
    }
    if target == "worker":
        build["args"]["ENGINE"] = engine
    return {
        "image": f"${{HEXGEN2_{target.upper()}_IMAGE:-{image}}}",
        "build": build,
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
    }


def _service(
    target: str, engine: str, role: Caller, command: Sequence[str], check: Sequence[str], stop_s: float
) -> Service:
    return {
        **_base(target, engine),
        "command": list(command),
        "environment": {
            # Set by the profile that brings the collector; without it spans go to the volume `traces`.
            "OTEL_EXPORTER_OTLP_ENDPOINT": "${COMPOSE_PROFILES:+http://otel-collector:4317}",
            "HEXGEN2_LOG_LEVEL": "${HEXGEN2_LOG_LEVEL:-INFO}",
        },
        "volumes": [f"traces:{HOME}/traces", f"certs-{role}:{TLS}:ro"],
        "healthcheck": {
            "test": ["CMD", "python", "-m", "hexgen2.rpc.health", *check],
            "interval": "5s",
            "timeout": "5s",
            "retries": 3,
            # Loading a large model takes long; the first success ends it.
            "start_period": "1800s",
        },
        "restart": "unless-stopped",
        # What drains needs its time, and a little to end.
        "stop_grace_period": f"{stop_s + 10:.0f}s",
    }


def _models(deployment: Deployment, *, read_only: bool) -> str:
    return f"${{HEXGEN2_MODELS:-models}}:{HOME}/models" + (":ro" if read_only else "")


def _model(deployment: Deployment) -> Service:
    return {
        **_base("worker", deployment.engine),
        "command": ["model", "prepare"],
        "volumes": [_models(deployment, read_only=False)],
        "restart": "no",
    }


def _certs(deployment: Deployment) -> Service:
    """Makes an authority, where there is none, and new certificates at every start; each role's has its own volume."""
    names = ["coordinator", "gateway", *(worker.name for worker in deployment.workers), "localhost", "127.0.0.1"]
    folder = f"{HOME}/certs"
    return {
        **_base("control", ""),
        "command": ["certs", "fleet", folder, *(word for name in names for word in ("--host", name))],
        "volumes": [f"certs:{folder}", *(f"certs-{role}:{folder}/{role}" for role in Caller)],
        "network_mode": "none",
        "restart": "no",
    }


def _coordinator(deployment: Deployment) -> Service:
    config = deployment.coordinator.model_copy(
        update={
            "listen": f"0.0.0.0:{COORDINATOR_PORT}",
            "metrics_listen": f"0.0.0.0:{METRICS_PORT}",
            "page_listen": f"0.0.0.0:{PAGE_PORT}",
            # Published to this machine alone, whose people call it so.
            "page_names": "localhost",
            "tls": _tls(),
            "plan": Path(PLAN) if deployment.planned else None,
        }
    )
    command = ["coordinator", *flags_of(config)]
    check = [f"127.0.0.1:{COORDINATOR_PORT}", TLS]
    service = _service("control", "", Caller.COORDINATOR, command, check, config.drain_s)
    service["ports"] = [f"${{HEXGEN2_PAGE:-127.0.0.1:{PAGE_PORT}}}:{PAGE_PORT}"]
    service["depends_on"] = {"certs": _COMPLETED}
    if deployment.planned:
        # A plan that is missing is to be an error, not a folder that somebody makes.
        plan = {"type": "bind", "source": f"./{deployment.file('plan.yaml')}", "target": PLAN, "read_only": True}
        service["volumes"].append(plan | {"bind": {"create_host_path": False}})
    return service


def _admin() -> Service:
    """Not of those that run: `docker compose run --rm --no-deps admin COMMAND`, beside the coordinator."""
    return {
        **_base("control", ""),
        "profiles": ["admin"],
        "command": ["status"],
        "environment": {"HEXGEN2_TLS": TLS},
        "volumes": [f"certs-{Caller.ADMIN}:{TLS}:ro"],
        "network_mode": "service:coordinator",
        "depends_on": {"coordinator": {"condition": "service_healthy"}},
        "restart": "no",
    }


def _tls() -> TlsConfig:
    return TlsConfig.model_validate(TLS)


def _gateway(deployment: Deployment) -> Service:
    config = deployment.gateway.model_copy(
        update={
            "listen": f"0.0.0.0:{GRPC_PORT}",
            "http_listen": f"0.0.0.0:{HTTP_PORT}",
            "coordinator": f"coordinator:{COORDINATOR_PORT}",
            "tls": _tls(),
            # Published to this machine alone; see SECURITY.md before that is changed.
            "serve_tls": False,
        }
    )
    command = ["gateway", *flags_of(config)]
    service = _service("control", "", Caller.GATEWAY, command, [f"127.0.0.1:{GRPC_PORT}"], config.drain_s)
    service["volumes"].append(_models(deployment, read_only=True))
    service["ports"] = [
        f"${{HEXGEN2_HTTP:-127.0.0.1:{HTTP_PORT}}}:{HTTP_PORT}",
        f"${{HEXGEN2_GRPC:-127.0.0.1:{GRPC_PORT}}}:{GRPC_PORT}",
    ]
    service["depends_on"] = _after(deployment) | {
        worker.name: {"condition": "service_healthy"} for worker in deployment.workers
    }
    return service


def _worker(worker: Worker, deployment: Deployment, *, shares_memory: bool) -> Service:
    config = worker.config
    config = config.model_copy(
        update={
            "listen": f"0.0.0.0:{WORKER_PORT}",
            "advertise": f"{worker.name}:{WORKER_PORT}",
            "metrics_listen": f"0.0.0.0:{METRICS_PORT}",
            "coordinator": f"coordinator:{COORDINATOR_PORT}",
            "kv": config.kv.model_copy(update={"host": worker.name}),
            "tls": _tls(),
        }
    )
    command = [config.role, *flags_of(config)]
    check = [f"127.0.0.1:{WORKER_PORT}", TLS]
    service = _service("worker", deployment.engine, Caller.WORKER, command, check, config.drain_s)
    service["volumes"].append(_models(deployment, read_only=True))
    service["environment"] |= {"OMP_WAIT_POLICY": "PASSIVE", **worker.environment}
    service["depends_on"] = _after(deployment)
    # vLLM's ranks talk through shared memory.
    service["shm_size"] = "1gb"
    if shares_memory:
        # Reads from one container's memory by another: UCX sees one machine where these are one.
        service["ipc"] = service["pid"] = f"service:{NAMESPACES}"
        del service["shm_size"]
        service["depends_on"] |= {NAMESPACES: {"condition": "service_started"}}
    if worker.cpus is not None:
        service["cpus"] = worker.cpus
    if worker.gpus:
        # CUDA reads a peer's memory only where the container has the peer's GPU, too; vLLM uses its own alone. The
        # container numbers what it has anew, by the bus.
        seen = sorted({*worker.gpus, *worker.peer_gpus})
        own = ",".join(str(seen.index(gpu)) for gpu in worker.gpus)
        service["environment"] |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": own}
        device = {"driver": "nvidia", "device_ids": [str(gpu) for gpu in seen], "capabilities": ["gpu"]}
        service["deploy"] = {"resources": {"reservations": {"devices": [device]}}}
    if deployment.rdma:
        # Memory that a network card reads is pinned.
        service["ulimits"] = {"memlock": -1}
        service["cap_add"] = ["IPC_LOCK"]
        service["devices"] = ["/dev/infiniband:/dev/infiniband"]
    return service


def _namespaces() -> Service:
    """Sleeps, and owns the process and memory namespaces that the workers share: none dies with another."""
    return {
        **_base("control", ""),
        "entrypoint": ["sleep", "infinity"],
        "command": [],
        "init": True,
        "ipc": "shareable",
        "shm_size": "4gb",
        "restart": "unless-stopped",
        "stop_grace_period": "1s",
    }


def _after(deployment: Deployment) -> dict[str, Any]:
    waits: dict[str, Any] = {"coordinator": {"condition": "service_healthy"}}
    if deployment.default_model:
        waits["model"] = _COMPLETED
    return waits


def _observability(deployment: Deployment) -> dict[str, Service]:
    """Of the profile ``observability``: published on this machine only."""
    config = "./observability"

    def service(image: str, volumes: Sequence[str], **more: Any) -> Service:
        return {"image": image, "profiles": ["observability"], "volumes": list(volumes), **more}

    return {
        "otel-collector": service(
            COLLECTOR,
            [f"{config}/otel-collector.yaml:/etc/otel/config.yaml:ro"],
            command=["--config", "/etc/otel/config.yaml"],
            depends_on=["jaeger"],
        ),
        "jaeger": service(JAEGER, (), ports=["127.0.0.1:16686:16686"]),
        "prometheus": service(
            PROMETHEUS,
            [
                f"{config}/{deployment.file('prometheus.yaml')}:/etc/prometheus/prometheus.yml:ro",
                f"{config}/rules.yaml:/etc/prometheus/rules.yaml:ro",
            ],
            ports=["127.0.0.1:9090:9090"],
        ),
        "grafana": service(
            GRAFANA,
            [f"{config}/grafana:/etc/grafana/provisioning:ro"],
            environment={"GF_AUTH_ANONYMOUS_ENABLED": "true", "GF_AUTH_ANONYMOUS_ORG_ROLE": "Viewer"},
            ports=["127.0.0.1:3000:3000"],
            depends_on=["prometheus"],
        ),
    }
