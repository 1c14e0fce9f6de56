"""The ``hexgen2`` command: what its sub-commands are called and take; each is carried out in a file of its own."""

import asyncio
import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from pydantic import BaseModel
from rich.console import Console

from hexgen2 import trace_tree, traces
from hexgen2.cli import demo as demo_command
from hexgen2.cli import up as up_command
from hexgen2.cli import why_slow
from hexgen2.cli.certs import certs_command
from hexgen2.cli.client import Access, apply_plan, get_plan, preempt
from hexgen2.cli.fleet_config import FleetConfig
from hexgen2.cli.generate import ask
from hexgen2.cli.keys import keys_command
from hexgen2.cli.lazy import LazyCommand
from hexgen2.cli.options import serve_and_exit, service_command
from hexgen2.cli.prepare import prepare
from hexgen2.cli.status import show_status
from hexgen2.cli.watch import watch_status
from hexgen2.config import CoordinatorConfig, GatewayConfig, NodeConfig, TlsConfig, WorkerConfig
from hexgen2.errors import HexgenError
from hexgen2.placement import load_placement, to_json
from hexgen2.security.tls import TlsFiles
from hexgen2.v1 import gateway_pb2

C = TypeVar("C", bound=BaseModel)

as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def timeout(default_s: float) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The ``--timeout`` option."""
    limits = click.FloatRange(min=0, min_open=True)
    return click.option("--timeout", type=limits, default=default_s, show_default=True, metavar="S", help="Seconds.")


tls = click.option(
    "--tls",
    type=click.Path(path_type=Path),
    envvar="HEXGEN2_TLS",
    metavar="DIR",
    help="Folder with ca.pem, cert.pem and key.pem, for a fleet that speaks TLS.  [env: HEXGEN2_TLS]",
)


def access(tls: Path | None, api_key: str = "") -> Access:
    """What a command shows to the fleet. Raises ConfigError."""
    return Access(None if tls is None else TlsFiles(TlsConfig.model_validate(tls)), api_key)


class Commands(click.Group):
    """Commands in the order in which they were added; every error told in one place."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """See click."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """See click."""
        try:
            return super().invoke(ctx)
        except HexgenError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="hexgen2")
def main() -> None:
    """Serve a language model with prefill and decode apart.

    \b
    First steps:
      hexgen2 up                        start everything on this machine; Ctrl-C stops it
      hexgen2 generate "Tell a joke"    in another terminal: ask it
      hexgen2 trace last                see where the time went
      hexgen2 status                    see the replicas and what they do
      hexgen2 plan --example DIR        files to plan a cluster of your own with

    Without a model of your own SmolLM2-135M-Instruct is used. Models, logs and traces are kept in
    ~/.cache/hexgen2, or where HEXGEN2_HOME says.
    """


main.add_command(
    service_command(
        "up",
        FleetConfig,
        up_command.up,
        "Start coordinator, workers and gateway on this machine; with PLAN, a plan.yaml, exactly its replicas.",
        argument="plan",
    )
)


@main.command()
@click.argument("prompt")
@click.option("--address", default="127.0.0.1:50051", show_default=True, help="The gateway's host:port.")
@click.option("--model", default="", help="Its name; default: the one that is served.")
@click.option("--system", default="", help="A system message before the prompt.")
@click.option("--raw", is_flag=True, help="Give the prompt to the model as it is, without its chat template.")
@click.option("--max-tokens", type=int, default=256, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 takes the likeliest token.")
@click.option("--top-p", type=float)
@click.option("--top-k", type=int)
@click.option("--seed", type=int)
@click.option("--stop", multiple=True, help="A text that ends the answer; may be repeated.")
@click.option("--ignore-eos", is_flag=True, help="Go on after the model's end token.")
@timeout(300.0)
@tls
@as_json
def generate(prompt: str, address: str, timeout: float, tls: Path | None, as_json: bool, **options: Any) -> None:
    """Ask a running gateway; the answer is printed as it is made.

    A gateway that asks for an API key finds it in the environment, as HEXGEN2_API_KEY: the command line is everybody's
    to see.
    """
    shown = access(tls, os.environ.get("HEXGEN2_API_KEY", ""))
    asyncio.run(ask(address, make_request(prompt, **options), timeout, shown, as_json=as_json))


def make_request(
    prompt: str,
    *,
    model: str = "",
    system: str = "",
    raw: bool = False,
    stop: tuple[str, ...] = (),
    **sampling: Any,
) -> gateway_pb2.GenerateRequest:
    """A request out of the command's options; those that are None stay unset."""
    request = gateway_pb2.GenerateRequest(model=model, stop=stop)
    for name, value in sampling.items():
        if value is not None:
            try:
                setattr(request.sampling, name, value)
            except ValueError as error:
                # Does not fit the field's type; all other limits are the gateway's to judge.
                raise click.UsageError(f"--{name.replace('_', '-')}: {error}") from error
    if raw:
        request.prompt = prompt
    else:
        if system:
            request.chat.messages.add(role="system", content=system)
        request.chat.messages.add(role="user", content=prompt)
    return request


