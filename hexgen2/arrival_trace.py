"""Traces of requests with their times of arrival, for the simulator: read whole, kept small, checked line by line."""

from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

from hexgen2.config_file import did_you_mean
from hexgen2.errors import ConfigError
from hexgen2.request_trace import OUTPUT_COLUMNS, PROMPT_COLUMNS, rows, tokens

#: Names that the column with times may have: seconds, or dates with times.
TIME_COLUMNS = ("arrival_s", "arrived_at", "timestamp", "TIMESTAMP", "time_s")


class Row(NamedTuple):
    """A request: seconds since the first one, and its lengths."""

    time_s: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class ArrivalTrace:
    """Requests in order of time, 16 bytes each. ``notes``: what was repaired."""

    path: Path
    times_s: "array[float]"
    prompts: "array[int]"
    outputs: "array[int]"
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.times_s)

    def __iter__(self) -> Iterator[Row]:
        return map(Row, self.times_s, self.prompts, self.outputs)

    @property
    def longest_prompt(self) -> int:
        """In tokens."""
        return max(self.prompts)

    @property
    def rate(self) -> float:
        """Requests per second over the whole of it; infinite when all come at once."""
        span = self.times_s[-1] - self.times_s[0]
        return (len(self) - 1) / span if span > 0 else float("inf")


def read_arrivals(path: Path, *, repair: bool = False, limit: int | None = None) -> ArrivalTrace:
    """Read a trace with columns of times, prompt and output tokens: CSV with a header or JSON lines, maybe gzipped.

    Times out of order, negative times and requests without prompt or answer are refused, naming the first; with
    ``repair`` they are sorted, left out, and told in ``notes``. The first request comes at 0.

    Raises:
        ConfigError: with file, line and column.
    """
    times, prompts, outputs = array("d"), array("l"), array("l")
    odd: dict[str, list[int]] = {}
    previous = float("-inf")
    for line, row in rows(path):
        if limit is not None and len(times) >= limit:
            break
        time_s = _time(path, line, row)
        prompt, output = tokens(path, line, row, PROMPT_COLUMNS), tokens(path, line, row, OUTPUT_COLUMNS)
        problem = None
        if time_s < 0:
            problem = "a negative time"
        elif prompt < 1:
            problem = "no prompt tokens"
        elif output < 1:
            problem = "no output tokens"
        elif time_s < previous:
            problem = "a time before the one above it"
        if problem is not None:
            if not repair:
                raise ConfigError(f"{path}:{line}: {problem}; --repair would {_remedy(problem)}")
            odd.setdefault(problem, []).append(line)
            if problem != "a time before the one above it":
                continue
        previous = max(previous, time_s)
        times.append(time_s)
        prompts.append(prompt)
        outputs.append(output)
    if not times:
        raise ConfigError(f"{path}:1: no requests")
    order = sorted(range(len(times)), key=times.__getitem__) if "a time before the one above it" in odd else None
    if order is not None:
        times, prompts, outputs = (
            array("d", [times[i] for i in order]),
            array("l", [prompts[i] for i in order]),
            array("l", [outputs[i] for i in order]),
        )
    begin = times[0]
    if begin:
        times = array("d", [each - begin for each in times])
    notes = tuple(
        f"{path}:{lines[0]}: {problem} ({len(lines)} such): {_remedied(problem)}" for problem, lines in odd.items()
    )
    return ArrivalTrace(path, times, prompts, outputs, notes)


def _remedy(problem: str) -> str:
    return "sort the requests" if problem.startswith("a time") else "leave the request out"


def _remedied(problem: str) -> str:
    return "sorted" if problem.startswith("a time") else "left out"


def _time(path: Path, line: int, row: Mapping[str, Any]) -> float:
    column = next((name for name in TIME_COLUMNS if name in row), None)
    if column is None:
        names = [str(name) for name in row if name]
        hint = did_you_mean(TIME_COLUMNS[0], names) if names else "the header is empty"
        raise ConfigError(
            f"{path}:{line}: {TIME_COLUMNS[0]}: no such column (nor {', '.join(TIME_COLUMNS[1:])}); {hint}"
        )
    value = row[column]
    try:
        time_s = float(value)
    except (TypeError, ValueError):
        try:
            time_s = datetime.fromisoformat(str(value)).timestamp()
        except ValueError:
            time_s = float("nan")
    if not isfinite(time_s):
        raise ConfigError(f"{path}:{line}: {column}: {value!r} is no time")
    return time_s
