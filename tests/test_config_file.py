from pathlib import Path

import pytest

from hexgen2.config import CoordinatorConfig, GatewayConfig, VllmEngineConfig, WorkerConfig, load
from hexgen2.errors import ConfigError

WORKER = """\
role: prefill
listen: 127.0.0.1:7001
engine:
  kind: vllm
  model: models/tiny
  max_num_seqs: 4
kv:
  transport: tcp
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "worker.yaml"
    path.write_text(text)
    return path


def problem(folder: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(write(folder, text), WorkerConfig)
    return str(caught.value).removeprefix(f"{folder}/")


def test_a_file_becomes_a_configuration(tmp_path: Path) -> None:
    config = load(write(tmp_path, WORKER), WorkerConfig)
    assert isinstance(config.engine, VllmEngineConfig)
    assert (config.engine.model, config.engine.max_num_seqs, config.kv.transport) == (Path("models/tiny"), 4, "tcp")


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    assert load(write(tmp_path, "# nothing\n"), CoordinatorConfig) == CoordinatorConfig()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("role:", "roll:", "worker.yaml:1: roll: no such field; did you mean `role`?"),
        ("  model:", "  modle:", "worker.yaml:5: engine.modle: no such field; did you mean `model`?"),
        ("transport:", "transprot:", "worker.yaml:8: kv.transprot: no such field; did you mean `transport`?"),
        (
            "max_num_seqs: 4",
            "max_num_seqs: 0",
            "worker.yaml:6: engine.max_num_seqs: 0 should be greater than or equal to 1",
        ),
        (
            "max_num_seqs: 4",
            "max_num_seqs: many",
            "worker.yaml:6: engine.max_num_seqs: 'many' should be a valid integer",
        ),
        ("tcp", "rdma", "worker.yaml:8: kv.transport: 'rdma' should be 'auto', 'ucx' or 'tcp'"),
        ("kind: vllm", "kind: vlm", "worker.yaml:4: engine.kind: 'vlm' is not one of 'vllm', 'emulated'"),
        ("  kind: vllm\n", "", "worker.yaml:3: engine.kind: missing"),
        ("  model: models/tiny\n", "", "worker.yaml:3: engine.model: missing"),
        ("role: prefill\n", "", "worker.yaml:1: role: missing"),
        ("  model:", "  max_num_seqs: 2\n  model:", "worker.yaml:7: engine.max_num_seqs: given twice, first in line 5"),
        ("engine:", "engine: [", "worker.yaml:5: not YAML: "),
    ],
)
def test_a_problem_is_told_with_line_and_field(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert message in problem(tmp_path, WORKER.replace(old, new))


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    told = problem(tmp_path, WORKER.replace("tcp", "rdma").replace("max_num_seqs: 4", "max_num_seqs: 0"))
    assert len(told.splitlines()) == 2


def test_a_field_of_the_other_engine_is_told_with_this_engines_fields(tmp_path: Path) -> None:
    told = problem(tmp_path, WORKER.replace("max_num_seqs: 4", "head_dim: 4"))
    assert "engine.head_dim: no such field; there are: block_size, dtype" in told


def test_a_list_is_not_a_configuration(tmp_path: Path) -> None:
    assert problem(tmp_path, "- a\n") == "worker.yaml:1: expected fields (`name: value`), found list"


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: No such file or directory"):
        load(tmp_path / "absent.yaml", GatewayConfig)
