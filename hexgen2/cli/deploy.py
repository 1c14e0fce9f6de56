"""``hexgen2 deploy``: files that start a fleet elsewhere than in this terminal."""

from collections.abc import Mapping
from pathlib import Path

import click

from hexgen2.cli.fleet_config import DEFAULT_MODEL_NAME
from hexgen2.config import GatewayConfig, KvConfig, VllmEngineConfig, WorkerConfig
from hexgen2.deploy import observability
from hexgen2.deploy.compose import HOME, Deployment, Worker, compose, metrics_targets, to_yaml

HEADER = """Written by `{command}`: change that, or this.

docker compose up                                        # build the images, start everything
curl localhost:8000/v1/models                            # OpenAI-compatible HTTP; gRPC is on 50051
docker compose exec gateway hexgen2 trace last           # where the last request's time went
COMPOSE_PROFILES=observability docker compose up         # with Grafana (3000), Prometheus (9090), Jaeger (16686)
docker compose down                                      # stop; running requests end first

HEXGEN2_MODELS names a folder of models of your own instead of the volume `models`."""


@click.group()
def deploy() -> None:
    """Write files that start a fleet in containers or on many machines."""


@deploy.command("compose")
@click.option("-o", "--output", type=click.Path(file_okay=False, path_type=Path), default=Path("deploy"))
@click.option("--prefill", type=click.IntRange(1), default=1, show_default=True, help="Prefill workers.")
@click.option("--decode", type=click.IntRange(1), default=1, show_default=True, help="Decode workers.")
def compose_command(output: Path, prefill: int, decode: int) -> None:
    """Write compose.yaml, and what Prometheus, Grafana and the collector need beside it."""
    deployment = default_deployment(prefill, decode)
    command = " ".join(["hexgen2 deploy compose", *_given(prefill, decode)])
    for path, text in compose_files(deployment, HEADER.format(command=command)).items():
        file = output / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        click.echo(file)


def compose_files(deployment: Deployment, header: str) -> Mapping[str, str]:
    """Every file by its path."""
    watched = observability.files(metrics_targets(deployment))
    return {
        "compose.yaml": to_yaml(compose(deployment), header),
        **{f"observability/{path}": text for path, text in watched.items()},
    }


def default_deployment(prefill: int, decode: int) -> Deployment:
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
    return Deployment(workers, GatewayConfig(model=model))


def _given(prefill: int, decode: int) -> list[str]:
    return [f"--{name} {count}" for name, count in (("prefill", prefill), ("decode", decode)) if count != 1]
