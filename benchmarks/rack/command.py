"""One command of another program: it ends within its time, and with whoever waits for it."""

import asyncio
import os
import shlex
import signal
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import click

#: Of what a failed command said, the last so many lines are told.
TOLD = 20
#: From SIGTERM to SIGKILL.
GRACE_S = 10.0


async def run(*words: str | Path, limit_s: float, env: Mapping[str, str] | None = None, log: Path | None = None) -> str:
    """What it printed, on both outputs; to ``log``, too. Its children end with it.

    Raises:
        click.ClickException: it failed, or took longer than ``limit_s``.
    """
    told = shlex.join(map(str, words))
    process = await asyncio.create_subprocess_exec(
        *words,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=os.environ | dict(env or {}),
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(limit_s):
            output, _ = await process.communicate()
    except TimeoutError:
        raise click.ClickException(f"{told}: not done after {limit_s:.0f} s") from None
    finally:
        if process.returncode is None:
            await _end(process)
    text = output.decode(errors="replace")
    if log is not None:
        _keep(log, f"$ {told}\n{text}")
    if process.returncode:
        last = "\n".join(text.splitlines()[-TOLD:])
        raise click.ClickException(f"{told}: exit status {process.returncode}\n{last}")
    return text


async def _end(process: asyncio.subprocess.Process) -> None:
    """Told first: ansible-playbook's own processes are in groups of their own, which only it ends."""
    with suppress(ProcessLookupError, TimeoutError):
        os.killpg(process.pid, signal.SIGTERM)
        await asyncio.wait_for(process.wait(), GRACE_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


def _keep(log: Path, text: str) -> None:
    log.write_text(text, encoding="utf-8")
