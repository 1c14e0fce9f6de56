from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from hexgen2.cli.options import service_command
from hexgen2.config import EmulatedEngineConfig, GatewayConfig, VllmEngineConfig, WorkerConfig


def prefill(*arguments: str) -> WorkerConfig:
    """The configuration that these arguments make."""
    made: list[WorkerConfig] = []
    result = CliRunner().invoke(service_command("prefill", WorkerConfig, made.append), arguments)
    if result.exit_code:
        raise click.ClickException(result.output)
    return made[0]


def test_flags_have_the_names_of_vllm() -> None:
    config = prefill("--model", "m", "--max-num-seqs", "7", "--tensor-parallel-size", "3")
    assert config.engine == VllmEngineConfig(model=Path("m"), max_num_seqs=7, tensor_parallel_size=3)


def test_the_command_decides_the_role() -> None:
    assert prefill("--model", "m").role == "prefill"


def test_the_engine_is_chosen_by_a_flag() -> None:
    config = prefill("--engine", "emulated", "--num-layers", "2", "--kv-transport", "tcp")
    assert config.engine == EmulatedEngineConfig(num_layers=2)
    assert config.kv.transport == "tcp"


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text("listen: 127.0.0.1:1\nreplica_id: one\nengine:\n  kind: emulated\n  num_layers: 2\n")
    config = prefill("--config", str(file), "--replica-id", "two", "--num-kv-heads", "3")
    assert (config.listen, config.replica_id) == ("127.0.0.1:1", "two")
    assert config.engine == EmulatedEngineConfig(num_layers=2, num_kv_heads=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "m", "--max-num-seqs", "0"], "--max-num-seqs: '0' should be greater than or equal to 1"),
        (["--model", "m", "--kv-send-bytes", "much"], "--kv-send-bytes: 'much' should be a valid integer"),
        ([], "--model: missing"),
        (["--engine", "emulated", "--model", "m"], "--model: no such field"),
    ],
)
def test_a_problem_names_the_flag(arguments: list[str], message: str) -> None:
    with pytest.raises(click.ClickException, match=message):
        prefill(*arguments)


def test_a_file_of_another_role_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "d.yaml"
    file.write_text("engine:\n  kind: emulated\nrole: decode\n")
    with pytest.raises(click.ClickException, match=r"d\.yaml:3: role: this process can only be 'prefill'"):
        prefill("--config", str(file))


def test_help_tells_every_field_with_its_default() -> None:
    shown = CliRunner().invoke(service_command("gateway", GatewayConfig, print), ["--help"]).output
    for name, field in GatewayConfig.model_fields.items():
        assert f"--{name.replace('_', '-')}" in shown
        if field.default and not field.is_required():
            assert str(field.default) in shown
