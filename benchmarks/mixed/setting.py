"""What is measured: machines, a model, workloads, and what one might do with such machines without a planner."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil
from typing import Any

from hexgen2 import llm as llms
from hexgen2.cluster_file import make_cluster
from hexgen2.llm import Llm
from hexgen2.placement import Placement
from hexgen2.scheduler.efficiency import Engine, engine
from hexgen2.scheduler.problem import Problem
from hexgen2.workload import LengthClass, Workload

#: Which machines prefill; the others decode. None at all: every machine serves whole requests.
Prefill = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Setting:
    """``workloads``: tokens of prompts and answers. ``guesses``: by name, in which ways each may be had. ``by_speed``:
    those of them that share requests out by the machines' speeds; the others share them out evenly.
    """

    cluster: Mapping[str, Any]
    llm: Llm
    workloads: Mapping[str, tuple[int, int]]
    tpot_s: float
    guesses: Mapping[str, tuple[Prefill, ...]]
    by_speed: frozenset[str] = frozenset()
    engine: Engine = field(default_factory=engine)

    def workload(self, name: str) -> Workload:
        """By name; all requests alike, so that what is foretold is one number."""
        prompt, output = self.workloads[name]
        lengths = (LengthClass(prompt_tokens=prompt, output_tokens=output, weight=1.0),)
        return Workload(name=name, lengths=lengths, tpot_s=self.tpot_s)

    def problem(self, name: str) -> Problem:
        """What is planned for."""
        return Problem(make_cluster(self.cluster), self.llm, self.workload(name), engine=self.engine)


_C, _B = (tuple(f"{kind}-{number}" for number in range(3)) for kind in "cb")

#: Two kinds of device: C computes almost twice as fast, B reads more than half as fast again. Both are some fifty times
#: slower than GPUs of today, so that what the services themselves take on a few cores does not count.
EMULATED = Setting(
    cluster={
        "name": "mixed",
        "gpu_types": {
            "C": {"flops": 5.5e12, "memory_mib": 24000, "memory_bandwidth_bytes_per_s": 0.0325e12},
            "B": {"flops": 3.0e12, "memory_mib": 24000, "memory_bandwidth_bytes_per_s": 0.0525e12},
        },
        "machines": [
            {"name": "c", "count": 3, "gpus": {"C": 1}},
            {"name": "b", "count": 3, "gpus": {"B": 1}},
        ],
    },
    llm=llms.find("llama-3.1-8b"),
    workloads={"prefill-heavy": (500, 4), "decode-heavy": (16, 64)},
    tpot_s=0.65,
    guesses={
        "equal-split": ((_C[0], _B[0], _B[1]),),
        "round-robin": ((_C[0], _C[2], _B[1]),),
        "one-role-each": (_C, _B),
        "colocated": ((),),
    },
)


def in_flight(made: Problem, placement: Placement) -> int:
    """Requests at a time that keep the bottleneck busy, with little more than that waiting before it."""
    decoding = [each for each in placement.replicas if each.tpot_s is not None]
    answer_s = max(each.tpot_s or 0.0 for each in decoding) * (made.workload.mean_output_tokens - 1)
    most = sum(each.batch or 1 for each in decoding)
    prefilling = sum(each.role != "decode" for each in placement.replicas)
    return 2 * prefilling + min(most, ceil(1.1 * placement.throughput_rps * answer_s))
