"""The chaos run, short: ``make chaos`` is the long one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hexgen2 import netns
from tests.models import make_tiny_llama

SECONDS = 40


@pytest.mark.slow
def test_a_fleet_under_load_and_faults_answers_right_or_says_why_not(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.chaos", "--json", "--seconds", str(SECONDS), "--rate", "20"]
    command += ["--tokenizer", str(make_tiny_llama(tmp_path / "tiny"))]
    # What is kept of a run that failed lies where pytest keeps its folders.
    command += ["--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    over_tcp, over_ucx = json.loads(done.stdout)
    for result in (over_tcp, over_ucx):
        assert result["ok"]
        assert result["violations"] == []
        assert (result["leaked_bytes"], result["quarantine_bytes"]) == (0, 0)
        # What is left alone at the end is answered, every one.
        assert sum(row["answered"] for row in result["rows"]) >= 24
        assert result["meddling"]
    assert over_tcp["num_requests"] + over_ucx["num_requests"] > 200
    struck = {row["fault"].partition(":")[0] for row in over_tcp["rows"] if row["strikes"]}
    assert {"kill -9", "stop, continue"} <= struck
    if not netns.why_not():
        assert {"link down", "link silent", "link shaped"} & struck
