"""One planning problem: a cluster, a model and a workload, with everything that searches over it share."""

from dataclasses import dataclass, field
from functools import cached_property

from hexgen2.cluster import Cluster
from hexgen2.errors import ConfigError
from hexgen2.kv.codecs import NONE
from hexgen2.llm import Llm
from hexgen2.scheduler.assumptions import assumptions
from hexgen2.scheduler.bound import Bound, Column, lp_bound, milp_bound
from hexgen2.scheduler.columns import Limits, columns, supply_of
from hexgen2.scheduler.cost import CostModel
from hexgen2.scheduler.efficiency import Engine, engine
from hexgen2.scheduler.fabric import Fabric
from hexgen2.scheduler.groups import COLOCATED, DECODE, PREFILL, Groups
from hexgen2.scheduler.kv_codecs import wire_codecs
from hexgen2.scheduler.parallelism import Strategies
from hexgen2.scheduler.state import Judge
from hexgen2.workload import Workload

#: Roles of a plan that disaggregates, of one that does not, and of one that does both.
SPLIT, WHOLE, MIXED = (PREFILL, DECODE), (COLOCATED,), (PREFILL, DECODE, COLOCATED)

#: Up to so many GPUs the bound is taken with whole groups.
MILP_GPUS = 64


@dataclass(frozen=True)
class Problem:
    """See the module. Costs, strategies and columns are found when first needed and remembered.

    ``codecs``: what KV may travel in between machines, beside none; ``engine``: whose host times and limits steps have.
    """

    cluster: Cluster
    llm: Llm
    workload: Workload
    codecs: tuple[str, ...] = (NONE,)
    engine: Engine = field(default_factory=engine)

    def __post_init__(self) -> None:
        object.__setattr__(self, "workload", self.workload.within(self.llm.max_position_embeddings))

    @cached_property
    def fabric(self) -> Fabric:
        """The cluster as pools."""
        return Fabric.of(self.cluster)

    @cached_property
    def cost(self) -> CostModel:
        """Costs of this model under this workload."""
        return CostModel(self.llm, self.workload, self.cluster.gpu_types, self.engine)

    @cached_property
    def assumptions(self) -> tuple[str, ...]:
        """What its plans take for granted, in sentences."""
        return assumptions(self.llm, self.workload, self.cluster, self.engine)

    @cached_property
    def strategies(self) -> Strategies:
        """Strategies by composition."""
        return Strategies(self.fabric, self.cost)

    @cached_property
    def limits(self) -> Limits:
        """Which groups are looked at."""
        return Limits.of(self.fabric, self.cost)

    @cached_property
    def supply(self) -> dict[tuple[str, int], int]:
        """GPUs by (site, kind)."""
        return supply_of(self.fabric, self.limits)

    @cached_property
    def site_links(self) -> dict[tuple[str, str], float]:
        """Requests per second whose KV goes from one site to another; none where groups may cross sites."""
        if not self.limits.one_site:
            return {}
        smallest = min(codec.ratio for codec in wire_codecs(self.llm, self.codecs))
        return {
            (a, b): link.bandwidth_bytes_per_s / (self.cost.kv_bytes_per_request * smallest)
            for link in self.cluster.site_links
            for a, b in (link.between, link.between[::-1])
        }

    @cached_property
    def judge(self) -> Judge:
        """Judges states by the usual rule for strategies."""
        return Judge(Groups(self.fabric, self.cost, self.strategies), self.codecs)

    @cached_property
    def paper_judge(self) -> Judge:
        """Judges states by the paper's literal rule: prefill takes the strategy with the least latency."""
        return Judge(Groups(self.fabric, self.cost, self.strategies, quickest=True), self.codecs)

    @cached_property
    def _columns(self) -> tuple[Column, ...]:
        return columns(self.fabric, self.limits, self.strategies, frozenset(MIXED))

    def columns(self, roles: tuple[str, ...]) -> tuple[Column, ...]:
        """Compositions with their best rates in these roles."""
        found = (
            Column(
                each.site,
                each.composition,
                each.prefill_rps if PREFILL in roles else 0.0,
                each.decode_rps if DECODE in roles else 0.0,
                each.colocated_rps if COLOCATED in roles else 0.0,
            )
            for each in self._columns
        )
        return tuple(each for each in found if each.prefill_rps or each.decode_rps or each.colocated_rps)

    @cached_property
    def _bounds(self) -> dict[tuple[str, tuple[str, ...]], Bound]:
        return {}

    def lp(self, roles: tuple[str, ...]) -> Bound:
        """The linear bound on plans with these roles."""
        key = ("LP", roles)
        if key not in self._bounds:
            self._bounds[key] = lp_bound(self.columns(roles), self.supply, self.site_links)
        return self._bounds[key]

    def bound(self, roles: tuple[str, ...]) -> Bound:
        """The tighter bound where it is affordable."""
        if self.fabric.num_gpus > MILP_GPUS:
            return self.lp(roles)
        key = ("MILP", roles)
        if key not in self._bounds:
            quick = self.fabric.num_gpus > MILP_GPUS // 2
            self._bounds[key] = milp_bound(self.columns(roles), self.supply, self.site_links, quick=quick)
        return self._bounds[key]

    def why_not_apart(self) -> str:
        """Why prefill and decode cannot be on groups of their own; empty when they can."""
        if self.bound(SPLIT).rps > 0:
            return ""
        if self.site_links and milp_bound(self.columns(SPLIT), self.supply, quick=True).rps > 0:
            return "no site holds the model twice, and the links between sites carry next to no KV"
        return (
            "the cluster holds the model once, and prefill and decode apart need it twice, each with a prompt of "
            f"{self.workload.longest_prompt_tokens} tokens in its memory for hand-overs besides"
        )

    def check(self) -> None:
        """Raises ConfigError, saying what would help, when no group can serve the model."""
        if self._columns:
            return
        fabric, cost = self.fabric, self.cost
        usable = sum(cost.usable_bytes(fabric.kinds[pool.kind].gpu) * pool.count for pool in fabric.pools)
        longest = self.workload.longest_tokens
        needed = self.llm.weight_bytes + longest * cost.kv_bytes_per_token
        if usable < needed:
            raise ConfigError(
                f"model {self.llm.name}: weights and the longest request need {needed / 1e9:.1f} GB; all "
                f"{fabric.num_gpus} GPUs of cluster {self.cluster.name} together have {usable / 1e9:.1f} GB usable"
            )
        limits = [
            f"{name} {value} s"
            for name, value in (("ttft_s", self.workload.ttft_s), ("tpot_s", self.workload.tpot_s))
            if value is not None
        ]
        told = f" within the workload's limits ({', '.join(limits)})" if limits else ""
        raise ConfigError(
            f"cluster {self.cluster.name}: no group of up to {self.limits.max_gpus} of its GPUs can serve model "
            f"{self.llm.name}{told}, its longest request ({longest} tokens) included"
        )
