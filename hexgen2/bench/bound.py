"""What no implementation could beat on this machine: copies cost processor time, and there are so many processors."""

import os
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import torch

from hexgen2.kv.host_memory import buffer

#: Copies beside the transport's own: out of the engine's layout at one end, to staging at the other.
COPIES = {"protocol": 0, "gather": 2, "digest": 2}


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
    """Seconds that one core takes to copy so much from memory to memory; the median."""
    cpu = torch.device("cpu")
    to, of = (buffer(num_bytes, cpu).fill_(1).numpy() for _ in range(2))
    taken = []
    for _ in range(repeat + 1):
        began = perf_counter()
        np.copyto(to, of)
        taken.append(perf_counter() - began)
    return median(taken[1:])


def least_s(stage: str, raw_s: float, raw_cpu_s: float, one_copy_s: float) -> float:
    """The least time for a hand-over, if nothing but the bytes cost anything and all overlapped perfectly.

    Args:
        stage: one of ``COPIES``.
        raw_s: that the bare transport takes.
        raw_cpu_s: processor time of both ends meanwhile.
        one_copy_s: see ``copy_s``.
    """
    return max(raw_s, (raw_cpu_s + COPIES[stage] * one_copy_s) / (os.cpu_count() or 1))
