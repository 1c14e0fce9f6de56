"""Which groups are looked at: their size, how mixed they are, and every composition that keeps these limits.

The search, the exhaustive search and the bound share these limits: a bound holds for the groups it has columns for.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from math import ceil

from hexgen2.scheduler.bound import Column
from hexgen2.scheduler.cost import CostModel
from hexgen2.scheduler.fabric import Composition, Fabric, Parts
from hexgen2.scheduler.parallelism import Strategies

#: Machines seldom have more GPUs, and tensor parallelism ends there.
USUAL_MACHINE = 8
#: Kinds of GPU in a group: more when there are few compositions anyway.
USUAL_KINDS, MOST_KINDS, FEW_COMPOSITIONS = 2, 4, 150


@dataclass(frozen=True, slots=True)
class Limits:
    """A group has at most ``max_gpus`` of at most ``max_kinds`` kinds, and stays in one site if ``one_site``."""

    max_gpus: int
    max_kinds: int
    one_site: bool

    @staticmethod
    def of(fabric: Fabric, cost: CostModel) -> "Limits":
        """Twice what the smallest GPU needs to hold the model, or a usual machine; less mixed on larger clusters."""
        least = [ceil(cost.llm.weight_bytes / max(1.0, cost.usable_bytes(kind.gpu))) for kind in fabric.kinds]
        size = max([USUAL_MACHINE, *(2 * each for each in least if each <= fabric.num_gpus)])
        one_site = any(
            sum(
                fabric.pools[pool].count * cost.usable_bytes(fabric.kinds[fabric.pools[pool].kind].gpu)
                for pool in pools
            )
            > 1.1 * cost.llm.weight_bytes
            for pools in fabric.pools_by_site.values()
        )
        kinds = USUAL_KINDS
        while kinds < min(MOST_KINDS, len(fabric.kinds)):
            wider = Limits(size, kinds + 1, one_site)
            if sum(1 for _ in compositions(fabric, wider)) > FEW_COMPOSITIONS:
                break
            kinds += 1
        return Limits(size, kinds, one_site)

    def allow(self, fabric: Fabric, parts: Parts) -> bool:
        """Whether a group keeps them."""
        if sum(count for _, count in parts) > self.max_gpus or len(fabric.composition(parts)) > self.max_kinds:
            return False
        return not self.one_site or len({fabric.site[fabric.pools[pool].machine] for pool, _ in parts}) == 1


def supply_of(fabric: Fabric, limits: Limits) -> dict[tuple[str, int], int]:
    """GPUs of each (site, kind); one site "" where groups may cross sites."""
    supply: dict[tuple[str, int], int] = {}
    for pool in fabric.pools:
        place = (fabric.site[pool.machine] if limits.one_site else "", pool.kind)
        supply[place] = supply.get(place, 0) + pool.count
    return supply


def compositions(fabric: Fabric, limits: Limits) -> Iterator[tuple[str, Composition]]:
    """Every (site, composition) within the limits."""
    supply = supply_of(fabric, limits)
    for site in sorted({site for site, _ in supply}):
        kinds = sorted(kind for place, kind in supply if place == site)
        for size in range(1, min(limits.max_kinds, len(kinds)) + 1):
            for chosen in combinations(kinds, size):
                ranges = (range(1, min(limits.max_gpus, supply[site, kind]) + 1) for kind in chosen)
                for counts in product(*ranges):
                    if sum(counts) <= limits.max_gpus:
                        yield site, tuple(zip(chosen, counts, strict=True))


def all_parts(fabric: Fabric, limits: Limits, pools: Sequence[int] | None = None) -> Iterator[Parts]:
    """Every choice of GPUs for a group within the limits; out of some ``pools``, by default all."""
    among = range(len(fabric.pools)) if pools is None else sorted(pools)
    stack: list[Parts] = [()]
    while stack:
        parts = stack.pop()
        if parts:
            yield parts
        room = limits.max_gpus - sum(count for _, count in parts)
        for pool in among:
            if parts and pool <= parts[-1][0]:
                continue
            for count in range(1, min(room, fabric.pools[pool].count) + 1):
                wider = (*parts, (pool, count))
                if limits.allow(fabric, wider):
                    stack.append(wider)


def columns(fabric: Fabric, limits: Limits, strategies: Strategies, roles: frozenset[str]) -> tuple[Column, ...]:
    """Of every composition that can hold the model: its best rates in the roles that are allowed."""
    found = []
    places = tuple(compositions(fabric, limits))
    for (site, composition), candidates in zip(
        places, strategies.of_all([composition for _, composition in places]), strict=True
    ):
        prefill, decode, colocated = candidates.rates
        column = Column(
            site,
            composition,
            prefill if "prefill" in roles else 0.0,
            decode if "decode" in roles else 0.0,
            colocated if "colocated" in roles else 0.0,
        )
        if column.prefill_rps or column.decode_rps or column.colocated_rps:
            found.append(column)
    return tuple(found)
