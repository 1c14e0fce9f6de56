"""The large buffers that KV passes through."""

import mmap
from contextlib import suppress

import torch

_HUGE_BYTES = 2 << 20


def buffer(num_bytes: int, device: torch.device) -> torch.Tensor:
    """``uint8 [num_bytes]`` on ``device``.

    In host memory on huge pages, where Linux has them to give: copies and reads by other processes look up, and first
    touches fault in, 2 MiB at a time instead of 4 KiB. Memory that nobody touches takes none.
    """
    if device.type != "cpu" or num_bytes < _HUGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)
    memory = mmap.mmap(-1, num_bytes + _HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    begin = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % _HUGE_BYTES
    # It keeps the mapping. No slice: its storage begins where it does, as that of any new tensor.
    return torch.frombuffer(memory, dtype=torch.uint8, count=num_bytes, offset=begin)
