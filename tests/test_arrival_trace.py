"""Traces with times: read, refused by line and column, repaired when asked to."""

import gzip
from pathlib import Path

import pytest

from hexgen2.arrival_trace import Row, read_arrivals
from hexgen2.errors import ConfigError


def write(folder: Path, text: str, name: str = "trace.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_trace_begins_at_zero(tmp_path: Path) -> None:
    trace = read_arrivals(write(tmp_path, "arrival_s,input,output\n5.5,10,20\n7,30,40\n"))
    assert list(trace) == [Row(0.0, 10, 20), Row(1.5, 30, 40)]
    assert (len(trace), trace.longest_prompt, trace.notes) == (2, 30, ())
    assert trace.rate == pytest.approx(1 / 1.5)


def test_dates_json_lines_and_gzip_are_read(tmp_path: Path) -> None:
    azure = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,374,44\n2023-11-16 18:15:50.68,396,109\n"
    assert list(read_arrivals(write(tmp_path, azure)))[1] == Row(4.0, 396, 109)
    path = tmp_path / "trace.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write('{"timestamp": 3, "input_length": 7, "output_length": 8}\n')
    assert list(read_arrivals(path)) == [Row(0.0, 7, 8)]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("time,input,output\n1,2,3\n", r"trace.csv:2: arrival_s: no such column"),
        ("arrival_s,output\n1,3\n", r"trace.csv:2: prompt_tokens: no such column"),
        ("arrival_s,input,output\n0,1,2\nsoon,1,2\n", r"trace.csv:3: arrival_s: 'soon' is no time"),
        ("arrival_s,input,output\n0,1,2\nnan,1,2\n", r"trace.csv:3: arrival_s: 'nan' is no time"),
        ("arrival_s,input,output\n0,1,2\n-1,1,2\n", r"trace.csv:3: a negative time; --repair"),
        ("arrival_s,input,output\n2,1,2\n1,1,2\n", r"trace.csv:3: a time before the one above it; --repair"),
        ("arrival_s,input,output\n2,0,2\n", r"trace.csv:2: no prompt tokens; --repair"),
        ("arrival_s,input,output\n2,1,0\n", r"trace.csv:2: no output tokens; --repair"),
        ("arrival_s,input,output\n2,1.5,1\n", r"trace.csv:2: input: '1.5' is not a number of tokens"),
        ("arrival_s,input,output\n", r"trace.csv:1: no requests"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        read_arrivals(write(tmp_path, text))


def test_repair_sorts_leaves_out_and_says_so(tmp_path: Path) -> None:
    text = "arrival_s,input,output\n5,1,2\n3,3,4\n-1,5,6\n6,0,1\n7,1,0\n8,7,8\n"
    trace = read_arrivals(write(tmp_path, text), repair=True)
    assert list(trace) == [Row(0.0, 3, 4), Row(2.0, 1, 2), Row(5.0, 7, 8)]
    assert [note.split(": ", 1)[1] for note in trace.notes] == [
        "a time before the one above it (1 such): sorted",
        "a negative time (1 such): left out",
        "no prompt tokens (1 such): left out",
        "no output tokens (1 such): left out",
    ]
