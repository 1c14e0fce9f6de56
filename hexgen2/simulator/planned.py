"""The blueprint of a plan: what the scheduler's cost model says of its replicas, and the links of its cluster.

The planner reckons with mean rates; here the same figures meet single requests. Whole prompts share a step as far as
the planner found that to pay, longer ones are cut into chunks of the engine's budget.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from hexgen2.config_file import Place
from hexgen2.errors import ConfigError
from hexgen2.kv.codecs import CODECS, NONE, transfer_bytes
from hexgen2.kv.wire import CHUNK_TOKENS, ITEM_BYTES, KvShape
from hexgen2.placement import Placement, ReplicaPlan
from hexgen2.plan import Route
from hexgen2.scheduler.cost import Stages
from hexgen2.scheduler.groups import COLOCATED, DECODE, PREFILL, Choice, PlacedStage
from hexgen2.scheduler.kv_network import KvNetwork, Replica, Wire
from hexgen2.scheduler.pools import RESERVED_BYTES, SPARE_TOKENS, STEPS_HELD, staging_tokens
from hexgen2.scheduler.present import wire_name
from hexgen2.scheduler.problem import Problem
from hexgen2.simulator.blueprint import ReplicaSpec
from hexgen2.simulator.engine import Limits
from hexgen2.simulator.links import Path
from hexgen2.simulator.step_times import PipelineTimes, Step


@dataclass(frozen=True)
class Planned:
    """See the module; implements ``Blueprint``. ``longest_prompt``: of what will be asked, in tokens.

    ``codec`` replaces the plan's on every route; ``pool_tokens`` is what the send buffer and staging of each replica
    hold. Build it with ``planned``, which checks the plan.
    """

    placement: Placement
    problem: Problem
    longest_prompt: int
    codec: str | None = None
    pool_tokens: int | None = None
    #: Whether steps hold both phases.
    mixes: bool = True

    @cached_property
    def roles(self) -> Mapping[str, str]:
        """See ``Blueprint``."""
        return {replica.id: replica.role for replica in self.placement.replicas}

    @cached_property
    def routes(self) -> tuple[Route, ...]:
        """See ``Blueprint``."""
        pairs = [
            Route(route.prefill, route.decode, route.flow_rps, self.codec or codec_name(route.codec))
            for route in self.placement.routes
        ]
        alone = [
            Route(each.id, each.id, each.flow_rps, NONE)
            for each in self.placement.replicas
            if each.role == COLOCATED and each.flow_rps > 0
        ]
        return (*pairs, *alone)

    @cached_property
    def bandwidths(self) -> Mapping[str, float]:
        """See ``Blueprint``. What pipelines send between their stages is taken off."""
        names: dict[str, float] = {}
        taken: dict[Wire, float] = {}
        for replica in self.placement.replicas:
            for wire, per_request in self.node(replica.id, replica.role).hops:
                taken[wire] = taken.get(wire, 0.0) + per_request * replica.flow_rps
        for wire, limit in self._network.bandwidths.items():
            names[wire_name(self.problem.fabric, wire)] = max(0.05 * limit, limit - taken.get(wire, 0.0))
        return names

    def replica(self, replica_id: str, role: str) -> ReplicaSpec:
        """See ``Blueprint``."""
        cost, plan = self.problem.cost, self._plans[replica_id]
        stages = self.stages(replica_id)
        engine = cost.engine
        times = PipelineTimes(cost, stages, engine.max_num_batched_tokens + engine.max_num_seqs * 2 * len(stages))
        # Prompts fill a pipeline whose links count as stages; a replica that does both has one lane per stage.
        lanes = {PREFILL: 2 * len(stages) - 1, COLOCATED: len(stages)}.get(role) or self._micro_batches(
            stages, times, plan.batch
        )
        pool = {PREFILL: self._send_tokens, DECODE: self._staging_tokens}.get(role)
        pages = -(-pool(replica_id) // CHUNK_TOKENS) if pool is not None else 0
        limits = Limits(
            kv_tokens=self.kv_tokens(stages, pages * CHUNK_TOKENS),
            max_num_seqs=engine.max_num_seqs,
            max_num_batched_tokens=engine.max_num_batched_tokens,
            shared_tokens=cost.shared_tokens(stages),
            num_lanes=lanes,
            mixes=self.mixes,
        )
        return ReplicaSpec(times, limits, pages, pages, plan.num_gpus)

    def reroute(self, roles: Mapping[str, str]) -> tuple[Route, ...]:
        """See ``Blueprint``: the largest flow over replicas in these roles."""
        names = list(roles)
        nodes = [self.node(name, role) for name, role in roles.items()]
        codec = self.codec or next((codec_name(route.codec) for route in self.placement.routes), NONE)
        routed = self._network.route(nodes)
        return tuple(Route(names[i], names[j], flow, NONE if i == j else codec) for i, j, flow in routed.routes)

    def path(self, prefill_id: str, decode_id: str) -> Path:
        """See ``Blueprint``."""
        key = (prefill_id, decode_id)
        found = self._paths.get(key)
        if found is None:
            path = self._network.path(self.node(prefill_id, PREFILL), self.node(decode_id, DECODE))
            wires = tuple((wire_name(self.problem.fabric, wire), share) for wire, share in path.shares)
            found = self._paths[key] = Path(wires, path.inner_bytes_per_s, path.latency_s)
        return found

    def wire_bytes(self, codec: str, num_tokens: int) -> float:
        """See ``Blueprint``."""
        llm = self.problem.llm
        if codec == NONE:
            return float(llm.kv_bytes_per_token * num_tokens)
        key = (codec, num_tokens)
        found = self._sizes.get(key)
        if found is None:
            dtype = llm.kv_dtype if llm.kv_dtype in ITEM_BYTES else "bfloat16"
            shape = KvShape(llm.num_layers, llm.num_kv_heads, llm.head_dim, dtype)
            found = self._sizes[key] = float(transfer_bytes(codec, shape, num_tokens))
        return found

    def stages(self, replica_id: str) -> Stages:
        """Of the cost model, with the links that they have in this cluster."""
        fabric, placed = self.problem.fabric, self._placed(replica_id)
        machines = [fabric.pools[stage.pool].machine for stage in placed]
        links = [(fabric.bandwidth[a][b], fabric.latency[a][b]) for a, b in pairwise(machines)]
        return tuple(
            self.problem.strategies.stage(
                (fabric.pools[stage.pool].kind, stage.tensor_parallel_size, stage.num_layers), *link
            )
            for stage, link in zip(placed, [*links, (float("inf"), 0.0)], strict=True)
        )

    def kv_tokens(self, stages: Stages, pool_tokens: int) -> float:
        """Tokens whose KV fits beside the weights and pools that hold ``pool_tokens``."""
        return min(
            (room - max(0.0, pool_tokens * per_token - RESERVED_BYTES)) / per_token
            for room, per_token in self._rooms(stages)
        )

    def pool_room(self, stages: Stages, kept_tokens: float) -> int:
        """Tokens that pools may hold where ``kept_tokens`` of KV are kept beside them and the weights."""
        most = min((room + RESERVED_BYTES) / per_token for room, per_token in self._rooms(stages))
        return int(most - kept_tokens)

    def token_bytes(self, stages: Stages) -> tuple[float, ...]:
        """KV of a token on each GPU of a stage."""
        llm = self.problem.llm
        return tuple(
            stage.num_layers * llm.kv_bytes_per_token_layer / min(stage.tensor_parallel_size, llm.num_kv_heads)
            for stage in stages
        )

    def _rooms(self, stages: Stages) -> list[tuple[float, float]]:
        """Of each stage: bytes beside its weights, and those of a token."""
        cost = self.problem.cost
        rooms = [
            cost.usable_bytes(stage.gpu) - cost.weight_bytes_per_gpu(stages, number)
            for number, stage in enumerate(stages)
        ]
        return list(zip(rooms, self.token_bytes(stages), strict=True))

    def pool_tokens_of(self, replica_id: str, role: str) -> int:
        """Of the send buffer (prefill) or staging (decode)."""
        return self._send_tokens(replica_id) if role == PREFILL else self._staging_tokens(replica_id)

    def notes(self) -> tuple[str, ...]:
        """What a reader should know before trusting the figures."""
        said = []
        pools = {}
        for name, role in self.roles.items():
            if role != COLOCATED:
                pages = self.replica(name, role).send_pages
                pools[name] = pages * self._page_bytes(self.stages(name))
        if pools and (largest := max(pools.values())) > RESERVED_BYTES * 1.01:
            name = max(pools, key=pools.__getitem__)
            said.append(
                f"send buffers and staging take up to {largest / 2**20:,.0f} MiB per GPU ({name}) out of KV memory: "
                f"set kv.send_bytes and kv.staging_bytes so; their default is {RESERVED_BYTES >> 20} MiB"
            )
        limit = self.problem.llm.max_position_embeddings
        if self.longest_prompt > limit:
            said.append(
                f"there are prompts longer than the {limit} tokens of {self.problem.llm.name}: served all the same"
            )
        return tuple(said)

    def _send_tokens(self, replica_id: str) -> int:
        """What keeps the pipeline full and little more."""
        stages = self.stages(replica_id)
        mean = self.problem.workload.mean_prompt_tokens
        at_work = (2 * len(stages) - 1) * max(self.problem.cost.shared_tokens(stages), mean)
        return self._pool(stages, 1.5 * at_work * (1 + CHUNK_TOKENS / mean))

    def _staging_tokens(self, replica_id: str) -> int:
        """What the planned flow keeps there, by Little's law, and room for a few prompts more.

        KV is held while it is made, travels, and is taken in by decode's engine. More would cost what it wins: it is
        taken from the memory that decode's batch needs.
        """
        steps_s = STEPS_HELD * (self._plans[replica_id].tpot_s or 0.0)
        held = sum(
            route.flow_rps * ((self._plans[route.prefill].prefill_s or 0.0) + route.transfer_s + steps_s)
            for route in self.placement.routes
            if route.decode == replica_id
        )
        return self._pool(self.stages(replica_id), staging_tokens(self.problem.workload.mean_prompt_tokens, held))

    def _pool(self, stages: Stages, tokens: float) -> int:
        """Whole prompts, in pages; at least what is usual, and more than half of KV memory for one prompt alone."""
        if self.pool_tokens is not None:
            return self.pool_tokens
        usual = CHUNK_TOKENS * RESERVED_BYTES / self._page_bytes(stages)
        most = self.kv_tokens(stages, 0) / 2
        if self.pool_room(stages, self.longest_prompt + SPARE_TOKENS) >= self.longest_prompt:
            most = max(most, self.longest_prompt)
        return max(CHUNK_TOKENS, int(min(max(tokens, self.longest_prompt, usual), most)))

    def _page_bytes(self, stages: Stages) -> float:
        """Of the GPU that holds most of a page."""
        return CHUNK_TOKENS * max(self.token_bytes(stages))

    def _micro_batches(self, stages: Stages, times: PipelineTimes, batch: int | None) -> int:
        """One, or as many as stages: whichever makes a token for each of the planned batch sooner."""
        cost = self.problem.cost
        size = max(1, batch or cost.decode_rate(stages).batch)

        def interval(count: int) -> float:
            each = max(1, size // count)
            parts = times.parts(Step(0, 0.0, 0, 0, each, each * cost.workload.mean_context_tokens, each))
            return max(sum(parts), count * max(parts))

        each_max = cost.engine.max_num_seqs
        able = [count for count in (1, len(stages)) if size <= count * each_max] or [len(stages)]
        return min(able, key=interval)

    @cached_property
    def _network(self) -> KvNetwork:
        return self.problem.judge.network

    @cached_property
    def _plans(self) -> Mapping[str, ReplicaPlan]:
        return {replica.id: replica for replica in self.placement.replicas}

    @cached_property
    def _paths(self) -> dict[tuple[str, str], Path]:
        return {}

    @cached_property
    def _sizes(self) -> dict[tuple[str, int], float]:
        return {}

    def _placed(self, replica_id: str) -> tuple[PlacedStage, ...]:
        fabric = self.problem.fabric
        where = {
            (fabric.cluster.machines[pool.machine].name, fabric.kinds[pool.kind].gpu): number
            for number, pool in enumerate(fabric.pools)
        }
        return tuple(
            PlacedStage(where[s.machine, s.gpu], s.tensor_parallel_size, s.first_layer, s.num_layers)
            for s in self._plans[replica_id].stages
        )

    def node(self, replica_id: str, role: str) -> Replica:
        """A replica's node of the network if it had that role: its rate and what it puts on which wire."""
        cost, stages = self.problem.cost, self.stages(replica_id)
        if role == PREFILL:
            rps = cost.prefill_rate(stages)
        elif role == DECODE:
            rps = cost.decode_rate(stages).rate
        else:
            rps = cost.colocated_rate(stages)[0]
        return self._network.replica(role, Choice(rps, 0.0, 0.0, 0, self._placed(replica_id)))


