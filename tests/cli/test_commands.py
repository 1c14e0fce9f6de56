"""The commands as a person runs them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from hexgen2.cli.main import main
from tests.models import make_tiny_llama

DEADLINE_S = 60.0
HEXGEN2 = [sys.executable, "-m", "hexgen2.cli.main"]


@pytest.fixture(scope="module")
def fleet_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fleet")
    tokenizer = make_tiny_llama(folder / "tiny")
    file = folder / "fleet.yaml"
    file.write_text(
        "listen: 127.0.0.1:0\nhttp_listen: 127.0.0.1:0\ncoordinator: 127.0.0.1:0\n"
        f"tokenizer: {tokenizer}\nengine:\n  kind: emulated\nkv:\n  transport: tcp\n"
    )
    return file


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return os.environ | {"HEXGEN2_HOME": str(tmp_path_factory.mktemp("home"))}


@pytest.fixture(scope="module")
def up(fleet_file: Path, environment: dict[str, str]) -> Iterator[dict[str, str]]:
    """A fleet started by ``hexgen2 up``, and stopped by SIGINT at the end: what it said, by its first words."""
    command = [*HEXGEN2, "up", "--config", str(fleet_file)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        said: list[str] = []
        try:
            for line in process.stdout:
                said.append(line)
                if line.startswith("Ctrl-C"):
                    break
            yield {line[:18].strip(): line[18:].strip() for line in said}
            process.send_signal(signal.SIGINT)
            rest = process.stdout.read()
            assert process.wait(DEADLINE_S) == 0
            assert rest.endswith("stopped\n")
        finally:
            process.kill()


def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*HEXGEN2, *arguments], env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )


def test_generate_prints_text_and_figures(up: dict[str, str], environment: dict[str, str]) -> None:
    address = up["gRPC"].split()[0]
    asked = run(environment, "generate", "hello", "--address", address, "--max-tokens", "4", "--ignore-eos")
    assert asked.returncode == 0
    assert asked.stdout.strip("\n")
    assert "+ 4 tokens · TTFT " in asked.stderr
    assert "by tcp" in asked.stderr


def test_generate_as_json_can_be_traced(up: dict[str, str], environment: dict[str, str]) -> None:
    address = up["gRPC"].split()[0]
    asked = run(environment, "generate", "hello", "--address", address, "--max-tokens", "4", "--ignore-eos", "--json")
    made = json.loads(asked.stdout)
    assert made["usage"]["completion_tokens"] == 4
    deadline = time.monotonic() + DEADLINE_S
    # Each process writes its own spans, when it comes to it.
    while last_trace(environment).get("trace_id") != made["timing"]["trace_id"]:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    traced = run(environment, "trace", made["timing"]["trace_id"])
    assert traced.stdout.startswith(f"trace {made['timing']['trace_id']}")
    why = json.loads(run(environment, "trace", "last", "--why-slow", "--json").stdout)
    assert sum(part["seconds"] for part in why["parts"]) == pytest.approx(why["seconds"], abs=1e-6)


def last_trace(environment: dict[str, str]) -> dict[str, Any]:
    shown = run(environment, "trace", "last", "--json")
    return {} if shown.returncode else dict(json.loads(shown.stdout))


def test_status_shows_replicas(up: dict[str, str], environment: dict[str, str]) -> None:
    shown = run(environment, "status", "--coordinator", up["coordinator"])
    assert "prefill-0 → decode-0" in shown.stdout
    as_json = json.loads(run(environment, "status", "--coordinator", up["coordinator"], "--json").stdout)
    assert {replica["replica_id"] for replica in as_json["plan"]["replicas"]} == {"prefill-0", "decode-0"}


def test_a_bad_parameter_is_refused_by_name(up: dict[str, str], environment: dict[str, str]) -> None:
    asked = run(environment, "generate", "hello", "--address", up["gRPC"].split()[0], "--top-p", "7")
    assert asked.returncode == 1
    assert asked.stderr.startswith("Error: sampling.top_p: ")


def test_a_second_fleet_on_the_same_port_says_so(
    up: dict[str, str], fleet_file: Path, environment: dict[str, str]
) -> None:
    address = up["gRPC"].split()[0]
    second = run(environment, "up", "--config", str(fleet_file), "--listen", address)
    assert second.returncode == 1
    assert f"Error: {address} is in use" in second.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "hello", "--max-tokens", "-1"], "--max-tokens: "),
        (["generate", "hello", "--timeout", "0"], "--timeout"),
        (["up", "--config", "absent.yaml"], "absent.yaml: No such file"),
        (["up", "--prefill", "-1"], "--prefill: '-1' should be greater than or equal to 0"),
        (["trace", "last"], "no request has been traced"),
        (["trac"], "No such command 'trac'"),
    ],
)
def test_a_mistake_is_told_in_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEXGEN2_HOME", str(tmp_path))
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code != 0
    assert message in result.output
    assert "Traceback" not in result.output


def test_help_teaches_the_first_steps() -> None:
    shown = CliRunner().invoke(main, ["--help"]).output
    for command in ("up", "generate", "trace last", "status"):
        assert f"hexgen2 {command}" in shown
