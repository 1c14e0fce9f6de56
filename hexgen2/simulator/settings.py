"""What a plan says beyond roles and routes: settings of each replica's engine, and the times that it should take.

Both follow from the blueprint, so that engines run with the memory and the steps that the plan reckons with.
"""

from hexgen2.devices import cpu_share
from hexgen2.kv.wire import CHUNK_TOKENS
from hexgen2.placement import EnginePlan, Placement, ReplicaPlan, TimesPlan
from hexgen2.scheduler.cost_model import STAGING_BYTES
from hexgen2.scheduler.groups import COLOCATED, DECODE, PREFILL
from hexgen2.scheduler.pools import RESERVED_BYTES, SPARE_TOKENS
from hexgen2.simulator.planned import Planned
from hexgen2.simulator.shortcut import colocate_max_prompt_tokens
from hexgen2.simulator.step_times import Step

#: Registered memory that reads land in: ``KvConfig.landing_bytes``.
LANDING_BYTES = STAGING_BYTES - RESERVED_BYTES
#: The pool of the role that a replica has not may take one part of its KV memory in so many, whatever it needs itself.
SPARE_PART = 8
#: Prompt lengths (parts of the longest) and batches (multiples of the planned one) that times are told at.
PROMPT_PARTS = (1 / 64, 1 / 16, 1 / 4, 1 / 2, 1)
BATCH_PARTS = (1 / 8, 1 / 4, 1 / 2, 1, 2)


def completed(planned: Planned) -> Placement:
    """The placement with everything that follows from it."""
    engines = {each.id: engine_plan(planned, each) for each in planned.placement.replicas}
    told = retold(planned)
    replicas = tuple(each.model_copy(update={"engine": engines[each.id]}) for each in told.replicas)
    return told.model_copy(update={"replicas": replicas})


def retold(planned: Planned) -> Placement:
    """The placement with its times and limits of length; what engines were started with stays."""
    replicas = tuple(
        each.model_copy(update={"times": times_plan(planned, each)}) for each in planned.placement.replicas
    )
    return planned.placement.model_copy(
        update={
            "replicas": replicas,
            "mean_prompt_tokens": planned.problem.workload.mean_prompt_tokens,
            "colocate_max_prompt_tokens": colocate_max_prompt_tokens(planned),
        }
    )


def engine_plan(planned: Planned, replica: ReplicaPlan) -> EnginePlan | None:
    """Settings of a replica; None when no memory is left for KV, which only a plan by hand can be.

    What the engine and its pools take is all there is beside the weights, in the stage that has least room.
    """
    problem, stages = planned.problem, planned.stages(replica.id)
    limits = planned.replica(replica.id, replica.role).limits
    send, staging = _pools(planned, replica)
    least = planned.kv_tokens(stages, send + staging)
    sequences = limits.max_num_seqs * (limits.num_lanes if replica.role != PREFILL else 1)
    if replica.batch is not None:
        # Room above the planned batch: lengths vary, and more of them fit when they are short.
        sequences = min(sequences, 2 * replica.batch)
    if any(cpu_share(stage.gpu) is not None for stage in stages):
        # Memory of a machine that others use as well: no more than its requests can fill.
        longest = problem.workload.longest_tokens
        least = min(least, float(sequences * longest + SPARE_TOKENS))
    if least < 1:
        return None
    return EnginePlan(
        kv_cache_bytes=int(least * max(planned.token_bytes(stages))),
        max_num_seqs=sequences,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        send_tokens=send,
        staging_tokens=staging,
        slo_ttft_s=problem.workload.ttft_s,
        slo_tpot_s=problem.workload.tpot_s,
    )


def _pools(planned: Planned, replica: ReplicaPlan) -> tuple[int, int]:
    """Tokens of the send buffer and of staging: that of its role as the plan needs it. The other, since workers can
    change their role, holds a longest prompt where that takes little of the memory; else what is left beside the
    planned batch, and then the replica may have to keep its role.
    """
    stages, work = planned.stages(replica.id), planned.problem.workload
    # Prefill's engine holds the prompt and no more of the answer than its first token.
    longest = planned.longest_prompt if replica.role == PREFILL else work.longest_tokens
    beside = SPARE_TOKENS - CHUNK_TOKENS
    room = planned.pool_room(stages, longest + beside)
    spare = planned.pool_room(stages, max(longest, (replica.batch or 0) * work.mean_context_tokens) + beside)
    part = planned.kv_tokens(stages, 0) / SPARE_PART
    usual = max(planned.longest_prompt, int(min(RESERVED_BYTES / max(planned.token_bytes(stages)), part)))
    if replica.role == COLOCATED:
        each = usual if usual <= part and 2 * usual <= room else max(CHUNK_TOKENS, min(usual, spare // 2))
        return each, each
    own = max(CHUNK_TOKENS, min(planned.pool_tokens_of(replica.id, replica.role), room - CHUNK_TOKENS))
    if usual <= part and max(own, usual) + usual <= room:
        own, other = max(own, usual), usual
    else:
        other = max(CHUNK_TOKENS, min(usual, spare - own))
    return (own, other) if replica.role == PREFILL else (other, own)


def times_plan(planned: Planned, replica: ReplicaPlan) -> TimesPlan:
    """Times of a replica in either phase: its role may change."""
    cost, stages = planned.problem.cost, planned.stages(replica.id)
    context = planned.problem.workload.mean_context_tokens
    prompts = sorted({max(1, round(planned.longest_prompt * part)) for part in PROMPT_PARTS})
    planned_batch = replica.batch or cost.decode_rate(stages).batch or 8
    batches = sorted({1, *(max(1, round(planned_batch * part)) for part in BATCH_PARTS)})
    mean = round(planned.problem.workload.mean_prompt_tokens)
    parts = planned.replica(replica.id, replica.role).times.parts(
        Step(min(mean, cost.engine.max_num_batched_tokens), mean * mean / 2, 0, 1, 0, 0.0, 1)
    )
    decode = planned.replica(replica.id, DECODE)

    def step_s(batch: int) -> float:
        """Of a token for each: micro-batches go through a pipeline one behind the other."""
        lanes = min(decode.limits.num_lanes, batch)
        each = -(-batch // lanes)
        times = decode.times.parts(Step(0, 0.0, 0, 0, each, each * context, each))
        return max(sum(times), lanes * max(times))

    return TimesPlan(
        prefill={tokens: _rounded(cost.prefill_s(stages, tokens)) for tokens in prompts},
        busiest=_rounded(max(parts) / sum(parts)),
        decode={batch: _rounded(step_s(batch)) for batch in batches},
    )


def _rounded(seconds: float) -> float:
    return float(f"{seconds:.4g}")
