"""``hexgen2 deploy``: files that start a fleet elsewhere than in this terminal."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import click

from hexgen2.cli.baremetal import baremetal_command
from hexgen2.cli.fleet_config import DEFAULT_MODEL_NAME
from hexgen2.config import GatewayConfig, KvConfig, VllmEngineConfig, WorkerConfig
from hexgen2.deploy import observability
from hexgen2.deploy.compose import HOME, Deployment, Worker, compose, metrics_targets, to_yaml
from hexgen2.deploy.pools import catalog_model, planned_pools
from hexgen2.deploy.replicas import planned_engine, planned_environment
from hexgen2.devices import Machine, here, shares
from hexgen2.errors import ConfigError
from hexgen2.placement import Placement, load_placement

HEADER = """Written by `{command}`: change that, or this.

{uses}

HEXGEN2_MODELS names a folder of models of your own instead of the volume `models`.{more}"""
#: How the file is used; a command and what it does.
USES = (
    ("docker compose{file} up", "build the images, start everything"),
    ("curl localhost:8000/v1/models", "OpenAI-compatible HTTP; gRPC is on 50051, a page to look at on 8001"),
    ("docker compose{file} exec gateway hexgen2 trace last", "where the last request's time went"),
    (
        "docker compose{file} run --rm --no-deps admin status",
        "plan, replicas, load; so every command that asks the coordinator",
    ),
    (
        "COMPOSE_PROFILES=observability docker compose{file} up",
        "with Grafana (3000), Prometheus (9090), Jaeger (16686)",
    ),
    ("docker compose{file} down", "stop; running requests end first"),
)


@click.group()
def deploy() -> None:
    """Write files that start a fleet in containers or on many machines."""


deploy.add_command(baremetal_command)


@deploy.command("compose")
@click.argument("plan", required=False, type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(file_okay=False, path_type=Path), default=Path("deploy"), show_default=True
)
@click.option("--name", default="", help="Write compose.NAME.yaml, to have several in one folder.")
@click.option("--prefill", type=click.IntRange(1), default=1, show_default=True, help="Without a plan: workers.")
@click.option("--decode", type=click.IntRange(1), default=1, show_default=True, help="Without a plan: workers.")
@click.option(
    "--gpu",
    "gpus",
    multiple=True,
    metavar="NAME",
    help="With a plan: a GPU of the machine that is deployed to, in nvidia-smi's order; repeat it for each.  "
    "[default: this machine's]",
)
@click.option("--cores", type=click.IntRange(1), help="With a plan: that machine's CPU cores.  [default: this one's]")
@click.option("--model", default="", help="Folder in HEXGEN2_MODELS.  [default: the plan's model]")
def compose_command(
    plan: Path | None,
    output: Path,
    name: str,
    prefill: int,
    decode: int,
    gpus: Sequence[str],
    cores: int | None,
    model: str,
) -> None:
    """Write compose.yaml, and what Prometheus, Grafana and the collector need beside it.

    With PLAN, a plan.yaml whose replicas are all on one machine: exactly these, each with its GPUs or its share of the
    cores. Without: workers of the default model on CPU.
    """
    given = [("--prefill", prefill, 1), ("--decode", decode, 1)]
    words = [f"{flag} {value}" for flag, value, default in given if value != default]
    if plan is None:
        if gpus or cores or model:
            raise click.UsageError("--gpu, --cores and --model say where a PLAN runs: give one")
        deployment = default_deployment(prefill, decode, name)
    else:
        if words:
            raise click.UsageError(f"{words[0].split()[0]}: the plan says which workers there are")
        machine = here()
        machine = Machine(tuple(gpus) or machine.gpus, cores or machine.cores)
        deployment = planned_deployment(load_placement(plan), plan, machine, model, name)
        words = [str(plan), *(f"--gpu {_quoted(gpu)}" for gpu in gpus)]
        words += [f"--cores {cores}"] if cores else []
        words += [f"--model {_quoted(model)}"] if model else []
    words += [f"--name {name}"] if name else []
    written = compose_files(deployment, " ".join(["hexgen2 deploy compose", *words]))
    if plan is not None:
        written = {**written, deployment.file("plan.yaml"): plan.read_text(encoding="utf-8")}
    for path, text in written.items():
        file = output / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        click.echo(file)


def compose_files(deployment: Deployment, command: str) -> Mapping[str, str]:
    """Every file by its path; ``command`` wrote them."""
    watched = observability.files(metrics_targets(deployment))
    file = f" -f {deployment.file('compose.yaml')}" if deployment.variant else ""
    more = "" if deployment.default_model else f"\nIt must hold {deployment.gateway.model.name}."
    lines = [(use.format(file=file), what) for use, what in USES]
    width = max(len(use) for use, _ in lines) + 2
    uses = "\n".join(f"{use:{width}} # {what}" for use, what in lines)
    header = HEADER.format(command=command, uses=uses, more=more)
    return {
        deployment.file("compose.yaml"): to_yaml(compose(deployment), header),
        **{
            f"observability/{deployment.file(path) if path == 'prometheus.yaml' else path}": text
            for path, text in watched.items()
        },
    }


def default_deployment(prefill: int, decode: int, name: str = "") -> Deployment:
    """The default model on this machine's CPU."""
    model = Path(HOME) / "models" / DEFAULT_MODEL_NAME
    workers = [
        Worker(
            WorkerConfig(
                role=role,
                replica_id=f"{role}-{number}",
                engine=VllmEngineConfig(model=model),
                kv=KvConfig(),
            )
        )
        for role, count in (("prefill", prefill), ("decode", decode))
        for number in range(count)
    ]
    return Deployment(workers, GatewayConfig(model=model), variant=name)


