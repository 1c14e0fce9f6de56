"""What would change the answer: the same search with one GPU more of a type, faster network cards, or smaller KV."""

from dataclasses import replace

from hexgen2.cluster import Cluster, Link, Machine
from hexgen2.kv.codecs import NONE
from hexgen2.scheduler.problem import Problem
from hexgen2.scheduler.report import Change
from hexgen2.scheduler.schedule import solve

#: Network cards are tried this much faster.
FASTER = 10
#: The codec that is tried: the most exact.
CODEC = "int8"
#: The machine that is added.
ADDED = "one-more"


def changes(problem: Problem, least_rps: float, *, kind: str, evaluations: int, seed: int) -> tuple[Change, ...]:
    """Each change's throughput, by a plan of its own: at least ``least_rps``, which needs no change. ConfigError."""
    cluster = problem.cluster
    tried = [(f"+1 {gpu.name}", _with_one_more(cluster, gpu.name)) for gpu in cluster.gpu_types]
    if len(cluster.machines) > 1:
        tried.append((f"network cards and links {FASTER} times as fast", _faster(cluster)))
    others = [(what, replace(problem, cluster=changed)) for what, changed in tried]
    if len(cluster.machines) > 1 and problem.codecs == (NONE,):
        others.append((f"KV in {CODEC} between machines", replace(problem, codecs=(NONE, CODEC))))
    return tuple(
        Change(what, max(least_rps, found.throughput_rps))
        for what, other in others
        for found in (solve(other, kind=kind, evaluations=evaluations, seed=seed, exact=False),)
    )


def _with_one_more(cluster: Cluster, gpu: str) -> Cluster:
    """A GPU more in a machine of its own, beside the first that has this type."""
    host = next(machine for machine in cluster.machines if gpu in dict(machine.gpus))
    names = {machine.name for machine in cluster.machines}
    name = ADDED
    while name in names:
        name += "-"
    added: Machine = host.model_copy(update={"name": name, "gpus": ((gpu, 1),), "price_per_hour": None})
    return cluster.model_copy(update={"machines": (*cluster.machines, added)})


def _faster(cluster: Cluster) -> Cluster:
    def links(each: tuple[Link, ...]) -> tuple[Link, ...]:
        return tuple(
            link.model_copy(update={"bandwidth_bytes_per_s": FASTER * link.bandwidth_bytes_per_s}) for link in each
        )

    machines = tuple(
        machine.model_copy(update={"nic_bandwidth_bytes_per_s": FASTER * machine.nic_bandwidth_bytes_per_s})
        for machine in cluster.machines
    )
    return cluster.model_copy(
        update={
            "machines": machines,
            "site_links": links(cluster.site_links),
            "machine_links": links(cluster.machine_links),
        }
    )
