"""The examples do what they say; those that ask a fleet are run where one is up (tests/cli/test_planned.py)."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


async def run(name: str, *arguments: str) -> str:
    """What it prints."""
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


async def test_a_plan_is_made_from_python() -> None:
    told = await run("plan")
    assert "requests/s" in told
    assert "plan.yaml: version: 1" in told


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_each_is_run_by_a_test(example: Path) -> None:
    here = [Path(__file__), Path(__file__).parent / "cli" / "test_planned.py"]
    assert any(f'"{example.stem}"' in test.read_text(encoding="utf-8") for test in here)
