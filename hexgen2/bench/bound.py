"""What no implementation could beat on this machine: copies cost processor time, and there are so many processors."""

import os
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from statistics import median
from threading import Barrier
from time import perf_counter

import numpy as np
import torch

from hexgen2.kv.host_memory import buffer

#: Copies beside the transport's own: out of the engine's layout. What lands may land where it stays.
COPIES = {"protocol": 0, "gather": 1, "digest": 1}
_TOGETHER_S = 60.0


def used_s(*pids: int) -> float:
    """Processor time of processes, all threads that live, as the scheduler counts it (nanoseconds, not ticks)."""
    total = 0
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            try:
                total += int((task / "schedstat").read_text().split()[0])
            except (OSError, ValueError):
                continue  # it has just ended
    return total / 1e9


def copy_s(num_bytes: int, repeat: int) -> float:
    """Seconds that a core takes to copy so much from memory to memory while all others do the same; the median."""
    num_cores = os.cpu_count() or 1
    together = Barrier(num_cores)

    def copy() -> list[float]:
        to, of = (buffer(num_bytes, torch.device("cpu")).fill_(1).numpy() for _ in range(2))
        taken = []
        for _ in range(repeat + 1):
            together.wait(_TOGETHER_S)
            began = perf_counter()
            np.copyto(to, of)
            taken.append(perf_counter() - began)
        return taken[1:]

    with ThreadPoolExecutor(num_cores) as cores:
        return median(chain.from_iterable(cores.map(lambda _: copy(), range(num_cores))))


def least_s(stage: str, raw_s: float, raw_cpu_s: float, one_copy_s: float) -> float:
    """The least time for a hand-over, if nothing but the bytes cost anything and all overlapped perfectly.

    Args:
        stage: one of ``COPIES``.
        raw_s: that the bare transport takes.
        raw_cpu_s: processor time of both ends meanwhile.
        one_copy_s: see ``copy_s``.
    """
    return max(raw_s, (raw_cpu_s + COPIES[stage] * one_copy_s) / (os.cpu_count() or 1))
