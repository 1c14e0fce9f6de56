"""Four alike GPUs, so slow that a request or two a second fill them, planned for long prompts and short answers."""

from pathlib import Path

from hexgen2 import llm as llms
from hexgen2.cluster_file import load_cluster
from hexgen2.placement import Placement
from hexgen2.scheduler.problem import Problem
from hexgen2.scheduler.schedule import solve
from hexgen2.simulator.planned import Planned
from hexgen2.simulator.settings import completed
from hexgen2.workload import LengthClass, Workload

CLUSTER = """\
name: slow-four
gpu_types:
  slow:
    flops: 10.0e12
    memory_mib: 32768
    memory_bandwidth_bytes_per_s: 75.0e9
    link: pcie-4
    efficiency: A100-SXM
machines:
  - {name: m, count: 4, gpus: {slow: 1}}
"""
WORKLOAD = "name: long-prompts\nprompt_tokens: 1000\noutput_tokens: 8\nslo: {ttft_s: 6.0, tpot_s: 0.3}\n"
MODEL = "llama-2-7b"


def workload(prompt: int, output: int, rate: float | None = None) -> Workload:
    lengths = (LengthClass(prompt_tokens=prompt, output_tokens=output, weight=1),)
    return Workload(name="long-prompts", lengths=lengths, rate=rate, ttft_s=6.0, tpot_s=0.3)


def problem(folder: Path, work: Workload) -> Problem:
    file = folder / "cluster.yaml"
    file.write_text(CLUSTER)
    return Problem(load_cluster(file), llms.find(MODEL), work)


def planned(folder: Path) -> Placement:
    made = problem(folder, workload(1000, 8))
    return completed(Planned(solve(made, kind="disaggregated", evaluations=200), made, 1000))
