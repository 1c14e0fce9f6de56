"""``hexgen2 bench kv`` measures real hand-overs between real processes; what it finds is the machine's business."""

import json

import pytest
from click.testing import CliRunner

from hexgen2.bench import kv
from hexgen2.bench.kv_measure import Row
from hexgen2.cli.bench_kv import bench_kv


@pytest.mark.slow
def test_rows_for_every_stage_and_codec() -> None:
    options = ["--transport", "tcp", "--codec", "int8", "--mib", "4", "--repeat", "1", "--no-shaped", "--json"]
    done = CliRunner().invoke(bench_kv, options, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)
    assert [(row["stage"], row["codec"]) for row in rows] == [
        ("protocol", "none"),
        ("gather", "none"),
        ("digest", "none"),
        ("digest", "int8"),
        ("exposed", "none"),
    ]
    assert {(row["transport"], row["bytes"], row["routes"]) for row in rows} == {("tcp", 4 << 20, 1)}
    assert all(row["gb_per_s"] > 0 and row["raw_gb_per_s"] > 0 for row in rows)


def test_targets_are_those_of_the_row() -> None:
    row = Row("ucx (cma/memory)", "none", "gather", 1, 1.0, 2.0, 0.5, "this machine", 1)
    assert kv.target(row) == 0.6
    assert kv.target(Row("tcp", "int8", "digest", 1, 1.0, 2.0, 0.5, "1 Gbit/s", 1)) == kv.INT8_TARGET
    assert kv.target(Row("tcp", "none", "digest", 1, 1.0, 2.0, 0.5, "5 Gbit/s", 1)) == kv.SHAPED_TARGET
    assert kv.target(Row("tcp", "none", "digest", 1, 1.0, 2.0, 0.5, "5 Gbit/s x 2", 2)) == kv.TWO_ROUTES_TARGET
    assert kv.target(Row("tcp", "int4", "digest", 1, 1.0, 2.0, 0.5, "this machine", 1)) is None
