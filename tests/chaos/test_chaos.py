"""The chaos run, short: ``make chaos`` is the long one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hexgen2.bench import netns
from tests.models import make_tiny_llama


@pytest.mark.slow
# Most of it is six processes starting, and again when they were killed: much longer on a machine that is busy.
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("transport", "seconds"), [("tcp", 30), ("ucx", 20)])
def test_a_fleet_under_load_and_faults_answers_right_or_says_why_not(
    transport: str, seconds: int, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "benchmarks.chaos", "--json", "--seconds", str(seconds), "--rate", "20"]
    command += ["--transport", transport, "--tokenizer", str(make_tiny_llama(tmp_path / "tiny"))]
    # How soon is for the long run to say; here, that it is soon at all.
    command += ["--free-within", "20", "--grace", "20"]
    # What is kept of a run that failed lies where pytest keeps its folders.
    command += ["--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=590, check=False)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    [result] = json.loads(done.stdout)
    assert result["ok"]
    assert result["violations"] == []
    assert (result["leaked_bytes"], result["quarantine_bytes"]) == (0, 0)
    # What is left alone at the end is answered, every one.
    assert sum(row["answered"] for row in result["rows"]) >= 24
    assert result["num_requests"] > 100
    assert result["meddling"]
    struck = {row["fault"].partition(":")[0] for row in result["rows"] if row["strikes"]}
    assert {"kill -9", "restart", "stop, continue", "stopped until lost"} & struck
    if transport == "tcp" and not netns.why_not():
        assert {"link down", "link silent", "link shaped"} & struck
