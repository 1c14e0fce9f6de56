"""Small clusters for the scheduler's tests."""

from hypothesis import strategies as st

from hexgen2 import llm as llms
from hexgen2.cluster import Cluster
from hexgen2.cluster_file import make_cluster
from hexgen2.scheduler.problem import Problem
from hexgen2.workload_file import find_workload

GPUS = ("H100-SXM", "A100-SXM", "L40", "A6000")


def cluster(machines: list[tuple[str, int, float]], names: list[str] | None = None) -> Cluster:
    """Machines as (GPU type, how many, network card in GB/s)."""
    fields = [
        {
            "name": names[number] if names else f"m{number}",
            "gpus": {gpu: count},
            "nic": {"bandwidth_bytes_per_s": nic * 1e9, "latency_s": 1e-5},
        }
        for number, (gpu, count, nic) in enumerate(machines)
    ]
    return make_cluster({"name": "test", "machines": fields}, "test")


def problem(
    machines: list[tuple[str, int, float]],
    model: str = "llama-3.1-8b",
    workload: str = "hphd",
    names: list[str] | None = None,
) -> Problem:
    return Problem(cluster(machines, names), llms.find(model), find_workload(workload))


#: Two to four machines with up to three GPUs each, fast or slow network cards.
machines = st.lists(
    st.tuples(st.sampled_from(GPUS), st.integers(1, 3), st.sampled_from([0.25, 1.25, 12.5])), min_size=2, max_size=4
)
