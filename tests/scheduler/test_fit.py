"""The fit: it can be made again from the measured tables, its errors are within bounds, and it finds what is there."""

from pathlib import Path

import numpy as np
import pytest

from hexgen2 import catalog
from hexgen2.cluster_file import catalog_gpu
from hexgen2.errors import ConfigError
from hexgen2.scheduler import fit_kernels
from hexgen2.scheduler.efficiency import DEFAULT, DEFAULT_ENGINE, Efficiency, efficiency, engine
from hexgen2.scheduler.fit import Fit, fit, judge_file
from hexgen2.scheduler.fit_data import MODEL, AllReduce, Attention, Gemm, measured
from hexgen2.scheduler.fit_files import markdown, write
from hexgen2.scheduler.kernels import blended_max

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no measured data in {DATA}")


@pytest.fixture(scope="module")
def found() -> Fit:
    return fit(DATA)


@needs_data
def test_the_catalog_is_what_the_data_say(found: Fit) -> None:
    table = catalog.table("efficiencies")
    for part, fitted in (("gpus", found.kernels), ("links", found.links)):
        assert table[part].keys() == fitted.keys()
        for name, entry in fitted.items():
            assert table[part][name] == pytest.approx(entry, rel=0.01, abs=1e-9), name
    entry = catalog.table("engines")["engines"][DEFAULT_ENGINE]
    for gpu, host in found.engine["hosts"].items():
        assert entry["hosts"][gpu] == pytest.approx(host, rel=0.02, abs=1e-13)
    assert entry["prefill_s"] == pytest.approx(found.engine["prefill_s"], rel=0.02)


@needs_data
def test_measurements_that_were_left_out_are_predicted_within_15_percent(found: Fit) -> None:
    steps = [error for error in found.errors if error.held_out and "each predicted" in error.what]
    assert {(error.gpu, error.what.split(",")[0]) for error in steps} == {
        (gpu, phase) for gpu in ("A100-SXM", "H100-SXM") for phase in ("prefill", "decode step")
    }
    assert all(error.p50 < 0.15 for error in steps)
    assert all(error.p50 < 0.15 for error in found.errors), "nor is any kernel further off"


@needs_data
def test_a_file_of_other_measurements_is_judged_by_degree(found: Fit, tmp_path: Path) -> None:
    text = (DATA / MODEL).read_text().replace("a100-80gb,4,", "a100-80gb,8,")
    (tmp_path / "other.csv").write_text(text)
    errors = judge_file(tmp_path / "other.csv", found)
    assert {(error.gpu, error.what.split()[-3]) for error in errors} == {("A100-SXM", "8"), ("H100-SXM", "4")}
    assert all(error.held_out for error in errors)


@needs_data
def test_a_fit_is_kept_so_that_it_reads_back(found: Fit, tmp_path: Path) -> None:
    import yaml

    paths = write(found, tmp_path)
    assert [path.name for path in paths] == ["efficiencies.yaml", "engines.yaml"]
    assert yaml.safe_load(paths[0].read_text())["gpus"] == found.kernels
    assert "| prefill, TP 4 | A100-SXM | yes |" in markdown(found.errors)


def test_repeats_of_a_setting_count_once(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    head = "model,hardware,tensor_parallel,prompt_size,batch_size,token_size,prompt_time,token_time,e2e_time\n"
    path.write_text(head + "".join(f"x,a100-80gb,4,512,1,{n},{100 + n},50,0\n" for n in (1, 2, 9)))
    (row,) = measured(path)
    assert (row.gpu, row.tensor_parallel_size, row.prompt_tokens, row.batch, row.output_tokens) == (
        "A100-SXM",
        4,
        512,
        1,
        2,
    )
    assert row.prompt_s == pytest.approx(0.102)


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"aic_gemm_bf16_llama.csv.gz: No such file"):
        fit(tmp_path)


def test_products_made_with_known_efficiencies_give_these_back() -> None:
    gpu = catalog_gpu("A100-SXM")
    rows = []
    for m in 2 ** np.arange(0, 16):
        for n, k in ((8192, 8192), (2048, 8192), (8192, 3584)):
            compute, read = 2.0 * m * n * k / gpu.flops / 0.8, 2.0 * (n * k + m * (n + k)) / 2.039e12 / 0.7
            rows.append(Gemm(int(m), n, k, 4e-6 + float(blended_max(compute, read, 2.0)), "made"))
    entry = fit_kernels.fit_gemm(gpu, rows)
    assert entry == pytest.approx({"compute": 0.8, "memory": 0.7, "gemm_s": 4e-6, "blend": 2.0}, rel=0.01)


def test_attention_and_collectives_made_with_known_figures_give_these_back() -> None:
    gpu = catalog_gpu("H100-SXM")
    prompts = [Attention(1, s, 16, 2, 9e-6 + 2.0 * s * s * 16 * 128 / gpu.flops / 0.5) for s in (64, 512, 4096, 16384)]
    cached = [Attention(8, s, 16, 2, 7e-6 + 4.0 * 8 * s * 2 * 128 / 3.35e12 / 0.6) for s in (64, 512, 4096, 65536)]
    sums = [
        AllReduce(d, b, 8e-6 + 2e-6 * (d - 1) + 2 * (d - 1) / d * b / 450e9 / 0.6)
        for d in (2, 4, 8)
        for b in (1 << 10, 1 << 16, 1 << 22, 1 << 28)
    ]
    assert fit_kernels.fit_prompt_attention(gpu, prompts) == pytest.approx(
        {"attention_compute": 0.5, "attention_s": 9e-6}, rel=0.01
    )
    assert fit_kernels.fit_cached_attention(gpu, cached) == pytest.approx(
        {"attention_memory": 0.6, "cached_attention_s": 7e-6}, rel=0.01
    )
    assert fit_kernels.fit_all_reduce(450e9, sums) == pytest.approx(
        {"all_reduce_s": 8e-6, "all_reduce_hop_s": 2e-6, "all_reduce_bandwidth": 0.6}, rel=0.01
    )


def test_what_the_catalog_keeps_is_physical() -> None:
    table = catalog.table("efficiencies")
    for entry in table["gpus"].values():
        assert all(0.2 < entry[part] <= 1 for part in ("compute", "memory", "attention_compute", "attention_memory"))
        assert 0 <= entry["gemm_s"] < 5e-5
    for entry in table["links"].values():
        assert 0.2 < entry["all_reduce_bandwidth"] <= 1


def test_every_gpu_of_the_catalog_has_efficiencies_and_hosts() -> None:
    measured_gpus = catalog.table("efficiencies")["gpus"]
    for name in catalog.names("gpus"):
        gpu = catalog_gpu(name)
        assert isinstance(efficiency(gpu), Efficiency)
        assert (gpu.efficiency or gpu.name) in measured_gpus, "its own or, openly, another's"
        assert engine().host(gpu).layer_s > 0
    assert DEFAULT in measured_gpus


@needs_data
def test_the_published_errors_are_those_of_the_fit(found: Fit) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "cost-model.md").read_text()
    assert markdown(found.errors) in page