def planned_deployment(
    placement: Placement, file: Path, machine: Machine, model: str = "", name: str = ""
) -> Deployment:
    """A plan of one machine. ``file`` is named in errors.

    Raises:
        ConfigError: it is for several machines, or for other hardware.
    """
    if len(placement.machines) != 1:
        raise ConfigError(
            f"{file}: replicas are on {', '.join(placement.machines) or 'no machine'}; a compose file is for one: "
            "`hexgen2 deploy baremetal` writes what several need"
        )
    found = shares(placement, machine)
    folder = Path(HOME) / "models" / (model or placement.model)
    num_layers = sum(stage.num_layers for stage in placement.replicas[0].stages)
    known = catalog_model(placement.model)
    workers = []
    for replica in placement.replicas:
        share = found[replica.id]
        environment = planned_environment(replica, ())
        engine = planned_engine(VllmEngineConfig(model=folder), replica, num_layers, file)
        # All on one machine, and so by CUDA IPC, whatever the workers are called.
        kv = KvConfig(transport="ucx") if share.gpus else KvConfig()
        kv = kv if known is None else planned_pools(kv, engine, replica, known)
        config = WorkerConfig(role="flexible", replica_id=replica.id, engine=engine, kv=kv)
        peers = {each.prefill for each in placement.routes if each.decode == replica.id}
        peers |= {each.decode for each in placement.routes if each.prefill == replica.id}
        peer_gpus = tuple(gpu for peer in sorted(peers) for gpu in found[peer].gpus)
        workers.append(Worker(config, share.gpus, peer_gpus, share.cores or None, environment))
    has_gpus = any(worker.gpus for worker in workers)
    return Deployment(
        workers,
        GatewayConfig(model=folder),
        engine="vllm" if has_gpus else "cpu",
        default_model=folder.name == DEFAULT_MODEL_NAME,
        rdma=bool(placement.rdma),
        variant=name,
        planned=True,
    )


def _quoted(text: str) -> str:
    return f'"{text}"' if " " in text else text
