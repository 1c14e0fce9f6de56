"""What UCX says of itself. NIXL does not tell which of its transports UCX took for a peer; UCX's own log does.

UCX is told, before it starts, to write its choice of protocols to a private file (``UCX_PROTO_INFO``). The first READ
of a peer makes it write a table, of which this is the part that matters::

    | remote memory read by ucp_get*(multi) into host memory from host |
    | 0..inf | zero-copy   | cma/memory                                |

``cma`` is a copy by the kernel between processes of one machine, ``tcp/eth0`` a socket, ``rc_mlx5/mlx5_0:1`` RDMA.
"""

import atexit
import ctypes
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from logging import getLogger
from typing import IO

log = getLogger(__name__)

_TITLE = "remote memory read by ucp_get*(multi)"
_ROW = re.compile(r"\|\s*\S+\.\.\S+\s*\|\s*([^|]+?)\s*\|\s*([^|]+?)\s*\|")
_LOCAL = "cma"
_TROUBLE = re.compile(r"\b(WARN|ERROR|FATAL|DIAG)\b\s+(.*)")


def parse_read_paths(text: str) -> list[str]:
    """What carries READs, from UCX's log: each row of each table, in order. The last one is the latest peer's, for the
    largest sizes."""
    found: list[str] = []
    inside = False
    for line in text.splitlines():
        if "remote memory " in line:
            inside = _TITLE in line
        elif inside and (row := _ROW.search(line)):
            found.append(" ".join(row[2].split()))
    return found


@dataclass(slots=True)
class _File:
    """UCX opens its file once in a process, when it is loaded."""

    file: IO[str]
    #: All that READs have gone by, of all contexts.
    paths: set[str] = field(default_factory=set)


class UcxLog:
    """This process's UCX log, of which each context may read what another has not."""

    def __init__(self, file: _File | None) -> None:
        self._file = file
        self._path: str | None = None

    @property
    def is_local(self) -> bool:
        """Whether the kernel alone has copied whatever this process has read so far, whoever it was read from: UCX does
        not tell again of a way that it has taken before."""
        paths = set() if self._file is None else self._file.paths
        return bool(paths) and all(path.split("/")[0] == _LOCAL for path in paths)

    def read_path(self) -> str | None:
        """What carries READs, once UCX has chosen; passes UCX's warnings and errors on to our log."""
        if self._file is not None:
            # UCX writes through a buffer of C's.
            ctypes.CDLL(None).fflush(None)
            text = self._file.file.read()
            for line in text.splitlines():
                if trouble := _TROUBLE.search(line):
                    log.warning("UCX: %s", trouble[2])
            paths = parse_read_paths(text)
            self._file.paths.update(paths)
            self._path = paths[-1] if paths else self._path
        return self._path


@contextmanager
def ucx_logged() -> Iterator[UcxLog]:
    """Create a UCX context within this. Where the user has UCX log as they like, the log is empty.

    The settings are gone afterwards: child processes must not write to our file.
    """
    if "UCX_LOG_FILE" in os.environ or "UCX_PROTO_INFO" in os.environ:
        yield UcxLog(None)
        return
    file = _file()
    # The file's setting is read when UCX is loaded, the other with every context.
    os.environ["UCX_PROTO_INFO"] = "y"
    os.environ["UCX_LOG_FILE"] = file.file.name
    try:
        yield UcxLog(file)
    finally:
        del os.environ["UCX_PROTO_INFO"], os.environ["UCX_LOG_FILE"]
        # UCX has it open, and nobody else needs its name.
        with suppress(FileNotFoundError):
            os.unlink(file.file.name)


@cache
def _file() -> _File:
    handle, name = tempfile.mkstemp(prefix="hexgen2-ucx-", suffix=".log")
    os.close(handle)
    file = open(name, errors="replace")  # noqa: SIM115, it lasts as long as the process
    atexit.register(file.close)
    return _File(file)
