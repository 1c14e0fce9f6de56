"""What the fleet says of itself: its metrics, its memory, its traces."""

import asyncio
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import httpx

from hexgen2.traces import Span, from_line

USED, QUARANTINE = "hexgen2:kv_pool_bytes_used", "hexgen2:kv_quarantine_bytes"
RUNNING, WAITING = "hexgen2:num_requests_running", "hexgen2:num_requests_waiting"
OPEN = "hexgen2:kv_transfers_open"

Metrics = Mapping[tuple[str, str], float]


async def scrape(client: httpx.AsyncClient, address: str) -> Metrics:
    """One process's metrics by (name, labels as written). Empty when it does not answer."""
    try:
        text = (await client.get(f"http://{address}/metrics")).text
    except httpx.HTTPError:
        return {}
    values = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            name, _, labels = name.partition("{")
            values[name, labels.removesuffix("}")] = float(value)
    return values


def total(metrics: Metrics, name: str) -> float:
    """Over all labels."""
    return sum(value for (each, _), value in metrics.items() if each == name)


def labelled(metrics: Metrics, name: str, label: str) -> dict[str, float]:
    """By the value of one label."""
    found: dict[str, float] = defaultdict(float)
    for (each, labels), value in metrics.items():
        if each == name:
            pairs = dict(pair.split("=", 1) for pair in labels.split(",") if "=" in pair)
            found[pairs.get(label, "").strip('"')] += value
    return dict(found)


def rss_bytes(pid: int) -> int:
    """Resident memory of a process; 0 when it is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("VmRSS")), 0)


@dataclass(frozen=True, slots=True)
class Work:
    """What a process did for a request: one of its spans."""

    replica: str
    name: str
    start_ns: int
    end_ns: int


class SpanTail:
    """Reads spans while they are written, before their files are rotated away."""

    def __init__(self, folder: Path) -> None:
        self.work: dict[str, list[Work]] = defaultdict(list)
        self._folder = folder
        self._files: dict[Path, tuple[BinaryIO, bytes]] = {}

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.to_thread(self.read)
            await asyncio.sleep(0.5)

    def read(self) -> None:
        """All that is new."""
        for path in self._folder.glob("*.jsonl"):
            if path.name.endswith(".1.jsonl"):
                continue
            self._read(path)

    def close(self) -> None:
        """Close all files."""
        for file, _ in self._files.values():
            file.close()
        self._files.clear()

    def _read(self, path: Path) -> None:
        file, rest = self._files.get(path, (None, b""))
        try:
            if file is not None and os.fstat(file.fileno()).st_ino != path.stat().st_ino:
                # Rotated: what it was called before is read to its end, then the new one.
                self._take(rest + file.read())
                file.close()
                file, rest = None, b""
            file = file or path.open("rb")
        except FileNotFoundError:
            return
        lines, newline, rest = (rest + file.read()).rpartition(b"\n")
        self._files[path] = file, rest
        if newline:
            self._take(lines)

    def _take(self, lines: bytes) -> None:
        for line in lines.splitlines():
            span = from_line(line)
            if span is not None and _is_work(span):
                self.work[span.trace_id].append(Work(span.replica, span.name, span.start_ns, span.end_ns))


def _is_work(span: Span) -> bool:
    return bool(span.replica) and (span.name.startswith("hexgen2.v1.") or "." in span.name)
