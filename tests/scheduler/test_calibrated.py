"""Devices as slow as a running plan's were: the cost model then says what was measured."""

import json
from pathlib import Path

import pytest
from google.protobuf.json_format import MessageToDict

from hexgen2 import llm as llms
from hexgen2.calibration import Calibration, Ratio, Term
from hexgen2.calibration_file import load_calibration
from hexgen2.cluster_file import find_cluster
from hexgen2.device_factors import device_factors, further
from hexgen2.errors import ConfigError
from hexgen2.placement import to_json
from hexgen2.rpc.calibration_convert import calibration_to_proto
from hexgen2.scheduler.calibrated import calibrated
from hexgen2.scheduler.cost_model import CostModel, even_stages
from hexgen2.scheduler.efficiency import engine
from hexgen2.v1 import coordinator_pb2
from hexgen2.workload_file import find_workload
from tests.placements import mixed

OFF = Calibration(
    (Ratio("p", Term.PREFILL, 1.5, 20), Ratio("d", Term.DECODE, 2.0, 20), Ratio("gone", Term.DECODE, 9.0, 20)),
    True,
    "x",
)


@pytest.mark.parametrize("profile", ["measured-2023", "assumed-cuda-graphs"])
def test_the_cost_model_says_what_was_measured(profile: str) -> None:
    cluster, llm, work = find_cluster("three-machines"), llms.find("llama-2-13b"), find_workload("hphd")
    slower = calibrated(cluster, device_factors(mixed(), OFF), engine(profile))
    before, after = (CostModel(llm, work, each.gpu_types, engine(profile)) for each in (cluster, slower))
    stages = even_stages(llm, cluster.gpu_type("A100-SXM"))
    # The engine's own time before a prefill is no device's, and is left as it is.
    assert after.prefill_s(stages, 2000) / before.prefill_s(stages, 2000) == pytest.approx(1.5, rel=0.06)
    assert after.decode_step_s(stages, 8, 1000) / before.decode_step_s(stages, 8, 1000) == pytest.approx(2.0, rel=0.06)
    assert slower.gpu_type("A6000") == cluster.gpu_type("A6000")


def test_it_is_read_from_what_status_prints(tmp_path: Path) -> None:
    answer = coordinator_pb2.GetPlanResponse(plan_json=to_json(mixed()), calibration=calibration_to_proto(OFF))
    file = tmp_path / "status.json"
    file.write_text(json.dumps(MessageToDict(answer, preserving_proto_field_name=True)))
    assert load_calibration(file) == (mixed(), OFF)
    file.write_text("{}")
    with pytest.raises(ConfigError, match=r"without a plan\.yaml"):
        load_calibration(file)
    file.write_text("[")
    with pytest.raises(ConfigError, match="not what `hexgen2 status --json` prints"):
        load_calibration(file)


def test_what_is_measured_of_a_calibrated_plan_comes_on_top() -> None:
    assert further({"A": (2.0, 1.5)}, {"A": (1.5, 1.0), "B": (3.0, 1.0)}) == {"A": (3.0, 1.5), "B": (3.0, 1.0)}
