"""Reads the measured tables that efficiencies and engine profiles are fitted to. The tables stay where they are."""

import csv
import gzip
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import NamedTuple

from hexgen2.errors import ConfigError

GEMM = "aic_gemm_bf16_llama.csv.gz"
ATTENTION = "aic_attention_bf16.csv.gz"
COMM = "aic_comm.csv.gz"
LAYERS = "layer_times_a6000_3090_h100.csv"
MODEL = "llama2_70b_tp4_measured.csv"

#: The tables' names of GPUs, and the catalog's.
SYSTEMS: Mapping[str, str] = {
    "a100_sxm": "A100-SXM",
    "h100_sxm": "H100-SXM",
    "h200_sxm": "H200-SXM",
    "l40s": "L40S",
    "A6000": "A6000",
    "RTX3090": "RTX-3090",
    "a100-80gb": "A100-SXM",
    "h100-80gb": "H100-SXM",
}

#: All-reduce: which collection speaks for a link class. NCCL where every GPU reaches every other directly. Most
#: collections on L40S had no direct access between GPUs (33 MB over 8 take 26-39 ms instead of 2.9); planning assumes
#: hosts that have it, hence the one collection that had.
COLLECTIONS: Mapping[str, tuple[str, str, str]] = {
    "nvlink-3": ("a100_sxm", "nccl/2.27.3", "NCCL"),
    "nvlink-4": ("h100_sxm", "nccl/2.27.3", "NCCL"),
    "pcie-4": ("l40s", "sglang/0.5.12", "SGLang_CustomAllReduce_graph"),
}


class Gemm(NamedTuple):
    """A matrix product: m tokens by a k x n matrix."""

    m: int
    n: int
    k: int
    seconds: float
    role: str


class Attention(NamedTuple):
    """One layer's attention over ``tokens`` each of ``batch`` requests."""

    batch: int
    tokens: int
    num_heads: int
    num_kv_heads: int
    seconds: float


class AllReduce(NamedTuple):
    """Of ``payload_bytes`` over ``num_gpus``."""

    num_gpus: int
    payload_bytes: int
    seconds: float


class Measured(NamedTuple):
    """A whole model's step: ``prompt_s`` of a batch of prompts, ``token_s`` of its decode steps."""

    gpu: str
    tensor_parallel_size: int
    prompt_tokens: int
    batch: int
    output_tokens: int
    prompt_s: float
    token_s: float


