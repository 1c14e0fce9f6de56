"""What workers cost that have nothing to do: real processes with the emulated engine, by the kernel's own count."""

import asyncio
import os
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from time import monotonic

import msgspec
import yaml

from hexgen2.address import held_port
from hexgen2.cli.process import ServiceProcess, died
from hexgen2.errors import ConfigError

START_S = 60.0
_SETTLE_S = 3.0
_TICKS = os.sysconf("SC_CLK_TCK")


class IdleRow(msgspec.Struct, frozen=True):
    """``cores``: processor seconds a second, of the worker with its KV agent; it reports to a coordinator meanwhile."""

    worker: str
    transport: str
    seconds: float
    cores: float


async def measure_idle(transport: str, seconds: float) -> list[IdleRow]:
    """A coordinator, a prefill and a decode worker, registered and idle for ``seconds``.

    Raises:
        ConfigError: a process does not start.
    """
    with held_port("127.0.0.1") as port:
        coordinator = f"127.0.0.1:{port}"
    worker = {
        "coordinator": coordinator,
        "engine": {"kind": "emulated"},
        "kv": {"transport": transport},
    }
    configs = {"coordinator": {"listen": coordinator}, "prefill": worker, "decode": worker}
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hexgen2-")))
        processes = {}
        for name, config in configs.items():
            file = folder / f"{name}.yaml"
            file.write_text(yaml.safe_dump(config))
            processes[name] = process = ServiceProcess(name, name, file, folder / f"{name}.log")
            await process.start()
            stack.push_async_callback(process.stop, 5.0, asyncio.Event())
        async with asyncio.timeout(START_S):
            for process in processes.values():
                while "ready" not in process.log_file.read_text(errors="replace"):
                    if process.returncode is not None:
                        raise ConfigError(died(process))
                    await asyncio.sleep(0.1)
        await asyncio.sleep(_SETTLE_S)
        before = {name: _cpu_s(processes[name].pid) for name in ("prefill", "decode")}
        began = monotonic()
        await asyncio.sleep(seconds)
        took = monotonic() - began
        return [
            IdleRow(name, transport, round(took, 1), round((_cpu_s(processes[name].pid) - used) / took, 4))
            for name, used in before.items()
        ]


def _cpu_s(pid: int) -> float:
    """User and system time of all threads of a process."""
    fields = Path("/proc", str(pid), "stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS
