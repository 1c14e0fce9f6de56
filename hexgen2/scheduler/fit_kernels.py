"""Fits a GPU's efficiencies to measured kernels: least squares of log errors, with large errors counted linearly.

Nothing here knows of tensor parallelism: a shape is a shape, so what is fitted at one degree holds at another.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from hexgen2.cluster import GpuType
from hexgen2.scheduler.fit_data import AllReduce, Attention, Gemm
from hexgen2.scheduler.kernels import blended_max

Array = NDArray[np.float64]


def fit_gemm(gpu: GpuType, rows: Sequence[Gemm]) -> dict[str, float]:
    """``compute``, ``memory``, ``gemm_s`` and ``blend``."""
    m, n, k, seconds = (np.array([row[index] for row in rows], float) for index in range(4))
    flops, read = 2 * m * n * k / gpu.flops, 2 * (n * k + m * (n + k)) / gpu.memory_bandwidth_bytes_per_s
    # Every octave of token counts counts alike: the tables have most rows at few tokens.
    octave = np.floor(np.log2(m))
    weights = 1 / np.sqrt(np.array([np.sum(octave == one) for one in octave]))

    def predict(x: Array) -> Array:
        compute, memory, fixed, blend = x
        return np.asarray(fixed * 1e-6 + blended_max(flops / compute, read / memory, blend))

    found = _least_squares(predict, seconds, weights, [0.7, 0.7, 3.0, 3.0], [0.2, 0.2, 0.1, 1.2], [1.0, 1.0, 40.0, 8.0])
    return {"compute": found[0], "memory": found[1], "gemm_s": found[2] * 1e-6, "blend": found[3]}


def fit_prompt_attention(gpu: GpuType, rows: Sequence[Attention], head_dim: int = 128) -> dict[str, float]:
    """``attention_compute`` and ``attention_s``."""
    flops = np.array([2.0 * r.batch * r.tokens**2 * r.num_heads * head_dim for r in rows]) / gpu.flops
    seconds = np.array([row.seconds for row in rows])

    def predict(x: Array) -> Array:
        return np.asarray(x[1] * 1e-6 + flops / x[0])

    found = _least_squares(predict, seconds, np.ones(len(rows)), [0.5, 10.0], [0.05, 0.1], [1.0, 100.0])
    return {"attention_compute": found[0], "attention_s": found[1] * 1e-6}


def fit_cached_attention(gpu: GpuType, rows: Sequence[Attention], head_dim: int = 128) -> dict[str, float]:
    """``attention_memory`` and ``cached_attention_s``. Without rows that a cache on the chip served."""
    read = np.array([4.0 * r.batch * r.tokens * r.num_kv_heads * head_dim for r in rows])
    read = read / gpu.memory_bandwidth_bytes_per_s
    seconds = np.array([row.seconds for row in rows])
    real = read < seconds
    read, seconds = read[real], seconds[real]

    def predict(x: Array) -> Array:
        return np.asarray(x[1] * 1e-6 + read / x[0])

    found = _least_squares(predict, seconds, np.ones(len(read)), [0.7, 10.0], [0.05, 0.1], [1.0, 100.0])
    return {"attention_memory": found[0], "cached_attention_s": found[1] * 1e-6}


def fit_all_reduce(bandwidth_bytes_per_s: float, rows: Sequence[AllReduce]) -> dict[str, float]:
    """``all_reduce_s`` (once), ``all_reduce_hop_s`` (for each further GPU) and ``all_reduce_bandwidth``."""
    size, payload, seconds = (np.array([row[index] for row in rows], float) for index in range(3))
    wire = 2 * (size - 1) / size * payload / bandwidth_bytes_per_s

    def predict(x: Array) -> Array:
        return np.asarray(x[0] * 1e-6 + x[1] * 1e-6 * (size - 1) + wire / x[2])

    found = _least_squares(predict, seconds, np.ones(len(rows)), [8.0, 2.0, 0.7], [0.1, 0.0, 0.05], [100.0, 50.0, 1.0])
    return {"all_reduce_s": found[0] * 1e-6, "all_reduce_hop_s": found[1] * 1e-6, "all_reduce_bandwidth": found[2]}


def _least_squares(
    predict: Callable[[Array], Array],
    seconds: Array,
    weights: Array,
    start: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
) -> list[float]:
    def residuals(x: Array) -> Array:
        return np.asarray(weights * np.log(predict(x) / seconds))

    answer = least_squares(residuals, start, bounds=(low, high), loss="soft_l1", f_scale=0.1, x_scale=np.abs(start))
    return [float(value) for value in answer.x]
