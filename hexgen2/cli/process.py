"""One service process of a fleet: started, waited for, stopped in two stages, and its log read back."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from hexgen2.cli.options import DIE_WITH_PARENT

#: How much of a log's end is looked at for its last lines.
TAIL_BYTES = 16 << 10

#: After the second signal a process has so long to leave, then it is killed.
LEAVE_S = 5.0


class ServiceProcess:
    """``python -m services.<service> --config FILE`` with its output in a log file. Leads a process group of its own,
    so that a terminal's Ctrl-C reaches the fleet alone, and nothing that it started outlives it.

    ``service`` may also be a module's whole name. ``launcher`` goes before the command and must become it (``nsenter``,
    ``taskset``...); ``environment`` is on top of this process's own.
    """

    def __init__(
        self,
        name: str,
        service: str,
        config_file: Path,
        log_file: Path,
        launcher: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.service = service
        self.log_file = log_file
        self._config_file = config_file
        self._launcher = launcher
        self._environment = dict(environment or {})
        self._process: asyncio.subprocess.Process | None = None
        self._started_at = 0.0

    @property
    def pid(self) -> int:
        """Of the running process."""
        assert self._process is not None, f"{self.name} was not started"
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs (or was never started); negative when a signal ended it."""
        return self._process.returncode if self._process else None

    @property
    def age_s(self) -> float:
        """Seconds since its start."""
        return time.monotonic() - self._started_at

    async def start(self) -> None:
        """Start it (again); the log is appended to."""
        # One thread for torch: processes that share few cores must not spin for each other's.
        defaults = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}
        with self.log_file.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._launcher,
                sys.executable,
                "-m",
                self.service if "." in self.service else f"services.{self.service}",
                "--config",
                str(self._config_file),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=defaults | os.environ | self._environment | {DIE_WITH_PARENT: "1"},
                start_new_session=True,
            )
        self._started_at = time.monotonic()

    async def wait(self) -> int:
        """Its exit status, once it has ended."""
        assert self._process is not None, f"{self.name} was not started"
        return await self._process.wait()

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process itself; nothing when it has ended."""
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def stop(self, drain_s: float, hurry: asyncio.Event) -> None:
        """SIGTERM; after ``drain_s`` or when ``hurry`` is set another one; then SIGKILL. Idempotent.

        Whatever it started and left behind is killed at the end.
        """
        if self._process is None:
            return
        ended = asyncio.ensure_future(self._process.wait())
        hurried = asyncio.ensure_future(hurry.wait())
        try:
            self.send(signal.SIGTERM)
            await asyncio.wait((ended, hurried), timeout=drain_s, return_when=asyncio.FIRST_COMPLETED)
            if not ended.done():
                self.send(signal.SIGTERM)
                await asyncio.wait((ended,), timeout=LEAVE_S)
        finally:
            hurried.cancel()
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            # A killed process ends at once; waiting reaps it.
            await ended

    def tail(self, num_lines: int = 12) -> str:
        """The last lines of its log."""
        try:
            with self.log_file.open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
                text = file.read().decode(errors="replace")
        except OSError:
            return ""
        return "\n".join(text.strip().splitlines()[-num_lines:])


def died(process: ServiceProcess) -> str:
    """What to tell when a process ended by itself: how, and the end of its log."""
    code = process.returncode or 0
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    lines = "\n".join(f"    {line}" for line in process.tail().splitlines()) or "    (its log is empty)"
    return f"{process.name} {how}; the end of {process.log_file}:\n{lines}"
