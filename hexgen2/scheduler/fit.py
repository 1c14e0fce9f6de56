"""The whole fit: measured tables in, the catalog's efficiencies and engine profile out, and how far off they are.

Errors are of two kinds: of the fit itself, and of predictions for measurements that were left out of it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hexgen2 import catalog
from hexgen2.cluster import GpuType
from hexgen2.cluster_file import catalog_gpu
from hexgen2.scheduler import fit_data, fit_engine, fit_kernels
from hexgen2.scheduler.efficiency import DEFAULT, Efficiency
from hexgen2.scheduler.fit_data import Gemm, Measured
from hexgen2.scheduler.kernels import blended_max

#: Whole-model steps are fitted with each of so many parts left out in turn, to be predicted by the rest.
FOLDS = 5


@dataclass(frozen=True, slots=True)
class Error:
    """Of predictions against measurements, relative: median and 90th percentile of its size, median with its sign."""

    what: str
    gpu: str
    held_out: bool
    count: int
    p50: float
    p90: float
    bias: float


@dataclass(frozen=True, slots=True)
class Fit:
    """What the catalog gets, and the errors."""

    kernels: Mapping[str, Mapping[str, float]]
    links: Mapping[str, Mapping[str, float]]
    engine: Mapping[str, Any]
    errors: tuple[Error, ...]

    def efficiency(self, gpu: GpuType) -> Efficiency:
        """Of a GPU that was measured."""
        return Efficiency(**self.kernels[gpu.name], **self.links.get(gpu.link, self.links[DEFAULT]))


def fit(folder: Path) -> Fit:
    """Fit everything to the tables in ``folder``. Deterministic; seconds. Raises ConfigError when one is missing."""
    products, held_out = fit_data.gemms(folder), fit_data.held_out_gemms(folder)
    prompts, cached = (fit_data.attention(folder, phase) for phase in ("context", "generation"))
    kernels: dict[str, dict[str, float]] = {}
    errors: list[Error] = []
    for name in sorted(products):
        gpu, rows = catalog_gpu(name), products[name]
        kernels[name] = _rounded(fit_kernels.fit_gemm(gpu, rows))
        errors.append(judge_gemm("matrix products", gpu, kernels[name], rows, held_out=False))
        rest = [row for row in rows if not row.role.endswith(":tp8")]
        if len(rest) < len(rows):
            without = fit_kernels.fit_gemm(gpu, rest)
            shapes = [row for row in rows if row.role.endswith(":tp8")]
            errors.append(
                judge_gemm("matrix products of TP 8, fitted without them", gpu, without, shapes, held_out=True)
            )
        if name in prompts:
            kernels[name] |= _rounded(fit_kernels.fit_prompt_attention(gpu, prompts[name]))
            kernels[name] |= _rounded(fit_kernels.fit_cached_attention(gpu, cached[name]))
    h100 = catalog_gpu("H100-SXM")
    title = "layers of Llama-3.1-70B from another collection"
    errors.append(judge_gemm(title, h100, kernels["H100-SXM"], held_out, held_out=True))
    # The plainest attention fit stands for GPUs whose attention nobody measured.
    for name in kernels:
        kernels[name] = {**{field: kernels["L40S"][field] for field in kernels["L40S"]}, **kernels[name]}
    kernels[DEFAULT] = dict(kernels["L40S"])
    links = {}
    for link, collectives in fit_data.all_reduces(folder).items():
        bandwidth = float(catalog.table("links")["links"][link]["bandwidth_bytes_per_s"])
        links[link] = _rounded(fit_kernels.fit_all_reduce(bandwidth, collectives))
    links[DEFAULT] = dict(links["pcie-4"])
    steps = fit_data.measured(folder / fit_data.MODEL)
    efficiencies = _efficiencies(steps, kernels, links)
    engine = _rounded_tree(fit_engine.fit_engine(steps, efficiencies))
    errors += judge_steps("TP 4", fit_engine.predict(steps, engine, efficiencies), held_out=False)
    errors += judge_steps("TP 4, each predicted from the others", _left_out(steps, efficiencies), held_out=True)
    return Fit(kernels, links, engine, tuple(errors))


def judge_gemm(what: str, gpu: GpuType, entry: Mapping[str, float], rows: Sequence[Gemm], *, held_out: bool) -> Error:
    """Products against what was measured."""
    m, n, k, seconds = (np.array([row[index] for row in rows], float) for index in range(4))
    read = 2 * (n * k + m * (n + k)) / gpu.memory_bandwidth_bytes_per_s / entry["memory"]
    predicted = entry["gemm_s"] + blended_max(2 * m * n * k / gpu.flops / entry["compute"], read, entry["blend"])
    return _error(what, gpu.name, predicted / seconds, held_out=held_out)


def judge_steps(what: str, predictions: Sequence[fit_engine.Prediction], *, held_out: bool) -> list[Error]:
    """Whole-model steps against what was measured, by GPU and quantity."""
    errors = []
    for gpu in sorted({p.measured.gpu for p in predictions}):
        mine = [p for p in predictions if p.measured.gpu == gpu]
        prompts, tokens = (
            [p.prompt_s / p.measured.prompt_s for p in mine],
            [p.token_s / p.measured.token_s for p in mine],
        )
        errors.append(_error(f"prefill, {what}", gpu, prompts, held_out=held_out))
        errors.append(_error(f"decode step, {what}", gpu, tokens, held_out=held_out))
    return errors


def judge_file(path: Path, found: Fit) -> list[Error]:
    """Judge a fit on other measurements in the form of the fitted file, by GPU, TP degree and quantity."""
    steps = fit_data.measured(path)
    predictions = fit_engine.predict(steps, found.engine, _efficiencies(steps, found.kernels, found.links))
    errors: list[Error] = []
    for size in sorted({step.tensor_parallel_size for step in steps}):
        cell = [p for p in predictions if p.measured.tensor_parallel_size == size]
        errors += judge_steps(f"TP {size} of {path.name}", cell, held_out=True)
    return errors


def _left_out(steps: Sequence[Measured], efficiencies: Mapping[str, Efficiency]) -> list[fit_engine.Prediction]:
    found: list[fit_engine.Prediction] = []
    for fold in range(FOLDS):
        out = [step for number, step in enumerate(steps) if number % FOLDS == fold]
        rest = [step for number, step in enumerate(steps) if number % FOLDS != fold]
        found += fit_engine.predict(out, fit_engine.fit_engine(rest, efficiencies), efficiencies)
    return found


def _efficiencies(
    steps: Iterable[Measured], kernels: Mapping[str, Mapping[str, float]], links: Mapping[str, Mapping[str, float]]
) -> dict[str, Efficiency]:
    gpus = {step.gpu: catalog_gpu(step.gpu) for step in steps}
    return {name: Efficiency(**kernels[name], **links[gpu.link]) for name, gpu in gpus.items()}


def _error(what: str, gpu: str, ratios: Any, *, held_out: bool) -> Error:
    off = np.asarray(ratios) - 1
    size = np.abs(off)
    p50, p90, bias = (round(float(x), 3) for x in (np.median(size), np.quantile(size, 0.9), np.median(off)))
    return Error(what, gpu, held_out, len(off), p50, p90, bias)


def _rounded(entry: Mapping[str, float]) -> dict[str, float]:
    # Four digits are more than the data are good for, and the same on every machine.
    return {name: float(f"{value:.3e}") for name, value in entry.items()}


def _rounded_tree(entry: Any) -> Any:
    if isinstance(entry, Mapping):
        return {name: _rounded_tree(value) for name, value in entry.items()}
    return float(f"{entry:.3e}") if isinstance(entry, float) else entry
