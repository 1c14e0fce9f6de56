"""CPU shares of processes on this machine, by the kernel's control groups (version 1 or 2); needs to be root there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hexgen2.errors import ConfigError

V1 = Path("/sys/fs/cgroup/cpu")
V2 = Path("/sys/fs/cgroup")
PERIOD_US = 100_000


class Quota:
    """A control group that gives what is in it so many cores. Made by ``quota``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def add(self, pid: int) -> None:
        """Put a process there, with whatever it starts from now on."""
        (self._folder / "cgroup.procs").write_text(str(pid))


@contextmanager
def quota(name: str, cores: float) -> Iterator[Quota]:
    """A control group of that name for the length of the block. Its processes must be gone at the end.

    Raises:
        ConfigError: this kernel or this user cannot limit CPU time.
    """
    root = V1 if (V1 / "cpu.cfs_quota_us").exists() else V2
    folder = root / f"hexgen2-{os.getpid()}-{name}"
    try:
        folder.mkdir()
        if root is V1:
            (folder / "cpu.cfs_period_us").write_text(str(PERIOD_US))
            (folder / "cpu.cfs_quota_us").write_text(str(round(cores * PERIOD_US)))
        else:
            (folder / "cpu.max").write_text(f"{round(cores * PERIOD_US)} {PERIOD_US}")
    except OSError as error:
        with suppress(OSError):
            folder.rmdir()
        raise ConfigError(
            f"replica {name} is planned on {cores:g} CPU cores, and this user cannot limit CPU time here "
            f"({error.strerror}: {folder}): start it as root, or set cpu_quotas: false to share the cores freely"
        ) from error
    try:
        yield Quota(folder)
    finally:
        # Busy only if somebody put in what is not ours.
        with suppress(OSError):
            folder.rmdir()
