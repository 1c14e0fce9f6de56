"""A start of vLLM that is given up, with what stands for its processes."""

import asyncio
import multiprocessing
import os
import time
from pathlib import Path

import pytest

pytest.importorskip("torch")

from hexgen2.config import KvConfig, VllmEngineConfig
from hexgen2.engine.vllm import VllmEngine
from hexgen2.errors import EngineFailed
from tests.eventually import eventually
from tests.models import make_tiny_llama


async def test_its_processes_are_ended_and_others_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> None:
        # Its core, which waits for ranks on a machine that never comes.
        core = spawn.Process(target=time.sleep, args=(600.0,), daemon=True)
        core.start()
        core.join()
        raise EngineFailed("vLLM did not start: its core is gone")

    spawn = multiprocessing.get_context("spawn")
    # ``start`` sets this process's environment for vLLM.
    monkeypatch.setattr(os, "environ", os.environ.copy())
    other = spawn.Process(target=time.sleep, args=(600.0,), daemon=True)
    other.start()
    try:
        config = VllmEngineConfig(model=make_tiny_llama(tmp_path / "tiny"))
        engine = VllmEngine(config, KvConfig(transport="tcp"), "decode", tmp_path / "kv.sock")
        monkeypatch.setattr(engine, "_build", build)
        starting = asyncio.ensure_future(engine.start())
        await eventually(lambda: len(multiprocessing.active_children()) == 2)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert multiprocessing.active_children() == [other]
    finally:
        other.kill()
        other.join()
