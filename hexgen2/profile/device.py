"""What a device of this machine does by itself, measured through torch: products, memory, and starting small work."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

#: Rows and columns of the product that is timed, by kind of device, and of the memory that is copied.
GEMM_SIZE = {"cpu": 1024, "cuda": 8192}
COPY_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
#: A layer's worth of small operations, launched one after the other.
SMALL_OPS = 200


@dataclass(frozen=True, slots=True)
class DeviceFigures:
    """One device of this machine: dense FLOP/s, bytes/s (read and written), seconds to start one small operation."""

    name: str
    kind: str
    memory_bytes: int
    flops: float
    memory_bandwidth_bytes_per_s: float
    launch_s: float


def devices() -> tuple[str, ...]:
    """Devices of this machine as torch names them: all GPUs, or its CPU where there is none."""
    if torch.cuda.is_available():
        return tuple(f"cuda:{number}" for number in range(torch.cuda.device_count()))
    return ("cpu",)


def measure(device: str, dtype: str, memory_bytes: int, seconds: float) -> DeviceFigures:
    """Measure one device for about ``seconds``, with one thread on a CPU, as a core of a plan has it.

    ``memory_bytes`` is told for a CPU; a GPU's driver says its own.
    """
    kind = torch.device(device).type
    name = "cpu"
    if kind == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, memory_bytes = properties.name, properties.total_memory
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            flops = _flops(device, kind, getattr(torch, dtype), seconds / 3)
            bandwidth = _bandwidth(device, kind, seconds / 3)
            launch_s = _launch_s(device, seconds / 3)
    finally:
        torch.set_num_threads(threads)
    return DeviceFigures(name, kind, memory_bytes, flops, bandwidth, launch_s)


def _flops(device: str, kind: str, dtype: torch.dtype, seconds: float) -> float:
    size = GEMM_SIZE[kind]
    one, other = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2.0 * size**3 / _seconds(lambda: one @ other, device, seconds)


def _bandwidth(device: str, kind: str, seconds: float) -> float:
    source = torch.ones(COPY_BYTES[kind], dtype=torch.uint8, device=device)
    into = torch.empty_like(source)
    return 2.0 * len(source) / _seconds(lambda: into.copy_(source), device, seconds)


def _launch_s(device: str, seconds: float) -> float:
    small = torch.ones(64, device=device)

    def row() -> None:
        for _ in range(SMALL_OPS):
            small.add_(1.0)

    return _seconds(row, device, seconds) / SMALL_OPS


def _seconds(work: Callable[[], object], device: str, seconds: float) -> float:
    """Median time of ``work`` over as many runs as fit, after one that warms up."""

    def once() -> float:
        began = time.perf_counter()
        work()
        if device != "cpu":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    once()
    until, taken = time.perf_counter() + seconds, [once()]
    while time.perf_counter() < until:
        taken.append(once())
    return median(taken)
