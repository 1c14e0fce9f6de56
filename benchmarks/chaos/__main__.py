"""``python -m benchmarks.chaos``: see the package, and docs/chaos.md."""

import asyncio
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.chaos import asks, oracle, report, verdict
from benchmarks.chaos.faults import Strike, deck
from benchmarks.chaos.house import HouseConfig, running
from benchmarks.chaos.outcome import Outcome
from benchmarks.chaos.run import Load, crashes, retried, run
from benchmarks.chaos.watch import SpanTail
from hexgen2 import netns
from hexgen2.cli.fleet_config import default_model
from hexgen2.config import EmulatedEngineConfig, KvConfig
from hexgen2.model import load_model
from hexgen2.text.tokenizer import TextModel

NUM_PROMPTS = 300
LONGEST_PROMPT = 1000
#: Pages of 128 tokens that a pool holds: fewer than the requests at work would like to have.
POOL_PAGES = 24
LANDING_LAYERS = 8
MAX_QUEUED = 48


@click.command()
@click.option("--seconds", default=600.0, show_default=True, help="of load, over all transports")
@click.option("--seed", default=1, show_default=True)
@click.option("--rate", default=25.0, show_default=True, help="requests per second")
@click.option("--transport", type=click.Choice(["both", "tcp", "ucx"]), default="both", show_default=True)
@click.option("--cross", is_flag=True, help="two workers that serve both phases (both transports: after the others)")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="default: the default model's folder")
@click.option("--free-within", default=1.0, show_default=True, help="seconds from cancel to free, in 99 of 100 cases")
@click.option("--folder", type=click.Path(path_type=Path), help="for logs and traces; default: a new one")
@click.option("--keep", is_flag=True, help="keep logs and traces also when nothing was found")
@click.option("--json", "as_json", is_flag=True, help="print the result as JSON")
def main(
    seconds: float,
    seed: int,
    rate: float,
    transport: str,
    cross: bool,
    tokenizer: Path | None,
    free_within: float,
    folder: Path | None,
    keep: bool,
    as_json: bool,
) -> None:
    """Load, faults and meddling; exit status 1 when anything happened that must not."""
    console = Console(stderr=as_json, width=None if sys.stdout.isatty() else 120)
    tokenizer = tokenizer or default_model()
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    no_links = netns.why_not()
    if no_links:
        console.print(f"[yellow]faults of links are left out[/]: no network namespaces here ({no_links})")
    else:
        # Before any thread is started: all that follows, this process included, is alone on its own network.
        netns.enter()
    both = {("tcp", False): 0.5, ("tcp", True): 0.2, ("ucx", False): 0.3}
    settings = both if transport == "both" else {(transport, cross): 1.0}
    results = []
    for (name, crosses), share in settings.items():
        # UCX reads between network namespaces go over its emulated TCP, which is not for production: loopback.
        links = not no_links and name == "tcp"
        workers = "two workers of both phases" if crosses else "two prefill, two decode"
        setting = f"emulated engine, {workers}, {name}, {'a link each' if links else 'loopback'}"
        kept = Path(tempfile.mkdtemp(prefix=f"hexgen2-chaos-{name}-", dir=folder))
        with tempfile.TemporaryDirectory(prefix="hexgen2-") as scratch:
            # Of all processes: where traces go, and what those that are killed cannot clear away.
            os.environ |= {"HEXGEN2_HOME": str(kept), "TMPDIR": scratch}
            one = _one(
                setting,
                name,
                kept,
                seconds * share,
                seed,
                rate,
                tokenizer,
                crosses=crosses,
                free_within=free_within,
                links=links,
                console=console,
            )
            result = asyncio.run(one)
        results.append(result)
        report.show(result, console)
        if result.ok and not keep:
            shutil.rmtree(result.folder, ignore_errors=True)
    if as_json:
        click.echo(json.dumps([_json(result) for result in results], indent=1))
    sys.exit(0 if all(result.ok for result in results) else 1)


