"""``hexgen2 profile``: measure this machine's devices, engine and links, and write them as a cluster.yaml."""

import asyncio
import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from hexgen2 import llm as llms
from hexgen2.cli.fleet_config import default_model
from hexgen2.cluster import GpuType
from hexgen2.config import EmulatedEngineConfig, VllmEngineConfig, WorkerConfig
from hexgen2.devices import here
from hexgen2.doctor import links
from hexgen2.errors import ConfigError
from hexgen2.llm import Llm
from hexgen2.profile import cluster
from hexgen2.profile.cluster import MeasuredDevice, MeasuredLink
from hexgen2.profile.device import DeviceFigures
from hexgen2.profile.fit import PROFILE, Fitted

#: Of measuring one device by itself.
DEVICE_S = 6.0
TORCH, VLLM, EMULATED = "torch", "vllm", "emulated"


@click.command("profile")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="Write the cluster.yaml here.",
)
@click.option(
    "--engine",
    type=click.Choice((TORCH, VLLM, EMULATED)),
    default=TORCH,
    show_default=True,
    help="What steps are timed with; torch: the device alone, in seconds.",
)
@click.option("--model", type=click.Path(path_type=Path), help="A model's folder; default: the default model's.")
@click.option("--dtype", type=click.Choice(("float32", "bfloat16", "float16")), help="Default: the model's as served.")
@click.option("--name", default="", help="Of this machine in the file; default: its host name.")
@click.option(
    "--peer",
    "peers",
    multiple=True,
    metavar="NAME=HOST:PORT",
    help="Measure the link to a machine where `hexgen2 doctor --serve` runs; may be repeated.",
)
@click.option(
    "--merge",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A cluster.yaml with the other machines, each profiled there.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def profile_command(
    output: Path,
    engine: str,
    model: Path | None,
    dtype: str | None,
    name: str,
    peers: Sequence[str],
    merge: Path | None,
    as_json: bool,
) -> None:
    """Measure this machine, and its links to others, as the planner takes them.

    Every entry of the file says which of its numbers were measured; the others are the catalog's. Machines are put
    together one after the other: profile each with --merge and the file so far.

    \b
      hexgen2 profile -o cluster.yaml --engine vllm
      hexgen2 plan cluster.yaml --model ~/.cache/hexgen2/models/SmolLM2-135M-Instruct --engine as-measured
    """
    before = cluster.read_before(merge.read_text(encoding="utf-8"), str(merge)) if merge else None
    ways = [_peer(each) for each in peers]
    folder = model or default_model()
    # As served: workers on a CPU take float32, those on GPUs the model's own, which is 16 bits wide.
    chosen = dtype or ("bfloat16" if here().gpus else "float32")
    bar = Progress(
        TextColumn("{task.description:<44}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        disable=not Console(stderr=True).is_terminal,
    )
    with bar:
        task = bar.add_task("devices", total=1.0)

        def show(what: str, part: float) -> None:
            bar.update(task, description=what, completed=part)

        devices, error = measure_devices(engine, folder, chosen, show)
        found_links = []
        for number, (peer, address) in enumerate(ways):
            show(f"link to {peer}", number / len(ways))
            figures = links.measure_kv(address)
            found_links.append(MeasuredLink(peer, figures.bandwidth_bytes_per_s, figures.latency_s, figures.transport))
        show("done", 1.0)
    about = (
        f"Measured by `hexgen2 profile` on {time.strftime('%Y-%m-%d')} with {engine}, {chosen}. Plan with --engine "
        f"{PROFILE}. What `measured` does not name is the catalog's."
    )
    content = cluster.document(name or platform.node(), devices, found_links, about=about, before=before)
    try:
        output.write_text(cluster.to_yaml(content), encoding="utf-8")
    except OSError as problem:
        raise ConfigError(f"{output}: {problem.strerror}") from problem
    if as_json:
        click.echo(json.dumps({"cluster": content, "fit": error}, indent=2))
        return
    Console().print(_table(devices, found_links))
    if error:
        click.echo(
            f"the planner foretells the engine's measured times to {error['median']:.0%} (median), "
            f"{error['largest']:.0%} at most"
        )
    click.echo(f"wrote {output}")


def measure_devices(
    engine: str, folder: Path, dtype: str, show: Any
) -> tuple[list[MeasuredDevice], dict[str, float] | None]:
    """Of this machine, alike ones together; with the errors of the fit where an engine was timed."""
    # Imports torch.
    from hexgen2.profile import device, fit

    names = device.devices()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0))
    found: list[DeviceFigures] = []
    for number, each in enumerate(names):
        show(f"device {each}", number / len(names))
        found.append(device.measure(each, dtype, memory // cores, DEVICE_S))
    counts = {"cpu": cores} if names == ("cpu",) else {figures.name: 0 for figures in found}
    for figures in found if names != ("cpu",) else []:
        counts[figures.name] += 1
    fitted: dict[str, Fitted] = {}
    if engine != TORCH:
        if len(counts) > 1:
            raise ConfigError(
                f"--engine {engine}: this machine has {', '.join(counts)}: show one kind at a time to it "
                "(CUDA_VISIBLE_DEVICES), and put the files together with --merge"
            )
        show("engine: starting", 0.0)
        fitted[found[0].name] = _with_engine(engine, folder, dtype, found[0], show)
    devices = []
    for name, count in counts.items():
        figures = next(each for each in found if each.name == name)
        flops, bandwidth = figures.flops, figures.memory_bandwidth_bytes_per_s
        if name in fitted:
            flops, bandwidth = fitted[name].flops, fitted[name].memory_bandwidth_bytes_per_s
            reached, host = fitted[name].reached, fitted[name].host
        else:
            reached, host = fit.from_device(figures, cluster.catalog_name(name))
        devices.append(MeasuredDevice(name, count, figures.memory_bytes, flops, bandwidth, reached, host))
    one = next(iter(fitted.values()), None)
    return devices, {"median": one.median_error, "largest": one.largest_error} if one else None


def _with_engine(engine: str, folder: Path, dtype: str, figures: DeviceFigures, show: Any) -> Fitted:
    from hexgen2.profile import engine as timing
    from hexgen2.profile import fit

    config, llm = _worker(engine, folder, dtype)
    times = asyncio.run(timing.measure(config, show))
    kind = GpuType(
        name=figures.name,
        flops=figures.flops,
        memory_bytes=figures.memory_bytes,
        memory_bandwidth_bytes_per_s=figures.memory_bandwidth_bytes_per_s,
        link_bandwidth_bytes_per_s=1e9,
        link_latency_s=0.0,
    )
    return fit.from_engine(figures, times, llm, kind)


def _worker(engine: str, folder: Path, dtype: str) -> tuple[WorkerConfig, Llm]:
    """The worker whose engine is timed, and its model as the planner sees it."""
    if engine == EMULATED:
        emulated = EmulatedEngineConfig()
        llm = Llm(
            name=emulated.name,
            num_layers=emulated.num_layers,
            hidden_size=emulated.num_kv_heads * emulated.head_dim,
            num_heads=emulated.num_kv_heads,
            num_kv_heads=emulated.num_kv_heads,
            head_dim=emulated.head_dim,
            intermediate_size=4 * emulated.num_kv_heads * emulated.head_dim,
            vocab_size=emulated.vocab_size,
            max_position_embeddings=emulated.max_model_len,
            weight_dtype="float32",
            kv_dtype="float32",
        )
        return WorkerConfig(role="decode", engine=emulated), llm
    if not folder.exists():
        raise ConfigError(f"model: no folder {folder}: give --model, or make the default's: hexgen2 model prepare")
    llm = llms.find(folder, weight_dtype=dtype, kv_dtype=dtype)
    return WorkerConfig(role="decode", engine=VllmEngineConfig.model_validate({"model": folder, "dtype": dtype})), llm


def _peer(text: str) -> tuple[str, str]:
    name, equals, address = text.partition("=")
    if not (name and equals and address):
        raise ConfigError(f"--peer {text}: expected NAME=HOST:PORT")
    return name, address


def _table(devices: Sequence[MeasuredDevice], found_links: Sequence[MeasuredLink]) -> Table:
    table = Table("", "compute", "memory", "fixed", "", box=None, padding=(0, 2, 0, 0))
    for each in devices:
        table.add_row(
            f"{each.count} x {each.driver_name}",
            f"{each.flops / 1e12:.4g} TFLOP/s",
            f"{each.memory_bandwidth_bytes_per_s / 1e9:.4g} GB/s",
            f"{each.reached.gemm_s * 1e6:.3g} us a product",
            f"{each.memory_bytes / (1 << 30):.1f} GiB",
        )
    for link in found_links:
        table.add_row(
            f"to {link.peer}",
            f"{link.bandwidth_bytes_per_s / 1e9:.3g} GB/s",
            f"{link.latency_s * 1e6:.0f} us",
            link.transport,
            "",
        )
    return table
