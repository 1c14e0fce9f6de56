"""``hexgen2 plan`` and ``hexgen2 bench`` as a person runs them."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from hexgen2.cli.main import main
from hexgen2.placement import load_placement


def run(*args: str) -> Result:
    return CliRunner().invoke(main, list(args))


def planned(*args: str) -> Result:
    return run("plan", "paper-setting-4", "--model", "llama-2-70b", "--evaluations", "100", *args)


def test_the_example_files_can_be_planned(tmp_path: Path) -> None:
    made = run("plan", "--example", str(tmp_path))
    assert made.exit_code == 0, made.output
    cluster, workload, out = (str(tmp_path / name) for name in ("cluster.yaml", "workload.yaml", "plan.yaml"))
    found = run("plan", cluster, "--model", "llama-3.1-8b", "--workload", workload, "-o", out, "--evaluations", "100")
    assert found.exit_code == 0, found.output
    assert "requests/s" in found.output
    assert "bound" in found.output
    plan = load_placement(tmp_path / "plan.yaml")
    assert plan.throughput_rps > 0
    assert plan.model == "llama-3.1-8b"


def test_json_is_the_plan_and_nothing_else() -> None:
    plan = json.loads(planned("--json").stdout)
    assert plan["strategy"] == "hexgen2"
    assert {"replicas", "routes", "bound_rps", "gap", "seed"} <= plan.keys()


def test_the_report_is_one_page_that_fetches_nothing(tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    found = planned("--report", str(page), "--kind", "disaggregated")
    assert found.exit_code == 0, found.output
    text = page.read_text(encoding="utf-8")
    assert "<svg" in text
    assert "+1 H100-SXM" in text
    assert "Runners-up" in text
    assert "<script" not in text
    assert 'src="' not in text


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("nowhere.yaml", "--model", "llama-2-70b"), "nowhere.yaml: No such file"),
        (("paper-baseline", "--model", "lama-2-70b"), "did you mean `llama-2-70b`"),
        (("paper-baseline", "--model", "llama-2-70b", "--workload", "hpxd"), "workload"),
        (("workstation", "--model", "llama-2-70b"), "GB usable"),
        (("paper-setting-4", "--model", "llama-2-70b", "--strategy", "distserve"), "plans for one kind of GPU"),
        (("paper-setting-4", "--model", "llama-2-70b", "--target-slo", "1:0.1"), "this workload has no rate"),
        (("paper-setting-4",), "--model are needed"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(args: tuple[str, ...], told: str) -> None:
    found = run("plan", *args)
    assert found.exit_code != 0
    assert told in found.output
    assert "Traceback" not in found.output


def test_speed_is_told_as_rows() -> None:
    rows = json.loads(run("bench", "scheduler", "--gpus", "16", "--evaluations", "50", "--json").stdout)
    assert [row["num_gpus"] for row in rows] == [16]
    assert rows[0]["throughput_rps"] <= rows[0]["bound_rps"]
    assert rows[0]["seconds"] > 0