def codec_name(name: str) -> str:
    """Plans of version 1 called ``none`` ``raw``."""
    return NONE if name == "raw" else name


def planned(
    placement: Placement,
    problem: Problem,
    longest_prompt: int,
    *,
    codec: str | None = None,
    pool_tokens: int | None = None,
    mixes: bool = True,
    where: Callable[[Place], str] = lambda place: ".".join(map(str, place)) + ": ",
) -> Planned:
    """The blueprint of a plan whose machines, GPUs, layers, memory and routes were checked against its cluster.

    ``where`` begins the line about a field. Raises ConfigError.
    """
    check(placement, problem, where)
    found = Planned(placement, problem, longest_prompt, codec, pool_tokens, mixes)
    for number, replica in enumerate(placement.replicas):
        room = found.replica(replica.id, replica.role).limits.kv_tokens
        if room < 1:
            raise ConfigError(
                f"{where(('replicas', number, 'stages'))}model {problem.llm.name} does not fit: {replica.id} has no "
                "memory left for KV beside the weights and the hand-over's pools"
            )
    return found


def check(placement: Placement, problem: Problem, where: Callable[[Place], str]) -> None:
    """Whether the plan's machines, GPUs, layers and routes are the cluster's and the model's. Raises ConfigError."""
    cluster, llm = problem.cluster, problem.llm
    owned = {(machine.name, gpu): count for machine in cluster.machines for gpu, count in machine.gpus}
    machines = {machine.name for machine in cluster.machines}
    ids: set[str] = set()
    for number, replica in enumerate(placement.replicas):
        place: Place = ("replicas", number)
        if replica.id in ids:
            raise ConfigError(f"{where((*place, 'id'))}`{replica.id}` is the name of another replica, too")
        ids.add(replica.id)
        layers = 0
        for index, stage in enumerate(replica.stages):
            at: Place = (*place, "stages", index)
            if stage.machine not in machines:
                raise ConfigError(f"{where((*at, 'machine'))}cluster {cluster.name} has no `{stage.machine}`")
            key = (stage.machine, stage.gpu)
            owned[key] = owned.get(key, 0) - stage.tensor_parallel_size
            if owned[key] < 0:
                raise ConfigError(
                    f"{where((*at, 'gpu'))}{stage.machine} of cluster {cluster.name} has fewer {stage.gpu} than the "
                    "plan uses"
                )
            if stage.first_layer != layers:
                raise ConfigError(
                    f"{where((*at, 'first_layer'))}{stage.first_layer} does not follow layer {layers - 1}"
                )
            layers += stage.num_layers
            if not llm.allows_tensor_parallel_size(stage.tensor_parallel_size):
                raise ConfigError(f"{where((*at, 'tensor_parallel_size'))}{llm.name} cannot be split so")
        if layers != llm.num_layers:
            raise ConfigError(f"{where((*place, 'stages'))}{layers} layers; {llm.name} has {llm.num_layers}")
    roles = {replica.id: replica.role for replica in placement.replicas}
    for number, route in enumerate(placement.routes):
        for end, role in (("prefill", PREFILL), ("decode", DECODE)):
            name = getattr(route, end)
            if roles.get(name) != role:
                raise ConfigError(f"{where(('routes', number, end))}the plan has no {role} replica `{name}`")
        if codec_name(route.codec) not in CODECS:
            raise ConfigError(f"{where(('routes', number, 'codec'))}`{route.codec}`; there are: {', '.join(CODECS)}")
