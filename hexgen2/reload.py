"""What is in files that may change while a process runs: read at the start, and again when they have changed."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import structlog

from hexgen2.errors import ConfigError

T = TypeVar("T")

#: Inode, size and time of change of each file.
_Stamp = tuple[tuple[int, int, int], ...]

log = structlog.get_logger(__name__)


class Reloaded(Generic[T]):
    """``read`` makes a value of ``paths`` and raises ConfigError when they cannot be used. May be asked by any thread.

    Files that cannot be used any more (half written, say) change nothing, and are told once.
    """

    def __init__(self, paths: Sequence[Path], read: Callable[[], T]) -> None:
        """Raises what ``read`` does."""
        self._paths = tuple(paths)
        self._read = read
        self._lock = threading.Lock()
        self._seen = self._stamp()
        self._value = read()
        self._trouble = ""

    def current(self) -> T:
        """The newest value that could be made; the same object while nothing has changed."""
        with self._lock:
            try:
                stamp = self._stamp()
                # What cannot be used is looked at again each time: its second half may be on the way.
                if stamp != self._seen or self._trouble:
                    self._value, self._seen = self._read(), stamp
                    self._trouble = ""
                    log.info("files_reloaded", files=[str(path) for path in self._paths])
            except ConfigError as error:
                if str(error) != self._trouble:
                    self._trouble = str(error)
                    log.error("files_not_reloaded", error=self._trouble)
            return self._value

    def _stamp(self) -> _Stamp:
        found = []
        for path in self._paths:
            try:
                seen = path.stat()
            except OSError as error:
                raise ConfigError(f"{path}: {error.strerror}") from error
            found.append((seen.st_ino, seen.st_size, seen.st_mtime_ns))
        return tuple(found)
