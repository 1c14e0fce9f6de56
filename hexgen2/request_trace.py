"""Traces of requests: read from a file, and summarised as a table of prompt and answer lengths.

The table is made of quantiles: requests in order of prompt length are cut into bins, finer in the upper tail, and each
bin in order of answer length into three; a cell's means stand for it. So E[s] and E[o] are the trace's own (but for
rounding to whole tokens), and so is how prompt and answer go together.
"""

import csv
import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from hexgen2.config_file import did_you_mean
from hexgen2.errors import ConfigError
from hexgen2.workload import LengthClass

#: Where prompts are cut, as shares of the requests in order of prompt length.
PROMPT_CUTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
#: Where the answers within such a bin are cut.
OUTPUT_CUTS = (0.0, 0.5, 0.9, 1.0)

#: Names that a column may have.
PROMPT_COLUMNS = ("prompt_tokens", "input", "input_length", "ContextTokens", "input_tokens")
OUTPUT_COLUMNS = ("output_tokens", "output", "output_length", "GeneratedTokens")


class Request(NamedTuple):
    """One line of a trace."""

    prompt_tokens: int
    output_tokens: int


def read_trace(path: Path) -> tuple[Request, ...]:
    """Requests in a CSV file (with a header) or JSON lines, either may be gzipped; those without answer are left out.

    Raises:
        ConfigError: with file, line and column of what cannot be used, or when no request is left.
    """
    found = []
    num_rows = 0
    for line, row in rows(path):
        num_rows += 1
        prompt, output = (tokens(path, line, row, columns) for columns in (PROMPT_COLUMNS, OUTPUT_COLUMNS))
        if prompt > 0 and output > 0:
            found.append(Request(prompt, output))
    if not found:
        why = "no requests" if num_rows == 0 else f"none of its {num_rows} requests has both prompt and answer"
        raise ConfigError(f"{path}:1: {why}")
    return tuple(found)


def summarise(requests: Sequence[Request]) -> tuple[LengthClass, ...]:
    """A table of at most 36 lengths whose weights sum to one."""
    total = len(requests)
    points = []
    for prompts in _cut(sorted(requests), PROMPT_CUTS):
        for cell in _cut(
            sorted(prompts, key=lambda request: (request.output_tokens, request.prompt_tokens)), OUTPUT_CUTS
        ):
            prompt = sum(request.prompt_tokens for request in cell) / len(cell)
            output = sum(request.output_tokens for request in cell) / len(cell)
            points.append(
                LengthClass(
                    prompt_tokens=max(1, round(prompt)), output_tokens=max(1, round(output)), weight=len(cell) / total
                )
            )
    return tuple(points)


def _cut(requests: Sequence[Request], cuts: Sequence[float]) -> Iterator[Sequence[Request]]:
    """The parts between the cuts that are not empty."""
    for low, high in pairwise(cuts):
        part = requests[round(low * len(requests)) : round(high * len(requests))]
        if part:
            yield part


def rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Line number and columns of each request. Raises ConfigError."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            if ".json" in path.name:
                for line, text in enumerate(file, start=1):
                    if text.strip():
                        yield line, _json(path, line, text)
            else:
                reader = csv.DictReader(file)
                for row in reader:
                    yield reader.line_num, row
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path}: not a CSV file: {error}") from error


def _json(path: Path, line: int, text: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{path}:{line}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}:{line}: not a JSON object")
    return value


def tokens(path: Path, line: int, row: Mapping[str, Any], columns: tuple[str, ...]) -> int:
    """A number of tokens in one of ``columns``. Raises ConfigError with file, line and column."""
    column = next((name for name in columns if name in row), None)
    if column is None:
        names = [str(name) for name in row if name]
        hint = did_you_mean(columns[0], names) if names else "the header is empty"
        raise ConfigError(f"{path}:{line}: {columns[0]}: no such column (nor {', '.join(columns[1:])}); {hint}")
    try:
        value = float(row[column])
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{path}:{line}: {column}: {row[column]!r} is not a number of tokens") from None
    if value != number or number < 0:
        raise ConfigError(f"{path}:{line}: {column}: {row[column]!r} is not a number of tokens")
    return number
