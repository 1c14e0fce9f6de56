"""Two-stage stop of a real process."""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from hexgen2.rpc.server import SAME_SIGNAL_S

PROGRAM = """
import asyncio, structlog, sys
from hexgen2.rpc.server import SAME_SIGNAL_S, run_until_signal

structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))

def say(what):
    print(what, flush=True)

async def wait(what):
    say(what)
    try:
        await asyncio.Event().wait()
    finally:
        say(what + " cancelled")

async def start():
    if sys.argv[1] == "start":
        await wait("starting")
    if sys.argv[1] == "fail":
        raise RuntimeError("no engine")
    say("started")

async def drain():
    if sys.argv[1] == "drain":
        await wait("draining")
    if sys.argv[1] == "hold":
        # Until the other end of stdin is closed.
        say("draining")
        await asyncio.to_thread(sys.stdin.read)
    say("drained")

async def main():
    try:
        await run_until_signal(start, drain)
    finally:
        say("freed")
    if sys.argv[1] == "free":
        await asyncio.sleep(1.5 * SAME_SIGNAL_S)
        await wait("freeing")

asyncio.run(main())
"""


class Program:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def says(self) -> str:
        assert self._process.stdout is not None
        async with asyncio.timeout(60):
            return (await self._process.stdout.readline()).decode().strip()

    async def rest(self) -> tuple[list[str], int]:
        async with asyncio.timeout(60):
            out, _ = await self._process.communicate(b"")
        assert self._process.returncode is not None
        return out.decode().splitlines(), self._process.returncode

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)


@asynccontextmanager
async def program(stage: str) -> AsyncIterator[Program]:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PROGRAM, stage, stdin=pipe, stdout=pipe, stderr=pipe
    )
    try:
        yield Program(process)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_drains_and_ends_well(number: signal.Signals) -> None:
    async with program("run") as running:
        assert await running.says() == "started"
        running.send(number)
        assert await running.rest() == (["drained", "freed"], 0)


async def test_a_second_signal_ends_the_drain_at_once() -> None:
    async with program("drain") as running:
        assert await running.says() == "started"
        running.send(signal.SIGTERM)
        assert await running.says() == "draining"
        # As long as a person takes: sooner it would count as the first.
        await asyncio.sleep(1.5 * SAME_SIGNAL_S)
        running.send(signal.SIGINT)
        assert await running.rest() == (["draining cancelled", "freed"], 0)


async def test_a_signal_that_comes_twice_at_once_is_one() -> None:
    async with program("hold") as running:
        assert await running.says() == "started"
        running.send(signal.SIGTERM)
        running.send(signal.SIGINT)
        assert await running.says() == "draining"
        assert await running.rest() == (["drained", "freed"], 0)


async def test_a_signal_during_the_start_ends_it_without_a_drain() -> None:
    async with program("start") as running:
        assert await running.says() == "starting"
        running.send(signal.SIGTERM)
        assert await running.rest() == (["starting cancelled", "freed"], 0)


async def test_a_signal_after_both_stages_ends_the_process_as_it_always_does() -> None:
    async with program("free") as running:
        assert await running.says() == "started"
        running.send(signal.SIGTERM)
        assert [await running.says() for _ in range(3)] == ["drained", "freed", "freeing"]
        running.send(signal.SIGTERM)
        assert (await running.rest())[1] == -signal.SIGTERM


async def test_a_start_that_fails_raises_its_own_error() -> None:
    async with program("fail") as running:
        said, status = await running.rest()
        assert (said, status) == (["freed"], 1)