async def _one(
    setting: str,
    transport: str,
    folder: Path,
    seconds: float,
    seed: int,
    rate: float,
    tokenizer: Path,
    *,
    crosses: bool,
    free_within: float,
    links: bool,
    console: Console,
) -> report.Result:
    engine = EmulatedEngineConfig(
        vocab_size=load_model(tokenizer).vocab_size, prefill_tokens_per_s=10_000.0, decode_step_base_s=0.005
    )
    text = TextModel.load(tokenizer)
    vocabulary = range(oracle_first(engine.vocab_size), engine.vocab_size)
    with console.status("the right answers"):
        prompts = oracle.make_prompts(NUM_PROMPTS, LONGEST_PROMPT, vocabulary, seed)
        known = [oracle.emulated_answer(engine, prompt) for prompt in prompts]
        page_tokens = POOL_PAGES * 128
        [large] = oracle.make_prompts(1, 1, vocabulary, seed)
        oversize = [oracle.emulated_answer(engine, large * (page_tokens + 200))]
    token_bytes = engine.num_layers * engine.num_kv_heads * engine.head_dim * 2 * 4
    kv = KvConfig.model_validate(
        {
            "transport": transport,
            "send_bytes": POOL_PAGES * 128 * token_bytes,
            "staging_bytes": POOL_PAGES * 128 * token_bytes,
            "landing_bytes": LANDING_LAYERS * 128 * token_bytes // engine.num_layers,
            "max_queued": MAX_QUEUED,
        }
    )
    counts = {"num_prefill": 0, "num_decode": 0, "num_flexible": 2} if crosses else {}
    config = HouseConfig(folder, tokenizer, engine, kv, namespaces=links, **counts)
    cards = deck(roles=["flexible"] if crosses else ["prefill", "decode"], links=links, seconds=seconds)
    load = Load(asks.asks(known, oversize, seed), known, seconds, rate, seed, burst_every_s=15.0)
    tail = SpanTail(folder / "traces")
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[now]}"), TimeElapsedColumn()
    )
    progress.live.console = console
    with console.status(f"{setting}: starting"):
        house_running = running(config)
        house = await house_running.__aenter__()
    try:
        with progress:
            task = progress.add_task(setting, total=int(seconds * rate), now="")

            def show(num: int, answered: int, strikes: int) -> None:
                progress.update(task, completed=num, now=f"{num} requests, {answered} answered, {strikes} faults")

            seen = await run(house, load, cards, text, tail, show)
    finally:
        await house_running.__aexit__(None, None, None)
    tail.read()
    tail.close()
    _save(folder / "requests.jsonl", seen.outcomes)
    _save(folder / "faults.jsonl", seen.strikes)
    judged = verdict.judge(seen.outcomes, seen.strikes, tail.work, retried(house), free_within)
    seen.violations += crashes(house)
    return report.Result(setting, seen, judged, str(folder))


def _save(file: Path, rows: Sequence[Outcome] | Sequence[Strike]) -> None:
    """For whoever looks into what happened when."""
    file.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows), encoding="utf-8")


def oracle_first(vocab_size: int) -> int:
    """Tokens that are no special ones, of a large or a small vocabulary."""
    return min(300, vocab_size // 4)


def _json(result: report.Result) -> dict[str, object]:
    seen = asdict(result.seen)
    outcomes = seen.pop("outcomes")
    violations = [*map(asdict, result.verdict.violations), *seen.pop("violations")]
    verdict_fields = asdict(result.verdict)
    verdict_fields.pop("violations")
    return {
        "setting": result.setting,
        "ok": result.ok,
        "num_requests": len(outcomes),
        **verdict_fields,
        **{key: value for key, value in seen.items() if key != "strikes"},
        "violations": violations,
        "folder": "" if result.ok else result.folder,
    }


if __name__ == "__main__":
    main()
