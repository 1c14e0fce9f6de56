"""The supervision of a fleet, with emulated engines: real processes, seconds to start."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import yaml

from hexgen2.address import parse_address
from hexgen2.cli.client import generate, get_plan
from hexgen2.cli.fleet import Fleet, FleetError
from hexgen2.cli.fleet_config import FleetConfig
from hexgen2.cli.generate import answer
from hexgen2.cli.main import make_request
from hexgen2.cli.process import died
from hexgen2.config import EmulatedEngineConfig
from hexgen2.errors import ConfigError, Unavailable
from tests.eventually import eventually
from tests.models import make_tiny_llama

DEADLINE_S = 60.0


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


def config(tokenizer: Path, **fields: object) -> FleetConfig:
    free = dict.fromkeys(("listen", "http_listen", "coordinator"), "127.0.0.1:0")
    return FleetConfig.model_validate(
        free
        | {"engine": {"kind": "emulated"}, "tokenizer": tokenizer, "kv": {"transport": "tcp"}, "drain_s": 5}
        | fields
    )


@pytest.fixture
async def fleet(tokenizer: Path, tmp_path: Path) -> AsyncIterator[Fleet]:
    async with Fleet(config(tokenizer), tmp_path) as running:
        yield running


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_a_fleet_answers_and_leaves_nothing_behind(tokenizer: Path, tmp_path: Path) -> None:
    async with Fleet(config(tokenizer), tmp_path) as fleet:
        pids = [process.pid for process in fleet.processes]
        request = make_request("hello", max_tokens=5, ignore_eos=True)
        with (tmp_path / "out").open("w") as out:
            made = await answer(fleet.grpc_address, request, DEADLINE_S, out)
        assert made.last.usage.completion_tokens == 5
        assert (made.last.timing.prefill_replica_id, made.last.timing.decode_replica_id) == ("prefill-0", "decode-0")
        assert made.as_dict()["finish_reason"] == "length"
        assert made.text == (tmp_path / "out").read_text()
    assert [process.returncode for process in fleet.processes] == [0, 0, 0, 0]
    assert not any(map(is_running, pids))


async def test_emulated_engines_take_the_tokenizers_vocabulary(tokenizer: Path, tmp_path: Path) -> None:
    Fleet(config(tokenizer), tmp_path)
    worker = yaml.safe_load((tmp_path / "prefill-0.yaml").read_text())
    assert worker["engine"]["vocab_size"] == 259


async def test_a_process_that_dies_is_named_with_the_end_of_its_log(fleet: Fleet) -> None:
    fleet["decode-0"].send(signal.SIGKILL)
    dead = await asyncio.wait_for(fleet.watch(), DEADLINE_S)
    told = died(dead)
    assert told.startswith(f"decode-0 was ended by SIGKILL; the end of {dead.log_file}:\n    ")
    assert "ready" in told


async def test_a_process_that_cannot_start_ends_the_start(tokenizer: Path, tmp_path: Path) -> None:
    bad = config(tokenizer, engine={"kind": "vllm", "model": str(tmp_path / "no-model")})
    with pytest.raises(FleetError, match=r"(?s)ended with status .*no such model folder"):
        async with Fleet(bad, tmp_path):
            pass


async def test_a_port_in_use_is_told_before_anything_starts(tokenizer: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"{address} is in use"):
            Fleet(config(tokenizer, http_listen=address), tmp_path)


async def test_a_stopped_process_does_not_hold_up_the_end(tokenizer: Path, tmp_path: Path) -> None:
    async with Fleet(config(tokenizer, drain_s=0), tmp_path) as fleet:
        fleet.hurry.set()
        fleet["prefill-0"].send(signal.SIGSTOP)
    assert fleet["prefill-0"].returncode == -signal.SIGKILL


async def test_a_killed_fleet_takes_its_processes_along(tokenizer: Path, tmp_path: Path) -> None:
    settings = config(tokenizer)
    file = tmp_path / "fleet.yaml"
    file.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    program = (
        "import asyncio, sys; from pathlib import Path\n"
        "from hexgen2.cli.fleet import Fleet; from hexgen2.cli.fleet_config import FleetConfig\n"
        "from hexgen2.config import load\n"
        "async def main():\n"
        "    async with Fleet(load(Path(sys.argv[1]), FleetConfig), Path(sys.argv[2])) as fleet:\n"
        "        print(*(process.pid for process in fleet.processes), flush=True)\n"
        "        await asyncio.sleep(600)\n"
        "asyncio.run(main())\n"
    )
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, str(file), str(tmp_path / "run"), stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout
    try:
        line = await asyncio.wait_for(parent.stdout.readline(), DEADLINE_S)
    finally:
        parent.kill()
        await parent.wait()
    pids = [int(word) for word in line.split()]
    assert len(pids) == 4
    await eventually(lambda: not any(map(is_running, pids)))


async def test_nobody_there_is_said_with_the_remedy() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    with pytest.raises(Unavailable, match=r"nobody answers at .*is `hexgen2 up` running\?"):
        await anext(aiter(generate(address, make_request("hello"), 5.0)))
    with pytest.raises(Unavailable, match="nobody answers at"):
        await get_plan(address, 5.0)


def test_chosen_ports_differ(tokenizer: Path, tmp_path: Path) -> None:
    fleet = Fleet(config(tokenizer), tmp_path)
    ports = {parse_address(a)[1] for a in (fleet.grpc_address, fleet.http_address, fleet.coordinator_address)}
    assert len(ports) == 3
    assert 0 not in ports


def test_a_fleet_is_vllm_with_the_default_model_unless_told() -> None:
    engine = FleetConfig.model_validate({}).engine
    assert engine.kind == "vllm"
    assert engine.model.name == "SmolLM2-135M-Instruct"
    assert FleetConfig.model_validate({"engine": {"kind": "emulated"}}).engine == EmulatedEngineConfig()
