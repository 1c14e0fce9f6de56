"""The plan of a mixed cluster against what one might do without a planner, on real processes with emulated engines.

Each engine takes as long for a step as the cost model says of its device; gateway, coordinator, workers, hand-over and
routing are the real ones. A closed loop keeps the bottleneck busy. Run from the root of the tree::

    python -m benchmarks.mixed --workload prefill-heavy
"""

import asyncio
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import yaml

from benchmarks.mixed import setting
from benchmarks.mixed.load import Load, Measured, measure
from hexgen2.cli.fleet import Fleet
from hexgen2.cli.fleet_config import FleetConfig, default_model
from hexgen2.placement import Placement, to_yaml
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


def ways(made: Problem) -> dict[str, Placement]:
    """The plan, and the guesses."""
    found = solve(made, evaluations=EVALUATIONS)
    longest = max(point.prompt_tokens for point in made.workload.lengths)
    return {PLAN: completed(Planned(found, made, longest)), **setting.guesses(made)}


async def run(made: Problem, way: str, placement: Placement, tokenizer: Path, warm_s: float, measure_s: float) -> Row:
    """One fleet from start to end."""
    prompt, output = setting.WORKLOADS[made.workload.name]
    in_flight = setting.in_flight(made, placement)
    with tempfile.TemporaryDirectory(prefix="hexgen2-") as name:
        folder = Path(name)
        (folder / "plan.yaml").write_text(to_yaml(placement), encoding="utf-8")
        (folder / "cluster.yaml").write_text(yaml.safe_dump(dict(setting.CLUSTER)), encoding="utf-8")
        work = {"name": made.workload.name, "prompt_tokens": prompt, "output_tokens": output}
        work["slo"] = {"tpot_s": setting.TPOT_S}
        (folder / "workload.yaml").write_text(yaml.safe_dump(work), encoding="utf-8")
        engine = {"kind": "emulated", "num_layers": 1, "num_kv_heads": 1, "max_num_seqs": 256}
        config = FleetConfig.model_validate(
            {
                "plan": folder / "plan.yaml",
                "cluster": str(folder / "cluster.yaml"),
                "workload": str(folder / "workload.yaml"),
                "engine": engine,
                "tokenizer": tokenizer,
                "kv": {"transport": "tcp"},
                "drain_s": 2,
                **dict.fromkeys(("listen", "http_listen", "coordinator"), "127.0.0.1:0"),
            }
        )
        async with Fleet(config, folder / "run") as fleet:
            fleet.hurry.set()
            load = Load(prompt, output, in_flight, warm_s, measure_s, setting.TPOT_S)
            measured = await measure([fleet.grpc_address], load)
    return Row(made.workload.name, way, roles(placement), in_flight, placement.throughput_rps, measured)


def roles(placement: Placement) -> str:
    """Which kinds do what: ``CCCB | BB`` is prefill and decode apart, ``+`` before replicas that do both."""
    kinds: Mapping[str, list[str]] = {"prefill": [], "decode": [], "colocated": []}
    for replica in placement.replicas:
        kinds[replica.role].append(replica.stages[0].gpu)
    apart = " | ".join("".join(sorted(kinds[role], reverse=True)) for role in ("prefill", "decode"))
    whole = "".join(sorted(kinds["colocated"], reverse=True))
    return (apart if kinds["prefill"] else "") + (f" + {whole}" if whole else "")


@click.command()
@click.option("--workload", "names", multiple=True, type=click.Choice(list(setting.WORKLOADS)), help="Default: both.")
@click.option("--way", "wanted", multiple=True, help="Which ones; default: all.")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="A model folder; default: the default model's.")
@click.option("--warm", "warm_s", default=30.0, show_default=True, help="Seconds before the window.")
@click.option("--measure", "measure_s", default=45.0, show_default=True, help="Seconds of the window.")
@click.option("--predict", is_flag=True, help="Only say what is predicted.")
@click.option("--keep", type=click.Path(path_type=Path), help="A file that rows are kept in, for parts run one by one.")
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON.")
def main(
    names: tuple[str, ...],
    wanted: tuple[str, ...],
    tokenizer: Path | None,
    warm_s: float,
    measure_s: float,
    predict: bool,
    keep: Path | None,
    as_json: bool,
) -> None:
    """Measure each way to use the cluster under each workload."""
    rows = [] if keep is None or not keep.exists() else read(keep)
    for name in names or tuple(setting.WORKLOADS):
        made = setting.problem(name)
        for way, placement in ways(made).items():
            if wanted and way not in wanted:
                continue
            told = f"{name:14} {way:14} {roles(placement):14}"
            if predict:
                click.echo(f"{told} {placement.throughput_rps:.3f}/s, {setting.in_flight(made, placement)} in flight")
                continue
            click.echo(f"{told} ...", err=True)
            row = asyncio.run(run(made, way, placement, tokenizer or default_model(), warm_s, measure_s))
            click.echo(f"{told} {row.measured.throughput_rps:.3f}/s", err=True)
            rows = [each for each in rows if (each.workload, each.way) != (name, way)] + [row]
            if keep is not None:
                keep.write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")
    if as_json:
        click.echo(json.dumps([asdict(row) | {"error": row.error} for row in rows], indent=1))
    elif rows:
        table(rows)


def read(file: Path) -> list[Row]:
    """Rows that were kept."""
    return [Row(**{**row, "measured": Measured(**row["measured"])}) for row in json.loads(file.read_text("utf-8"))]


def table(rows: list[Row]) -> None:
    """For people."""
    names = ("predicted/s", "measured/s", "in limits/s", "TTFT s", "TPOT s", "failed", "plan / it")
    click.echo(f"{'workload':15}{'way':15}{'prefill | decode':18}" + "".join(f"{name:>13}" for name in names))
    for row in rows:
        plan = next((each for each in rows if (each.workload, each.way) == (row.workload, PLAN)), None)
        seen = row.measured
        ratio = plan.measured.goodput_rps / seen.goodput_rps if plan and seen.goodput_rps else float("inf")
        click.echo(
            f"{row.workload:15}{row.way:15}{row.roles:18}{row.predicted_rps:13.3f}{seen.throughput_rps:13.3f}"
            f"{seen.goodput_rps:13.3f}{seen.ttft_s:13.2f}{seen.tpot_s:13.3f}{seen.num_failed:13}{ratio:13.2f}"
        )


if __name__ == "__main__":
    main()
