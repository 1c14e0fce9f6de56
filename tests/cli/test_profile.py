"""hexgen2 profile: this machine as the planner takes it."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from hexgen2.cli import profile
from hexgen2.cli.main import main
from hexgen2.cluster_file import load_cluster
from tests.cli.test_doctor import served


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "DEVICE_S", 0.1)


@pytest.mark.timeout(120)
def test_an_engine_and_a_link_are_measured_and_planned_with(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    with served() as address:
        options = ["-o", str(file), "--engine", "emulated", "--name", "here", "--peer", f"there={address}", "--json"]
        result = CliRunner().invoke(main, ["profile", *options])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["fit"]["median"] >= 0
    (machine,) = load_cluster(file).machines
    assert (machine.name, machine.gpus[0][0]) == ("here", "cpu")
    assert machine.nic_bandwidth_bytes_per_s > 1e6


def test_a_peer_that_is_not_there_is_told_with_what_to_do(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["profile", "-o", str(tmp_path / "c.yaml"), "--peer", "there=127.0.0.1:1"])
    assert result.exit_code == 1
    assert "hexgen2 doctor --serve" in result.output
    assert not (tmp_path / "c.yaml").exists()
