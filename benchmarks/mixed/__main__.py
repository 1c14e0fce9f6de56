"""The plan of a mixed cluster against what one might do without a planner, on real processes.

``--engine emulated``: each engine takes as long for a step as the cost model says of its device; gateway, coordinator,
workers, hand-over and routing are the real ones. ``--engine vllm``: vLLM itself, on unlike shares of this machine's
cores, each machine behind a shaped link (for root only). A closed loop keeps the bottleneck busy. Run from the root of
the tree::

    python -m benchmarks.mixed --workload prefill-heavy
    hexgen2 profile -o cluster.yaml --engine vllm; python -m benchmarks.mixed --engine vllm --profile cluster.yaml
"""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from benchmarks.mixed import fleets, on_cpu
from benchmarks.mixed.by_hand import guesses
from benchmarks.mixed.load import Load, Measured, measure
from benchmarks.mixed.setting import EMULATED, Setting, in_flight
from hexgen2.bench import netns
from hexgen2.cli.fleet_config import default_model
from hexgen2.placement import Placement
from hexgen2.scheduler.problem import Problem
from hexgen2.scheduler.schedule import solve
from hexgen2.simulator.planned import Planned
from hexgen2.simulator.settings import completed

EVALUATIONS = 400
PLAN = "plan"


@dataclass(frozen=True, slots=True)
class Row:
    """One way to use the machines."""

    workload: str
    way: str
    roles: str
    in_flight: int
    predicted_rps: float
    measured: Measured

    @property
    def error(self) -> float:
        """Of the prediction."""
        return self.predicted_rps / self.measured.throughput_rps - 1 if self.measured.throughput_rps else 0.0


def ways(setting: Setting, made: Problem) -> dict[str, Placement]:
    """The plan, and the guesses."""
    found = solve(made, evaluations=EVALUATIONS)
    longest = made.workload.longest_prompt_tokens
    return {PLAN: completed(Planned(found, made, longest)), **guesses(setting, made)}


async def run(made: Problem, way: str, placement: Placement, fleet: fleets.Fleets, load: Load) -> Row:
    """One way, in a fleet that is made for it or follows it from now on."""
    async with fleet.serving(made, placement) as address:
        measured = await measure([address], load)
    return Row(made.workload.name, way, roles(placement), load.in_flight, placement.throughput_rps, measured)


def roles(placement: Placement) -> str:
    """Which kinds do what: ``CCCB | BB`` is prefill and decode apart, ``+`` before replicas that do both."""
    kinds: Mapping[str, list[str]] = {"prefill": [], "decode": [], "colocated": []}
    for replica in placement.replicas:
        kinds[replica.role].append(replica.stages[0].gpu.removeprefix("cpu-"))
    join = "".join if all(len(kind) == 1 for found in kinds.values() for kind in found) else " ".join
    apart = " | ".join(join(sorted(kinds[role], reverse=True)) for role in ("prefill", "decode"))
    whole = join(sorted(kinds["colocated"], reverse=True))
    return (apart if kinds["prefill"] else "") + (f" + {whole}" if whole else "")


@click.command()
@click.option("--engine", type=click.Choice(("emulated", "vllm")), default="emulated", show_default=True)
@click.option(
    "--profile", type=click.Path(path_type=Path, exists=True), help="With vllm: what `hexgen2 profile` wrote."
)
@click.option("--workload", "names", multiple=True, type=click.Choice(list(EMULATED.workloads)), help="Default: both.")
@click.option("--way", "wanted", multiple=True, help="Which ones; default: all.")
@click.option("--model", type=click.Path(path_type=Path), help="A model's folder; default: the default one's.")
@click.option("--warm", "warm_s", default=30.0, show_default=True, help="Seconds before the window.")
@click.option("--measure", "measure_s", default=45.0, show_default=True, help="Seconds of the window.")
@click.option("--predict", is_flag=True, help="Only say what is predicted.")
@click.option("--keep", type=click.Path(path_type=Path), help="A file that rows are kept in, for parts run one by one.")
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON.")
def main(
    engine: str,
    profile: Path | None,
    names: tuple[str, ...],
    wanted: tuple[str, ...],
    model: Path | None,
    warm_s: float,
    measure_s: float,
    predict: bool,
    keep: Path | None,
    as_json: bool,
) -> None:
    """Measure each way to use the cluster under each workload."""
    model = model or default_model()
    setting, fleet = EMULATED, fleets.Fleets(EMULATED, model)
    if engine == "vllm":
        if profile is None:
            raise click.UsageError("--engine vllm: give --profile")
        setting = on_cpu.setting(profile, model)
        if not predict:
            if why := netns.why_not():
                raise click.UsageError(f"--engine vllm: no network namespaces here: {why}")
            netns.enter()
        fleet = fleets.OneFleet(setting, model)
    rows = [] if keep is None or not keep.exists() else read(keep)

    async def measure_all() -> list[Row]:
        found = list(rows)
        async with fleet:
            for name in names or tuple(setting.workloads):
                made = setting.problem(name)
                for way, placement in ways(setting, made).items():
                    if wanted and way not in wanted:
                        continue
                    told, at_once = f"{name:14} {way:14} {roles(placement):22}", in_flight(made, placement)
                    if predict:
                        click.echo(f"{told} {placement.throughput_rps:.3f}/s, {at_once} in flight")
                        continue
                    click.echo(f"{told} ...", err=True)
                    load = Load(*setting.workloads[name], at_once, warm_s, measure_s, setting.tpot_s)
                    row = await run(made, way, placement, fleet, load)
                    click.echo(f"{told} {row.measured.throughput_rps:.3f}/s", err=True)
                    found = [each for each in found if (each.workload, each.way) != (name, way)] + [row]
                    if keep is not None:
                        write(keep, found)
        return found

    rows = asyncio.run(measure_all())
    if as_json:
        click.echo(json.dumps([asdict(row) | {"error": row.error} for row in rows], indent=1))
    elif rows:
        table(rows)


def read(file: Path) -> list[Row]:
    """Rows that were kept."""
    return [Row(**{**row, "measured": Measured(**row["measured"])}) for row in json.loads(file.read_text("utf-8"))]


def write(file: Path, rows: list[Row]) -> None:
    """Keep rows."""
    file.write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")


def table(rows: list[Row]) -> None:
    """For people."""
    names = ("predicted/s", "measured/s", "in limits/s", "TTFT s", "TPOT s", "failed", "plan / it")
    click.echo(f"{'workload':15}{'way':15}{'prefill | decode':24}" + "".join(f"{name:>13}" for name in names))
    for row in rows:
        plan = next((each for each in rows if (each.workload, each.way) == (row.workload, PLAN)), None)
        seen = row.measured
        ratio = plan.measured.goodput_rps / seen.goodput_rps if plan and seen.goodput_rps else float("inf")
        click.echo(
            f"{row.workload:15}{row.way:15}{row.roles:24}{row.predicted_rps:13.3f}{seen.throughput_rps:13.3f}"
            f"{seen.goodput_rps:13.3f}{seen.ttft_s:13.2f}{seen.tpot_s:13.3f}{seen.num_failed:13}{ratio:13.2f}"
        )


if __name__ == "__main__":
    main()
