"""The paper's evaluation: which requests of a trace stand for it."""

import gzip
from pathlib import Path
from statistics import mean

import pytest

from benchmarks.paper.cell import TRACE, Effort, lengths


def trace(folder: Path, prompts: list[int]) -> Path:
    rows = [f"{second},{tokens},100" for second, tokens in enumerate(prompts)]
    with gzip.open(folder / TRACE, "wt", encoding="utf-8") as file:
        file.write("\n".join(["arrival_s,prompt_tokens,output_tokens", *rows]) + "\n")
    return folder


@pytest.mark.parametrize("count", [40, 70, 99, 400])
def test_any_number_of_requests_is_a_fair_sample_of_the_trace(tmp_path: Path, count: int) -> None:
    # Prompts grow all day long.
    prompts = [600 + 10 * number for number in range(100)]
    source, told = lengths("HPLD", Effort(trace(tmp_path, prompts), offline=count, online=10))
    assert source is not None
    assert told == "trace"
    picked = [each.prompt_tokens for each in source.arrivals]
    assert len(picked) == min(count, 100)
    assert mean(picked) == pytest.approx(mean(prompts), rel=0.02)
    half = len(picked) // 2
    assert mean(picked[:half]) == pytest.approx(mean(prompts), rel=0.2)
    assert source.longest_prompt == max(prompts)
