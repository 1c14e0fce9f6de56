"""What a group of GPUs can do where it stands: its best strategy in each role, remembered by the group.

The rule for strategies: prefill takes the highest rate whose latency keeps the limit, decode the highest rate that
keeps the time per token. The paper's own rule, prefill by the least latency alone, costs up to 2.6x of the flow.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from hexgen2.plan import Role
from hexgen2.scheduler.cost import CostModel, Stage
from hexgen2.scheduler.fabric import Fabric, Parts
from hexgen2.scheduler.parallelism import Candidate, Shape, Strategies

#: Plans of the scheduler have a third kind of replica beside `Role`: one that does both phases.
PREFILL, DECODE, COLOCATED = Role.PREFILL.value, Role.DECODE.value, "colocated"


@dataclass(frozen=True, slots=True)
class PlacedStage:
    """``num_layers`` on ``tensor_parallel_size`` GPUs of a pool, from ``first_layer``."""

    pool: int
    tensor_parallel_size: int
    first_layer: int
    num_layers: int


@dataclass(frozen=True, slots=True)
class Choice:
    """A group's strategy in a role, with its figures over the links it really has.

    ``rps``: requests per second; ``latency_s``: prefill of a mean prompt alone; ``tpot_s`` and ``batch``: in decode.
    """

    rps: float
    latency_s: float
    tpot_s: float
    batch: int
    stages: tuple[PlacedStage, ...]


class Groups:
    """Choices by (role, parts). ``quickest``: choose prefill strategies by latency alone, as the paper does."""

    def __init__(self, fabric: Fabric, cost: CostModel, strategies: Strategies, *, quickest: bool = False) -> None:
        self.fabric = fabric
        self.cost = cost
        self.strategies = strategies
        self._quickest = quickest
        self._found: dict[tuple[str, Parts], Choice | None] = {}

    def choice(self, role: str, parts: Parts) -> Choice | None:
        """The best strategy of the group in this role; None when it cannot have the role."""
        key = (role, parts)
        if key in self._found:
            return self._found[key]
        found = self._found[key] = self._choose(role, parts)
        return found

    def rate(self, role: str, parts: Parts) -> float:
        """Requests per second in this role; 0 when it cannot have it."""
        found = self.choice(role, parts)
        return found.rps if found else 0.0

    def _choose(self, role: str, parts: Parts) -> Choice | None:
        candidates = self.strategies.of(self.fabric.composition(parts))
        ideal: Callable[[Candidate], float]
        if role == PREFILL:
            ranked, ideal = candidates.prefill, lambda each: each.prefill_rps
        elif role == DECODE:
            ranked, ideal = candidates.decode, lambda each: each.decode_rps
        else:
            ranked, ideal = candidates.colocated, lambda each: each.colocated_rps
        if role == PREFILL and self._quickest:
            placed = [self._place(role, each, parts) for each in candidates.prefill]
            return min((each for each in placed if each), key=lambda each: each.latency_s, default=None)
        best: Choice | None = None
        for candidate in ranked:
            # Real links are no better than ideal ones: nothing further down can win.
            if best is not None and ideal(candidate) <= best.rps:
                break
            placed_one = self._place(role, candidate, parts)
            if placed_one is not None and (best is None or placed_one.rps > best.rps):
                best = placed_one
        return best

    def _place(self, role: str, candidate: Candidate, parts: Parts) -> Choice | None:
        pools = self._pools(candidate.shapes, parts)
        if pools is None:
            return None
        fabric = self.fabric
        machines = [fabric.pools[pool].machine for pool in pools]
        links = [(fabric.bandwidth[a][b], fabric.latency[a][b]) for a, b in pairwise(machines)]
        stages = tuple(
            self.strategies.stage(shape, *link)
            for shape, link in zip(candidate.shapes, [*links, (float("inf"), 0.0)], strict=True)
        )
        figures = self._figures(role, stages)
        if figures is None:
            return None
        placed, first = [], 0
        for (_, size, layers), pool in zip(candidate.shapes, pools, strict=True):
            placed.append(PlacedStage(pool, size, first, layers))
            first += layers
        return Choice(*figures, tuple(placed))

    def _figures(self, role: str, stages: tuple[Stage, ...]) -> tuple[float, float, float, int] | None:
        cost = self.cost
        latency_s = cost.prefill_latency_s(stages) if role != DECODE else 0.0
        if role != DECODE and cost.workload.ttft_s is not None and latency_s > cost.workload.ttft_s:
            return None
        if role == PREFILL:
            return cost.prefill_rate(stages), latency_s, 0.0, 0
        if role == DECODE:
            rate, batch, tpot_s = cost.decode_rate(stages)
        else:
            rate, batch, tpot_s = cost.colocated_rate(stages)
        return (rate, latency_s, tpot_s, batch) if rate > 0 else None

    def _pools(self, shapes: tuple[Shape, ...], parts: Parts) -> list[int] | None:
        """The pool of each stage; None when a stage would span machines."""
        left = [[pool, count] for pool, count in parts]
        kinds = [self.fabric.pools[pool].kind for pool, _ in parts]
        pools = []
        for kind, size, _ in shapes:
            for position, part in enumerate(left):
                if kinds[position] == kind and part[1] >= size:
                    part[1] -= size
                    pools.append(part[0])
                    break
            else:
                return None
        return pools