@main.command()
@click.option("--coordinator", default="127.0.0.1:50052", show_default=True, help="The coordinator's host:port.")
@timeout(5.0)
@tls
@as_json
@click.option("--watch", is_flag=True, help="Go on showing it, until Ctrl-C; with --json a line each time.")
@click.option(
    "--interval", type=click.FloatRange(min=0.1), default=2.0, show_default=True, metavar="S", help="Of --watch."
)
def status(coordinator: str, timeout: float, tls: Path | None, as_json: bool, watch: bool, interval: float) -> None:
    """Show the plan and what every replica does."""
    if watch:
        asyncio.run(
            watch_status(
                lambda: get_plan(coordinator, timeout, access(tls)),
                up_command.make_console(),
                interval,
                as_json=as_json,
            )
        )
        return
    asyncio.run(show_status(coordinator, timeout, access(tls), up_command.make_console(), as_json=as_json))


@main.command()
@click.argument("plan", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--coordinator", default="127.0.0.1:50052", show_default=True, help="The coordinator's host:port.")
@timeout(10.0)
@tls
@as_json
def apply(plan: Path, coordinator: str, timeout: float, tls: Path | None, as_json: bool) -> None:
    """Give a running fleet another PLAN for the replicas it has: roles and routes change, nothing is loaded anew."""
    text = to_json(load_placement(plan))
    epoch = asyncio.run(apply_plan(coordinator, text, timeout, access(tls)))
    click.echo(json.dumps({"plan_epoch": epoch}) if as_json else f"plan epoch {epoch} is in force")


@main.command("preempt")
@click.argument("replica")
@click.option("--grace", "grace_s", default=30.0, show_default=True, help="Seconds until its machine goes.")
@click.option("--coordinator", default="127.0.0.1:50052", show_default=True, help="The coordinator's host:port.")
@timeout(5.0)
@tls
def preempt_command(replica: str, grace_s: float, coordinator: str, timeout: float, tls: Path | None) -> None:
    """Say that the machine of REPLICA goes: it takes nothing new, what runs ends there or goes on elsewhere.

    A worker that gets SIGTERM does the same by itself, within its drain_s.
    """
    asyncio.run(preempt(coordinator, replica, grace_s, timeout, access(tls)))
    click.echo(f"{replica} drains and ends within {grace_s:g} s")


@main.command()
@click.argument("which", metavar="ID")
@click.option("--why-slow", "why", is_flag=True, help="Where its time went against what the plan promised.")
@click.option("--plan", type=click.Path(path_type=Path, dir_okay=False), help="With --why-slow: what was promised.")
@click.option(
    "--coordinator", default="127.0.0.1:50052", show_default=True, help="With --why-slow, without --plan: who has it."
)
@timeout(5.0)
@tls
@as_json
def trace(
    which: str, why: bool, plan: Path | None, coordinator: str, timeout: float, tls: Path | None, as_json: bool
) -> None:
    """Draw one request's trace. ID is a trace id, its first digits, or `last`."""
    found = traces.find(which)
    if why:
        why_slow.show(found, plan, coordinator, timeout, access(tls), up_command.make_console(), as_json=as_json)
    elif as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
    else:
        up_command.make_console().print(trace_tree.draw(found))


main.add_command(
    service_command(
        "demo", FleetConfig, demo_command.demo, "Start everything, ask one question, show how it went, stop."
    )
)


for name, attribute, told in (
    ("plan", "plan_command", "Plan which GPUs of a cluster prefill and which decode, and how."),
    ("simulate", "simulate_command", "Simulate a plan under a trace or a workload, request by request."),
    ("bench", "bench", "Measure the scheduler and the KV hand-over on this machine."),
    ("doctor", "doctor_command", "Say what is missing on this machine, or in a fleet, and what to do about it."),
    ("deploy", "deploy", "Write files that start a fleet in containers or on many machines."),
    ("profile", "profile_command", "Measure this machine and its links as the planner takes them: a cluster.yaml."),
    ("fit", "fit_command", "Fit the cost model to measured times, and show how far off it is."),
):
    main.add_command(LazyCommand(name, f"hexgen2.cli.{name}", attribute, told))


main.add_command(certs_command)
main.add_command(keys_command)


@main.group()
def model() -> None:
    """Models on this machine."""


@model.command("prepare")
@as_json
def model_prepare(as_json: bool) -> None:
    """Make the default model's folder (93 MB to download, 540 MB on disk); nothing when it is there."""
    folder = prepare(Console(stderr=as_json))
    click.echo(json.dumps({"model": str(folder)}) if as_json else f"model: {folder}")


def _service(name: str, cls: type[C]) -> click.Command:
    def run(config: C) -> None:
        # By name: the library does not depend on the services, this command only starts them.
        serve_and_exit(importlib.import_module(f"services.{name}.__main__").serve(config))

    return service_command(name, cls, run)


main.add_command(_service("gateway", GatewayConfig))
main.add_command(_service("coordinator", CoordinatorConfig))
main.add_command(_service("prefill", WorkerConfig))
main.add_command(_service("decode", WorkerConfig))
main.add_command(_service("flexible", WorkerConfig))
main.add_command(_service("node", NodeConfig))

if __name__ == "__main__":
    main()
