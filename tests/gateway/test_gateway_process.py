"""The gateway as a process: what it says when it cannot start, and how it stops."""

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx


@asynccontextmanager
async def gateway(folder: Path, home: Path, *flags: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A gateway whose coordinator is not there; killed at the end if it still runs."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.gateway", "--model", str(folder), "--coordinator", "127.0.0.1:1"),
        *("--listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0", *flags),
        env=os.environ | {"HEXGEN2_HOME": str(home)},
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(60):
            yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def http_address(process: asyncio.subprocess.Process) -> str:
    """As its log says once it is ready."""
    assert process.stderr is not None
    async for line in process.stderr:
        event = json.loads(line)
        if event["event"] == "ready":
            return str(event["http_address"])
    raise AssertionError("it ended before it was ready")


async def test_serves_without_a_coordinator_and_stops_on_sigterm(folder: Path, tmp_path: Path) -> None:
    async with gateway(folder, tmp_path) as process:
        address = await http_address(process)
        async with httpx.AsyncClient(base_url=f"http://{address}", timeout=10) as http:
            assert (await http.get("/health")).status_code == 503
            response = await http.post("/v1/completions", json={"prompt": "x"})
            assert response.status_code == 503
            assert "no replica" in response.json()["error"]["message"]
            assert len(response.headers["x-trace-id"]) == 32
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0


async def test_a_port_in_use_is_said_in_one_line(folder: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with gateway(folder, tmp_path, "--http-listen", f"127.0.0.1:{port}") as process:
            assert process.stderr is not None
            said = (await process.stderr.read()).decode()
            assert await process.wait() == 2
    (line,) = [each for each in said.splitlines() if each.startswith("error:")]
    assert f"127.0.0.1:{port} is in use" in line
    assert "Traceback" not in said


async def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    async with gateway(tmp_path, tmp_path) as process:
        assert process.stderr is not None
        said = (await process.stderr.read()).decode()
        assert await process.wait() == 2
    assert "tokenizer.json does not exist" in said
