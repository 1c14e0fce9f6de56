"""Workloads: built-in ones, traces, mixes, and how mistakes are told."""

import gzip
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexgen2 import catalog
from hexgen2.errors import ConfigError
from hexgen2.request_trace import Request, read_trace, summarise
from hexgen2.workload import Workload
from hexgen2.workload_file import find_workload, load_workload

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no measured data in {DATA}")


def write(folder: Path, text: str, name: str = "workload.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def problem(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        find_workload(path)
    return str(caught.value)


def test_built_in_classes_are_heavy_where_their_names_say() -> None:
    for name in ("HPLD", "HPHD", "LPHD", "LPLD"):
        work = find_workload(name)
        assert (work.mean_prompt_tokens > 512) == name.startswith("HP")
        assert (work.mean_output_tokens > 128) == name.endswith("HD")
        assert sum(point.weight for point in work.lengths) == pytest.approx(1.0)


def test_shares_of_the_classes_are_the_traces() -> None:
    table = catalog.table("workloads")["workloads"]
    shares = [round(table[name]["share"], 3) for name in ("HPLD", "HPHD", "LPHD", "LPLD")]
    assert shares == [0.212, 0.394, 0.109, 0.286]


@needs_data
def test_built_in_workloads_are_what_the_traces_say() -> None:
    from hexgen2.scheduler.fit_workloads import fit_workloads

    assert fit_workloads(DATA) == catalog.table("workloads")["workloads"]


@needs_data
def test_a_table_keeps_the_traces_means() -> None:
    requests = read_trace(DATA / "azure2023_conv.csv.gz")
    table = find_workload("azure-conversation")
    outputs = sum(request.output_tokens for request in requests)
    context = sum(r.output_tokens * (r.prompt_tokens + r.output_tokens / 2) for r in requests) / outputs
    assert table.mean_prompt_tokens == pytest.approx(sum(r.prompt_tokens for r in requests) / len(requests), rel=0.002)
    assert table.mean_output_tokens == pytest.approx(outputs / len(requests), rel=0.002)
    assert table.mean_context_tokens == pytest.approx(context, rel=0.02)


@given(st.lists(st.builds(Request, st.integers(1, 9999), st.integers(1, 999)), min_size=1, max_size=200))
def test_any_trace_becomes_a_small_table_with_its_own_means(requests: list[Request]) -> None:
    table = summarise(requests)
    assert len(table) <= 36
    assert sum(point.weight for point in table) == pytest.approx(1.0)
    for field in ("prompt_tokens", "output_tokens"):
        mean = sum(getattr(request, field) for request in requests) / len(requests)
        assert sum(point.weight * getattr(point, field) for point in table) == pytest.approx(mean, abs=0.51)


def test_context_in_decode_counts_long_answers_for_longer(tmp_path: Path) -> None:
    mix = "mix: [{prompt_tokens: 100, output_tokens: 1, share: 1}, {prompt_tokens: 1000, output_tokens: 99, share: 1}]"
    work = load_workload(write(tmp_path, mix))
    assert work.mean_output_tokens == pytest.approx(50)
    assert work.mean_decode_tokens == pytest.approx(49)
    assert work.mean_context_tokens == pytest.approx((1 * 100.5 + 99 * 1049.5) / 100)


def test_a_file_sets_rate_and_limits(tmp_path: Path) -> None:
    work = load_workload(write(tmp_path, "lengths: hpld\nrate: 2.5\nslo: {ttft_s: 3, tpot_s: 0.2}\n"))
    assert (work.name, work.rate, work.ttft_s, work.tpot_s) == ("hpld", 2.5, 3.0, 0.2)


def test_a_mix_weighs_its_parts_by_their_shares(tmp_path: Path) -> None:
    work = load_workload(write(tmp_path, "mix: [{lengths: HPLD, share: 3}, {lengths: LPHD, share: 1}]"))
    parts = [find_workload(name).mean_prompt_tokens for name in ("HPLD", "LPHD")]
    assert work.mean_prompt_tokens == pytest.approx(0.75 * parts[0] + 0.25 * parts[1])


def test_the_longest_request_of_a_trace_must_be_taken(tmp_path: Path) -> None:
    rows = "\n".join(f"{100 + n},{10}" for n in range(1000))
    trace = tmp_path / "t.csv"
    trace.write_text(f"prompt_tokens,output_tokens\n{rows}\n5000,5\n40,6000\n")
    table = Workload(lengths=find_workload(trace).lengths)
    assert table.longest_prompt_tokens < table.longest_tokens < 2000, "a table has means alone"
    mix = "mix: [{trace: t.csv, share: 1}, {prompt_tokens: 3, output_tokens: 7000, share: 1}]"
    for text, prompt, total in (
        ("trace: t.csv", 5000, 6040),
        ("trace: t.csv\nmax_prompt_tokens: 3000", 3000, 6040),
        ("trace: t.csv\nmax_prompt_tokens: 9000\n", 9000, 9001),
        ("trace: t.csv\nmax_prompt_tokens: 10\nmax_total_tokens: 20", 10, 20),
        ("lengths: HPLD\nmax_prompt_tokens: 100", 100, 6589),
        (mix, 5000, 7003),
        ("lengths: HPLD", 6530, 6589),
    ):
        work = load_workload(write(tmp_path, text))
        assert (work.longest_prompt_tokens, work.longest_tokens) == (prompt, total), text
    assert find_workload(trace).longest_tokens == 6040


def test_nothing_longer_is_asked_of_a_model_than_it_takes() -> None:
    work = Workload(lengths=find_workload("lphd").lengths, max_prompt_tokens=3000, max_total_tokens=9000, rate=2.0)
    assert work.longest_tokens == 9000
    within = work.within(2048)
    assert (within.longest_prompt_tokens, within.longest_tokens, within.rate) == (2047, 2048, 2.0)
    assert work.within(9000) is work
    table = find_workload("hpld")
    assert table.within(2048) is table, "planned for as if the context were longer"
    trace = Workload(lengths=table.lengths, max_prompt_tokens=14_000, max_total_tokens=15_000)
    assert (trace.within(2048).longest_prompt_tokens, trace.within(2048).longest_tokens) == (2047, 2048)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", "arrival_s,input,output\n0,10,5\n1,30,0\n2,20,7\n"),
        ("t.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\nx,10,5\nx,20,7\n"),
        (
            "t.jsonl",
            '{"timestamp": 0, "input_length": 10, "output_length": 5}\n\n{"input_length": 20, "output_length": 7}',
        ),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_traces_of_several_forms_are_read(tmp_path: Path, name: str, text: str, zipped: bool) -> None:
    path = tmp_path / (name + ".gz" * zipped)
    path.write_bytes(gzip.compress(text.encode()) if zipped else text.encode())
    assert read_trace(path) == (Request(10, 5), Request(20, 7)), "requests without an answer are left out"
    relative = load_workload(write(tmp_path, f"trace: {path.name}"))
    assert relative.mean_prompt_tokens == find_workload(path).mean_prompt_tokens == 15


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lengths: HPLX", ":1: lengths: no file nor built-in workload `HPLX`; did you mean `HPLD`?"),
        ("lengths: HPLD\nrate: 0", ":2: rate: 0 should be greater than 0"),
        ("lengths: HPLD\nslo:\n  ttft_s: -1", ":3: slo.ttft_s: -1 should be greater than 0"),
        ("lengths: HPLD\nprompt_tokens: 3", ":1: exactly one of lengths, trace, prompt_tokens, mix is needed"),
        ("rate: 1", ":1: exactly one of lengths, trace, prompt_tokens, mix is needed; given: none"),
        ("prompt_tokens: 5", ":1: output_tokens: missing"),
        ("mix:\n  - {lengths: HPLD, share: -1}", ":2: mix.0.share: -1 should be greater than 0"),
        ("mix:\n  - {trace: gone.csv, share: 1}", ":2: mix.0.trace: no file"),
        ("mix: []", ":1: mix: no classes"),
        ("lengths: HPLD\nrates: 3", ":2: rates: no such field; did you mean `rate`?"),
    ],
)
def test_mistakes_are_told_by_file_line_and_field(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    told = problem(path)
    assert told.startswith(f"{path}{message}")
    assert "\n" not in told


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ":1: no requests"),
        ("input,output\n", ":1: no requests"),
        ("input,output\n5,0\n", ":1: none of its 1 requests has both prompt and answer"),
        ("input,output\n5,x\n", ":2: output: 'x' is not a number of tokens"),
        ("input,output\n5,nan\n", ":2: output: 'nan' is not a number of tokens"),
        ("input,output\n-5,1\n", ":2: input: '-5' is not a number of tokens"),
        ("a,b\n5,1\n", ":2: prompt_tokens: no such column"),
    ],
)
def test_bad_traces_are_told_by_file_line_and_column(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text, "trace.csv")
    assert problem(path).startswith(f"{path}{message}")
