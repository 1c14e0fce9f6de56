"""A cluster in the form that the search works on: pools of equal GPUs by number, and the links between machines.

A *pool* is all GPUs of one type in one machine; GPUs of a pool are interchangeable, so a group of GPUs is how many it
takes of each pool and never a list of GPUs. A *kind* is a GPU type with the links it has inside its machine: pools of
one kind are interchangeable but for where they stand.
"""

from dataclasses import dataclass
from functools import cached_property

from hexgen2.cluster import Cluster, Machine

#: How many GPUs of each pool: ((pool, count), ...), ascending, counts positive.
Parts = tuple[tuple[int, int], ...]
#: How many GPUs of each kind: ((kind, count), ...), ascending, counts positive.
Composition = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Kind:
    """A GPU type and its links to the others in its machine. ``max_count``: the most that one machine has."""

    gpu: str
    intra_bandwidth_bytes_per_s: float
    intra_latency_s: float
    max_count: int


@dataclass(frozen=True, slots=True)
class Pool:
    """``count`` GPUs of a kind in one machine."""

    machine: int
    kind: int
    count: int


@dataclass(frozen=True)
class Fabric:
    """Pools, kinds and links. ``site`` and ``nic`` go by machine number, as ``cluster.machines`` does here.

    Machines are sorted by what they are and kinds by compute, so neither names nor the order in a file matter.
    """

    cluster: Cluster
    kinds: tuple[Kind, ...]
    pools: tuple[Pool, ...]
    site: tuple[str, ...]
    nic: tuple[float, ...]
    bandwidth: tuple[tuple[float, ...], ...]
    latency: tuple[tuple[float, ...], ...]

    @staticmethod
    def of(cluster: Cluster) -> "Fabric":
        """The fabric of a cluster."""
        ordered = sorted(cluster.machines, key=lambda machine: _nature(cluster, machine))
        cluster = cluster.model_copy(update={"machines": tuple(ordered)})
        found: dict[tuple[str, float, float], int] = {}
        for machine in cluster.machines:
            for gpu, count in machine.gpus:
                key = (gpu, machine.intra_bandwidth_bytes_per_s, machine.intra_latency_s)
                found[key] = max(found.get(key, 0), count)
        order = sorted(found, key=lambda key: (-cluster.gpu_type(key[0]).flops, key))
        machines = cluster.machines
        return Fabric(
            cluster=cluster,
            kinds=tuple(Kind(*key, max_count=found[key]) for key in order),
            pools=tuple(
                Pool(number, order.index((gpu, each.intra_bandwidth_bytes_per_s, each.intra_latency_s)), count)
                for number, each in enumerate(machines)
                for gpu, count in each.gpus
                if count
            ),
            site=tuple(machine.site for machine in machines),
            nic=tuple(machine.nic_bandwidth_bytes_per_s for machine in machines),
            bandwidth=tuple(tuple(cluster.bandwidth(a, b) for b in machines) for a in machines),
            latency=tuple(tuple(cluster.latency(a, b) for b in machines) for a in machines),
        )

    @cached_property
    def num_gpus(self) -> int:
        """In all pools."""
        return sum(pool.count for pool in self.pools)

    @cached_property
    def sites(self) -> tuple[str, ...]:
        """Names, each once, sorted."""
        return tuple(sorted(set(self.site)))

    @cached_property
    def pools_by_site(self) -> dict[str, tuple[int, ...]]:
        """Pool numbers of each site."""
        return {
            site: tuple(i for i, pool in enumerate(self.pools) if self.site[pool.machine] == site)
            for site in self.sites
        }

    def composition(self, parts: Parts) -> Composition:
        """How many of each kind a group takes."""
        counts: dict[int, int] = {}
        for pool, count in parts:
            kind = self.pools[pool].kind
            counts[kind] = counts.get(kind, 0) + count
        return tuple(sorted(counts.items()))

    def machines(self, parts: Parts) -> frozenset[int]:
        """Numbers of the machines that a group stands on."""
        return frozenset(self.pools[pool].machine for pool, _ in parts)


def _nature(cluster: Cluster, machine: Machine) -> tuple[object, ...]:
    """Everything about a machine but its name: what it has, then how well it is linked to what others have."""
    links = sorted(
        (cluster.bandwidth(machine, other), cluster.latency(machine, other), other.gpus)
        for other in cluster.machines
        if other.name != machine.name
    )
    return (
        machine.site,
        machine.gpus,
        machine.intra_bandwidth_bytes_per_s,
        machine.intra_latency_s,
        machine.nic_bandwidth_bytes_per_s,
        machine.nic_latency_s,
        links,
    )
