"""A replica on two machines, on real vLLM: deployed, asked, its second machine lost, started again, stopped.

The machines are network namespaces joined by a link; the second has shared memory of its own as well, so that vLLM's
ranks find no way to each other but the network. Every process has the configuration, environment and certificates that
`hexgen2 deploy baremetal` gives it. For root only. Run from the root of the tree::

    python -m benchmarks.two_machines                    # the replica on both machines decodes
    python -m benchmarks.two_machines --role prefill
"""

import asyncio
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import click
import grpc
from tokenizers import Tokenizer

from benchmarks.exactness import questions, run
from benchmarks.two_machines.fleet import MIB, WIDE, Fleet, FleetError, inventory, plan
from hexgen2.bench import netns
from hexgen2.cli.fleet_config import default_model
from hexgen2.config import VllmEngineConfig
from hexgen2.engine.base import Sampling
from hexgen2.model import load_model
from hexgen2.placement import ReplicaRole

START_S = 600.0
LOST_S = 90.0
FAULTS = ("killed", "silent")


class Wrong(RuntimeError):
    """Something is not as it must be."""


Say = Callable[[str, float | None], None]


async def drive(
    fleet: Fleet, prompts: list[list[int]], expected: list[list[int]], faults: tuple[str, ...], say: Say
) -> None:
    """From the start of the fleet to before its end. Raises Wrong where something is not as it must be."""
    sampling = Sampling(max_tokens=len(expected[0]), temperature=0.0, ignore_eos=True)

    async def ask() -> None:
        began = time.monotonic()
        answers = await fleet.ask(prompts, sampling)
        equal = sum(answer.tokens == tokens for answer, tokens in zip(answers, expected, strict=True))
        handed = sum(answer.kv_bytes for answer in answers) / MIB
        say(f"{equal} of {len(prompts)} answers equal, {handed:.0f} MiB of KV handed over", time.monotonic() - began)
        if equal < len(prompts) or not all(answer.kv_bytes for answer in answers):
            raise Wrong("an answer is another, or was made without a hand-over")

    await fleet.start()
    say("both replicas are ready", await fleet.wait_ready(START_S))
    await ask()
    for fault in faults:
        if fault == "killed":
            say(f"all {fleet.kill_second()} processes of the second machine killed", None)
        else:
            fleet.link.silence()
            say("the link carries nothing any more", None)
        began = time.monotonic()
        say("the coordinator has given the replica up", await fleet.wait_gone(LOST_S))
        for name in (f"worker-{WIDE}", f"node-{WIDE}"):
            async with asyncio.timeout(LOST_S):
                status = await fleet.processes[name].wait()
            say(f"{name} ended with status {status}", time.monotonic() - began)
        if left := fleet.left():
            raise Wrong(f"{left} processes are left on the second machine")
        if fault == "silent":
            fleet.link.speak()
        await fleet.start(f"node-{WIDE}", f"worker-{WIDE}")
        say("both started again: ready", await fleet.wait_ready(START_S))
        await ask()


@click.command()
@click.option("--role", type=click.Choice(("decode", "prefill")), default="decode", show_default=True)
@click.option("--fault", "faults", multiple=True, type=click.Choice(FAULTS), help="Default: one after the other.")
@click.option("--no-fault", is_flag=True, help="Only ask.")
@click.option("--model", type=click.Path(path_type=Path), help="Default: the default one.")
@click.option("--prompts", "num_prompts", default=8, show_default=True)
@click.option("--output-tokens", default=24, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="Keeps configuration and logs there.")
@click.option("--json", "as_json", is_flag=True, help="Print what was seen as JSON.")
def main(
    role: ReplicaRole,
    faults: tuple[str, ...],
    no_fault: bool,
    model: Path | None,
    num_prompts: int,
    output_tokens: int,
    folder: Path | None,
    as_json: bool,
) -> None:
    """Run it, and say what was seen."""
    if reason := netns.why_not():
        raise click.ClickException(f"there can be no network namespaces here: {reason}")
    model = model or default_model()
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    prompts = [tokenizer.encode(text, add_special_tokens=False).ids for text in questions(num_prompts)]
    engine = VllmEngineConfig(model=model, max_model_len=1024, max_num_seqs=8, kv_cache_bytes=256 * MIB)
    seen: list[dict[str, object]] = []

    def say(what: str, seconds: float | None) -> None:
        seen.append({"what": what, "seconds": seconds})
        click.echo(f"{what:70}{'' if seconds is None else f'{seconds:8.1f} s'}", err=as_json)

    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as one:
        [expected] = one.submit(run, "alone", engine, prompts, output_tokens, (1,)).result()
    say(f"one vLLM engine by itself has answered {num_prompts} prompts", None)
    netns.enter()

    async def all_of_it(folder: Path) -> None:
        fleet = Fleet(folder, plan(role, load_model(model).num_layers), inventory(model, engine))
        try:
            await drive(fleet, prompts, expected, () if no_fault else faults or FAULTS, say)
            ended = await fleet.stop()
            say("stopped: " + ", ".join(f"{name} {status}" for name, status in ended.items()), None)
        finally:
            await fleet.stop()

    with tempfile.TemporaryDirectory(prefix="hexgen2-") as made:
        (folder or Path(made)).mkdir(parents=True, exist_ok=True)
        try:
            asyncio.run(all_of_it((folder or Path(made)).absolute()))
        except (FleetError, Wrong, TimeoutError, grpc.aio.AioRpcError) as error:
            raise click.ClickException(str(error) or "a process did not end") from error
    if as_json:
        click.echo(json.dumps(seen, indent=1))


if __name__ == "__main__":
    main()
