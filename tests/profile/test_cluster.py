"""A profile's cluster.yaml: the planner takes it, it says what was measured, and machines are put together."""

from pathlib import Path

import pytest
import yaml

from hexgen2.cluster import HostTimes, Reached
from hexgen2.cluster_file import load_cluster
from hexgen2.errors import ConfigError
from hexgen2.profile.cluster import MeasuredDevice, MeasuredLink, document, read_before, to_yaml
from hexgen2.scheduler.efficiency import efficiency, engine

REACHED = Reached(compute=0.9, gemm_s=2e-6)
A100 = MeasuredDevice("NVIDIA A100-SXM4-80GB", 2, 80 << 30, 2.5e14, 1.7e12, REACHED, HostTimes(step_s=0.001))
CORE = MeasuredDevice("cpu", 4, 2 << 30, 5e10, 1e10, REACHED, HostTimes())


def test_the_planner_takes_it_with_what_was_measured(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(to_yaml(document("one", [A100], [], about="")))
    cluster = load_cluster(tmp_path / "c.yaml")
    gpu = cluster.gpu_type("A100-SXM")
    assert (gpu.flops, cluster.machines[0].gpus) == (2.5e14, (("A100-SXM", 2),))
    assert efficiency(gpu).compute == 0.9
    assert engine("measured-2023").host(gpu).step_s == 0.001
    # What cannot be measured is the catalog's, and the file says so.
    assert gpu.price_per_hour == 1.69
    entry = yaml.safe_load((tmp_path / "c.yaml").read_text())["gpu_types"]["A100-SXM"]
    assert "flops" in entry["measured"]
    assert "price_per_hour" not in entry["measured"]


def test_machines_and_the_link_between_them_are_put_together(tmp_path: Path) -> None:
    first = to_yaml(document("one", [A100], [], about=""))
    link = MeasuredLink("one", 1.2e9, 5e-5, "tcp")
    (tmp_path / "c.yaml").write_text(to_yaml(document("two", [CORE], [link], about="", before=read_before(first, "c"))))
    cluster = load_cluster(tmp_path / "c.yaml")
    one, two = cluster.machines
    assert (one.name, two.name) == ("one", "two")
    assert cluster.bandwidth(one, two) == 1.2e9
    assert cluster.latency(one, two) == 5e-5


def test_a_machine_profiled_again_replaces_itself() -> None:
    first = document("one", [A100], [], about="")
    again = document("one", [CORE], [], about="", before=first)
    assert [machine["gpus"] for machine in again["machines"]] == [{"cpu": 4}]


def test_a_link_to_a_machine_that_is_not_there_tells_of_the_card() -> None:
    found = document("one", [CORE], [MeasuredLink("far", 1e8, 1e-3, "tcp")], about="")
    assert found["machines"][0]["nic"]["bandwidth_bytes_per_s"] == 1e8
    assert "far" in found["machines"][0]["nic"]["measured"]


def test_what_is_no_cluster_is_not_merged_with() -> None:
    with pytest.raises(ConfigError, match=r"^c\.yaml: machines"):
        read_before("name: none\n", "c.yaml")
