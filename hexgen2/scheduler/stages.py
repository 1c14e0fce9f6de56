"""The rows of pipeline stages that costs are asked for."""

import math
from typing import NamedTuple


class Stage(NamedTuple):
    """A pipeline stage: ``num_layers`` on ``tensor_parallel_size`` GPUs of one type, and its links (bytes/s, s)."""

    gpu: str
    tensor_parallel_size: int
    num_layers: int
    #: Between the GPUs of this stage.
    tp_bandwidth_bytes_per_s: float
    tp_latency_s: float
    #: To the next stage; of no meaning in the last one.
    next_bandwidth_bytes_per_s: float = math.inf
    next_latency_s: float = 0.0


Stages = tuple[Stage, ...]