def gemms(folder: Path) -> Mapping[str, tuple[Gemm, ...]]:
    """By GPU: medians over the frameworks, and the plain layers of the A6000 and RTX 3090."""
    by_gpu: dict[str, dict[tuple[int, int, int, str], list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in _rows(folder / GEMM):
        if row["system"] in SYSTEMS:
            key = (int(row["m"]), int(row["n"]), int(row["k"]), row["role"])
            by_gpu[SYSTEMS[row["system"]]][key].append(float(row["latency"]) / 1e3)
    for gpu, found in _layer_gemms(folder).items():
        if gpu != "H100-SXM":  # That one judges: see fit_report.
            for gemm in found:
                by_gpu[gpu][gemm.m, gemm.n, gemm.k, gemm.role].append(gemm.seconds)
    return {gpu: tuple(Gemm(m, n, k, median(s), r) for (m, n, k, r), s in rows.items()) for gpu, rows in by_gpu.items()}


def held_out_gemms(folder: Path) -> tuple[Gemm, ...]:
    """Layers of Llama-3.1-70B on H100 from another collection than the one fitted to."""
    return _layer_gemms(folder)["H100-SXM"]


def attention(folder: Path, phase: str) -> Mapping[str, tuple[Attention, ...]]:
    """By GPU, ``phase`` context (whole prompts) or generation (one token each); medians over the frameworks."""
    by_gpu: dict[str, dict[tuple[int, int, int, int], list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in _rows(folder / ATTENTION):
        prefix, prompt = int(row["step"]), int(row["isl"])
        if row["system"] not in SYSTEMS or row["phase"] != phase or (phase == "context" and prefix):
            continue
        tokens = prompt if phase == "context" else prompt + prefix
        key = (int(row["batch_size"]), tokens, int(row["num_heads"]), int(row["num_key_value_heads"]))
        by_gpu[SYSTEMS[row["system"]]][key].append(float(row["latency"]) / 1e3)
    return {gpu: tuple(Attention(*key, median(s)) for key, s in rows.items()) for gpu, rows in by_gpu.items()}


def all_reduces(folder: Path) -> Mapping[str, tuple[AllReduce, ...]]:
    """By link class."""
    found: dict[str, dict[tuple[int, int], list[float]]] = defaultdict(lambda: defaultdict(list))
    rows = [row for row in _rows(folder / COMM) if row["op_name"] == "all_reduce" and row["dtype"] != "int8"]
    for link, source in COLLECTIONS.items():
        for row in rows:
            if (row["system"], row["fw"], row["kernel_source"]) == source:
                # message_size counts elements of two bytes.
                key = (int(row["num_gpus"]), 2 * int(row["message_size"]))
                found[link][key].append(float(row["latency"]) / 1e3)
    return {link: tuple(AllReduce(*key, median(s)) for key, s in sizes.items()) for link, sizes in found.items()}


def measured(path: Path) -> tuple[Measured, ...]:
    """Whole-model steps; rows of one prompt and batch that differ in the answer's length alone are one setting."""
    settings: dict[tuple[str, int, int, int], list[tuple[int, float, float]]] = defaultdict(list)
    for row in _rows(path):
        size, prompt, batch = (int(row[name]) for name in ("tensor_parallel", "prompt_size", "batch_size"))
        key = (SYSTEMS[row["hardware"]], size, prompt, batch)
        settings[key].append((int(row["token_size"]), float(row["prompt_time"]) / 1e3, float(row["token_time"]) / 1e3))
    return tuple(
        Measured(*key, *(median(column) for column in zip(*rows, strict=True))) for key, rows in settings.items()
    )


def _layer_gemms(folder: Path) -> Mapping[str, tuple[Gemm, ...]]:
    shapes: Mapping[tuple[str, str], Callable[[int], tuple[int, int]]] = {
        ("Llama-3.1-8B", "q_proj"): lambda d: (4096 // d, 4096),
        ("Llama-3.1-8B", "o_proj"): lambda d: (4096, 4096 // d),
        ("Llama-3.1-8B", "gate_proj"): lambda d: (14336 // d, 4096),
        ("Llama-3.1-8B", "down_proj"): lambda d: (4096, 14336 // d),
        ("Llama-3.1-70B", "q_proj"): lambda d: (8192 // d, 8192),
        ("Llama-3.1-70B", "o_proj"): lambda d: (8192, 8192 // d),
        ("Llama-3.1-70B", "gate_proj"): lambda d: (28672 // d, 8192),
        ("Llama-3.1-70B", "down_proj"): lambda d: (8192, 28672 // d),
    }
    found: dict[str, list[Gemm]] = defaultdict(list)
    for row in _rows(folder / LAYERS):
        shape = shapes.get((row["model"], row["layer_name"]))
        gpu = {"A6000": "A6000", "RTX3090": "RTX-3090", "H100": "H100-SXM"}.get(row["gpu"])
        if shape and gpu and (gpu != "H100-SXM" or row["model"] == "Llama-3.1-70B"):
            role = f"{row['model']}:{row['layer_name']}:tp{row['tp']}"
            found[gpu].append(Gemm(int(row["input"]), *shape(int(row["tp"])), float(row["latency(ns)"]) / 1e9, role))
    return {gpu: tuple(rows) for gpu, rows in found.items()}


def _rows(path: Path) -> Iterable[Mapping[str, str]]:
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            yield from csv.DictReader(file)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
