"""`hexgen2 simulate`: what it prints, refuses and writes."""

import csv
import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from hexgen2.cli.main import main
from hexgen2.placement import load_placement, to_yaml
from hexgen2.scheduler.schedule import schedule


def simulate(*args: object) -> Result:
    return CliRunner().invoke(main, ["simulate", *map(str, args)])


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "plan.yaml"
    path.write_text(to_yaml(schedule("paper-setting-4", "llama-2-70b", "hphd", kind="disaggregated", evaluations=50)))
    return path


def test_a_report_stands_beside_the_plan(plan: Path) -> None:
    result = simulate(plan, "--requests", 300, "--slo-ttft", 5, "--slo-tpot", 0.5)
    assert result.exit_code == 0, result.output
    assert "300 of 300 requests served" in result.output
    for word in ("TTFT", "TPOT", "goodput", "$ per million output tokens", "prefill-0", "decode-0"):
        assert word in result.output


def test_the_same_seed_gives_the_same_report(plan: Path) -> None:
    one, two, other = (simulate(plan, "--requests", 200, "--seed", seed, "--json") for seed in (3, 3, 4))
    assert one.output == two.output != other.output
    found = json.loads(one.output)
    assert found["finished"] == 200
    assert found["plan"]["throughput_rps"] > found["throughput_rps"] * 0.5


def test_a_lost_replica_costs_requests_or_time(plan: Path, tmp_path: Path) -> None:
    events = tmp_path / "events.yaml"
    events.write_text(
        "events:\n- {at_s: 10, what: lost, replica: decode-0}\n- {at_s: 40, what: back, replica: decode-0}\n"
    )
    found = json.loads(simulate(plan, "--requests", 400, "--events", events, "--json").output)
    assert found["failed"].get("replica lost", 0) > 0
    assert found["finished"] + sum(found["failed"].values()) == 400


def test_a_sweep_writes_a_table_and_pictures(plan: Path, tmp_path: Path) -> None:
    args = ("--requests", 100, "--slo-ttft", 2, "--sweep", "rate=1,2", "--sweep", "codec=none,int8", "-o", tmp_path)
    assert simulate(plan, *args).exit_code == 0
    rows = list(csv.DictReader((tmp_path / "sweep.csv").read_text().splitlines()))
    assert [(row["rate"], row["codec"]) for row in rows] == [("1", "none"), ("1", "int8"), ("2", "none"), ("2", "int8")]
    assert all(float(row["throughput_rps"]) > 0 for row in rows)
    assert {path.name for path in tmp_path.iterdir()} == {"sweep.csv", "sweep.svg", "pareto.svg"}


def test_a_plan_of_another_cluster_or_model_is_told_by_line(plan: Path, tmp_path: Path) -> None:
    told = simulate(plan, "--cluster", "paper-setting-5").output
    assert "plan.yaml:" in told
    assert "replicas.0.stages.0.machine: cluster paper-setting-5 has no" in told
    told = simulate(plan, "--model", "opt-30b").output
    assert "80 layers; opt-30b has 48" in told
    data = load_placement(plan)
    wrong = data.model_copy(update={"routes": (data.routes[0].model_copy(update={"decode": "decode-9"}),)})
    path = tmp_path / "plan.yaml"
    path.write_text(to_yaml(wrong))
    assert "routes.0.decode: the plan has no decode replica `decode-9`" in simulate(path).output


def test_a_model_that_does_not_fit_is_told(plan: Path) -> None:
    told = simulate(plan, "--weight-dtype", "float32").output
    assert "does not fit" in told


def test_options_that_exclude_each_other(plan: Path) -> None:
    assert "give one of them" in simulate(plan, "--rate", 1, "--offline").output
    assert "no axis `rats`; did you mean `rate`?" in simulate(plan, "--sweep", "rats=1").output
    assert "PLAN is needed" in simulate().output
