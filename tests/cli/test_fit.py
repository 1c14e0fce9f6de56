"""``hexgen2 fit`` as a person runs it."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from hexgen2.cli.main import main
from hexgen2.scheduler.fit_data import MODEL

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no measured data in {DATA}")


@needs_data
def test_errors_are_printed_as_json_and_other_measurements_judged() -> None:
    result = CliRunner().invoke(main, ["fit", "--data", str(DATA), "--judge", str(DATA / MODEL), "--json"])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.output)
    judged = [error for error in answer["errors"] if MODEL in error["what"]]
    assert {(error["gpu"], error["what"].split(",")[0]) for error in judged} == {
        (gpu, phase) for gpu in ("A100-SXM", "H100-SXM") for phase in ("prefill", "decode step")
    }
    assert answer["engine"]["hosts"].keys() >= {"A100-SXM", "H100-SXM", "default"}


def test_a_folder_without_the_tables_is_told_in_one_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["fit", "--data", str(tmp_path)])
    assert result.exit_code == 1
    assert result.output.startswith(f"Error: {tmp_path}")
    assert result.output.count("\n") == 1
