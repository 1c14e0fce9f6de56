"""A cluster as the scheduler sees it: machines with GPUs, links inside and between them, prices. Frozen data.

Read from ``cluster.yaml`` by ``cluster_file``; GPU types come from the catalog or are given by numbers.
"""

from functools import cached_property
from itertools import combinations
from math import fsum

from pydantic import BaseModel, ConfigDict, Field


class Part(BaseModel):
    """Base: unknown fields are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Reached(Part):
    """What one device reaches of its figures, where it was measured itself: fields of ``efficiency.Efficiency``."""

    compute: float = Field(1.0, gt=0, description="part of `flops` in matrix products with many tokens")
    memory: float = Field(1.0, gt=0, description="part of the memory bandwidth in those with few")
    gemm_s: float = Field(0.0, ge=0, description="fixed time of one matrix product")
    blend: float = Field(4.0, ge=1, description="1: reading weights and computing add up; large: they overlap")
    attention_compute: float = Field(0.5, gt=0, description="part of `flops` in attention over a prompt")
    attention_s: float = Field(0.0, ge=0)
    attention_memory: float = Field(0.8, gt=0, description="part of the memory bandwidth in attention to cached KV")
    cached_attention_s: float = Field(0.0, ge=0)


class HostTimes(Part):
    """What an engine's host takes for a step on this device, in seconds: fields of ``efficiency.Host``."""

    step_s: float = Field(0.0, ge=0)
    layer_s: float = Field(0.0, ge=0)
    request_s: float = Field(0.0, ge=0)
    token_s: float = Field(0.0, ge=0, description="for each token, layer and element of the hidden state")
    shared_token_s: float = Field(0.0, ge=0)


class GpuType(Part):
    """One kind of GPU. Bandwidths are one way."""

    name: str = Field(min_length=1)
    flops: float = Field(gt=0, description="dense bf16 FLOP/s")
    memory_bytes: int = Field(gt=0, description="as the driver reports it")
    memory_bandwidth_bytes_per_s: float = Field(gt=0)
    link: str = Field("pcie-4", description="link class by which it reaches its neighbours in a machine")
    link_bandwidth_bytes_per_s: float = Field(gt=0, description="to its neighbours, one way")
    link_latency_s: float = Field(ge=0)
    price_per_hour: float | None = Field(None, ge=0, description="$/h")
    efficiency: str = Field("", description="whose measured efficiencies it has; default: its own name's")
    reached: Reached | None = Field(None, description="its own efficiencies, instead of the catalog's")
    host: HostTimes | None = Field(None, description="its own host times, instead of the engine profile's")


class Machine(Part):
    """GPUs that share a host and its network cards. ``gpus``: (type name, how many), each type once, sorted."""

    name: str = Field(min_length=1)
    site: str = "default"
    gpus: tuple[tuple[str, int], ...]
    intra_bandwidth_bytes_per_s: float = Field(gt=0, description="between two of its GPUs, one way")
    intra_latency_s: float = Field(ge=0)
    nic_bandwidth_bytes_per_s: float = Field(gt=0, description="of the machine to others, one way")
    nic_latency_s: float = Field(ge=0)
    nic_rdma: bool = Field(False, description="the network card can read another machine's memory")
    price_per_hour: float | None = Field(None, ge=0, description="of the whole machine; default: its GPUs'")

    @property
    def num_gpus(self) -> int:
        """All types together."""
        return sum(count for _, count in self.gpus)


class Link(Part):
    """What two machines or two sites have between them instead of what their network cards allow. Symmetric."""

    between: tuple[str, str]
    bandwidth_bytes_per_s: float = Field(gt=0)
    latency_s: float = Field(ge=0)


class Cluster(Part):
    """Machines, the GPU types that they use, and links that are not simply the slower of two network cards.

    ``site_links`` name two sites, ``machine_links`` two machines (and win over the former).
    """

    name: str = "cluster"
    gpu_types: tuple[GpuType, ...]
    machines: tuple[Machine, ...]
    site_links: tuple[Link, ...] = ()
    machine_links: tuple[Link, ...] = ()

    @cached_property
    def num_gpus(self) -> int:
        """In all machines."""
        return sum(machine.num_gpus for machine in self.machines)

    @cached_property
    def _types(self) -> dict[str, GpuType]:
        return {gpu.name: gpu for gpu in self.gpu_types}

    @cached_property
    def _links(self) -> dict[frozenset[str], Link]:
        return {frozenset(link.between): link for link in self.machine_links}

    @cached_property
    def _sites(self) -> dict[frozenset[str], Link]:
        return {frozenset(link.between): link for link in self.site_links}

    def gpu_type(self, name: str) -> GpuType:
        """By name; KeyError when no machine has it."""
        return self._types[name]

    def machine_price_per_hour(self, machine: Machine) -> float | None:
        """$/h of a machine; None when any part of it has no price."""
        if machine.price_per_hour is not None:
            return machine.price_per_hour
        prices = [(self.gpu_type(name).price_per_hour, count) for name, count in machine.gpus]
        return None if any(price is None for price, _ in prices) else sum((p or 0.0) * n for p, n in prices)

    @cached_property
    def price_per_hour(self) -> float | None:
        """$/h of everything, to the same bits in any order of machines; None when any machine has no price."""
        prices = [self.machine_price_per_hour(machine) for machine in self.machines]
        return None if any(price is None for price in prices) else fsum(price or 0.0 for price in prices)

    def bandwidth(self, one: Machine, other: Machine) -> float:
        """Bytes/s one way between two machines, or between two GPUs of one machine."""
        if one.name == other.name:
            return one.intra_bandwidth_bytes_per_s
        nic = min(one.nic_bandwidth_bytes_per_s, other.nic_bandwidth_bytes_per_s)
        link = self._link(one, other)
        return nic if link is None else min(nic, link.bandwidth_bytes_per_s)

    def latency(self, one: Machine, other: Machine) -> float:
        """Seconds one way between two machines, or between two GPUs of one machine."""
        if one.name == other.name:
            return one.intra_latency_s
        link = self._link(one, other)
        nic = max(one.nic_latency_s, other.nic_latency_s)
        return nic if link is None else max(nic, link.latency_s)

    def sites_by_cards_alone(self) -> list[tuple[str, str]]:
        """Pairs of sites with machines that no link of this cluster joins: only their network cards limit these."""
        by_site: dict[str, list[Machine]] = {}
        for machine in self.machines:
            by_site.setdefault(machine.site, []).append(machine)
        return [
            (a, b)
            for a, b in combinations(sorted(by_site), 2)
            if any(self._link(one, other) is None for one in by_site[a] for other in by_site[b])
        ]

    def _link(self, one: Machine, other: Machine) -> Link | None:
        found = self._links.get(frozenset((one.name, other.name)))
        if found is None and one.site != other.site:
            found = self._sites.get(frozenset((one.site, other.site)))
        return found
