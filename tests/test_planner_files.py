"""Files to start from and published schemas."""

import json
from pathlib import Path

import pytest

from hexgen2 import schemas
from hexgen2.cluster_file import load_cluster
from hexgen2.errors import ConfigError
from hexgen2.planner_examples import write_examples
from hexgen2.workload_file import load_workload
from tests.placements import placement, planned_replica, stage

DOCS = Path(__file__).resolve().parents[1] / "docs" / "schemas"


@pytest.mark.parametrize("name", schemas.FILES)
def test_published_schemas_are_those_of_the_code(name: str) -> None:
    assert (DOCS / name).read_text() == schemas.schema(name), "run: python -m hexgen2.schemas"
    assert json.loads(schemas.schema(name))["additionalProperties"] is False


def test_examples_can_be_read_as_they_are(tmp_path: Path) -> None:
    cluster, workload = write_examples(tmp_path / "new")
    assert load_cluster(cluster).num_gpus == 16
    assert load_workload(workload).ttft_s == 5.0


def test_what_is_commented_out_in_the_example_can_be_used(tmp_path: Path) -> None:
    cluster, _ = write_examples(tmp_path)
    lines = cluster.read_text().splitlines()
    start = lines.index("# gpu_types:")
    used = [line.removeprefix("# ") if start <= number < start + 8 else line for number, line in enumerate(lines)]
    cluster.write_text("\n".join(used).replace("{A6000: 4}", "{my-gpu: 4}"))
    assert load_cluster(cluster).gpu_type("my-gpu").flops == 200e12


def test_examples_overwrite_nothing(tmp_path: Path) -> None:
    write_examples(tmp_path)
    with pytest.raises(ConfigError, match=r"cluster.yaml: is there already"):
        write_examples(tmp_path)


def test_workers_need_rdma_where_both_ends_of_a_route_between_machines_were_planned_with_it() -> None:
    plan = placement(
        planned_replica("p", "prefill", stage(machine="a")),
        planned_replica("q", "prefill", stage(machine="b")),
        planned_replica("d", "decode", stage(machine="b")),
        planned_replica("e", "decode", stage(machine="c")),
        routes=(("p", "d", 1.0), ("q", "d", 1.0), ("q", "e", 1.0)),
    )
    assert not any(plan.needs_rdma(each.id) for each in plan.replicas)
    planned = plan.model_copy(update={"rdma": ("a", "b")})
    assert [each.id for each in planned.replicas if planned.needs_rdma(each.id)] == ["p", "d"]
