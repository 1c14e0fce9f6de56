"""vLLM's own benchmark client, as it comes, against a fleet of emulated workers."""

import asyncio
import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest

from hexgen2.cli.fleet import Fleet
from hexgen2.cli.fleet_config import FleetConfig
from hexgen2.config import EmulatedEngineConfig

#: What ``vllm bench serve`` runs. vLLM's command itself asks for the version of a package named ``vllm``, which
#: its builds under other names do not have.
BENCH_SERVE = """
import argparse, json, sys
from vllm.benchmarks.serve import add_cli_args, main
parser = argparse.ArgumentParser()
add_cli_args(parser)
for flags in json.loads(sys.argv[1]):
    main(parser.parse_args(flags))
"""
NUM_PROMPTS, OUTPUT_TOKENS = 6, 8


@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
async def test_vllm_bench_serve_works_unmodified(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEXGEN2_HOME", str(tmp_path))
    config = FleetConfig(
        engine=EmulatedEngineConfig(vocab_size=259, name="tiny"),
        tokenizer=folder,
        served_model_name="tiny",
        listen="127.0.0.1:0",
        http_listen="127.0.0.1:0",
        coordinator="127.0.0.1:0",
    )
    runs = tmp_path / "run"
    runs.mkdir()
    backends = {"openai-chat": "/v1/chat/completions", "openai": "/v1/completions"}
    async with Fleet(config, runs) as fleet:
        common = (
            *("--base-url", f"http://{fleet.http_address}", "--model", "tiny", "--tokenizer", str(folder)),
            *("--dataset-name", "random", "--random-input-len", "32", "--random-output-len", str(OUTPUT_TOKENS)),
            *("--num-prompts", str(NUM_PROMPTS), "--max-concurrency", "3", "--ignore-eos", "--disable-tqdm"),
            *("--save-result", "--result-dir", str(tmp_path)),
        )
        await bench(
            [
                [*common, "--backend", backend, "--endpoint", path, "--result-filename", f"{backend}.json"]
                for backend, path in backends.items()
            ]
        )
    for backend in backends:
        measured = json.loads((tmp_path / f"{backend}.json").read_text())
        assert (measured["completed"], measured["failed"]) == (NUM_PROMPTS, 0)
        assert measured["total_output_tokens"] == NUM_PROMPTS * OUTPUT_TOKENS
        assert measured["mean_ttft_ms"] > 0


async def bench(runs: list[list[str]]) -> None:
    """Run it once with each list of flags; fails with what it said."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", BENCH_SERVE, json.dumps(runs)),
        env=os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(200):
            said, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, said.decode()[-3000:]
