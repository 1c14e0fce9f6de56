"""What one might do with such machines without a planner: roles by hand, one replica for each machine."""

from collections.abc import Mapping

from benchmarks.mixed.setting import Setting
from hexgen2.placement import Placement, ReplicaPlan, RoutePlan, StagePlan
from hexgen2.scheduler.cost import Stages
from hexgen2.scheduler.cost_model import even_stages
from hexgen2.scheduler.problem import Problem


def guesses(setting: Setting, made: Problem) -> dict[str, Placement]:
    """The setting's, by name. Where one may be had in several ways, that which is foretold to carry most."""
    machines = [machine.name for machine in made.cluster.machines]

    def placed(prefill: tuple[str, ...], *, by_speed: bool) -> Placement:
        roles = {each: "prefill" if each in prefill else "decode" for each in machines}
        return by_hand(made, roles if prefill else dict.fromkeys(machines, "colocated"), by_speed=by_speed)

    return {
        name: max(
            (placed(prefill, by_speed=name in setting.by_speed) for prefill in alternatives),
            key=lambda each: each.throughput_rps,
        )
        for name, alternatives in setting.guesses.items()
    }


def by_hand(made: Problem, roles: Mapping[str, str], *, by_speed: bool = False) -> Placement:
    """A placement with one replica for each machine in the role it is given. Every route has the same share, or
    (``by_speed``) what the speeds of its two ends ask for.
    """
    cost, mean = made.cost, made.workload.mean_prompt_tokens
    kinds = {machine.name: machine.gpus[0][0] for machine in made.cluster.machines}
    stages = {kind: even_stages(made.llm, made.cluster.gpu_type(kind)) for kind in set(kinds.values())}
    replicas = []
    for machine, role in roles.items():
        kind = kinds[machine]
        rate, batch, tpot = _rates(made, stages[kind], role)
        replicas.append(
            ReplicaPlan(
                id=machine,
                role=role,
                stages=(
                    StagePlan(
                        machine=machine, gpu=kind, tensor_parallel_size=1, first_layer=0, num_layers=made.llm.num_layers
                    ),
                ),
                capacity_rps=rate,
                flow_rps=rate if by_speed else 1.0,
                utilisation=1.0,
                prefill_s=cost.prefill_s(stages[kind], mean) if role != "decode" else None,
                tpot_s=tpot if role != "prefill" else None,
                batch=batch if role != "prefill" else None,
            )
        )
    ends = {role: [each for each in replicas if each.role == role] for role in ("prefill", "decode", "colocated")}
    rates = {role: sum(each.capacity_rps for each in found) for role, found in ends.items()}
    throughput = rates["colocated"] + min(rates["prefill"], rates["decode"])
    decoding = [each for each in replicas if each.tpot_s is not None]
    return Placement(
        cluster="mixed",
        model=made.llm.name,
        workload=made.workload.name,
        kind="disaggregated" if not ends["colocated"] else "colocated",
        why="by hand",
        throughput_rps=throughput,
        bottleneck="",
        ttft_s=None,
        tpot_s=sum(each.tpot_s or 0.0 for each in decoding) / len(decoding),
        load_rps=0.75 * throughput,
        output_tokens_per_s=throughput * made.workload.mean_output_tokens,
        strategy="by hand",
        seed=0,
        evaluations=0,
        replicas=tuple(replicas),
        routes=tuple(
            RoutePlan(prefill=p.id, decode=d.id, flow_rps=p.flow_rps * d.flow_rps, transfer_s=0.0)
            for p in ends["prefill"]
            for d in ends["decode"]
        ),
        links=(),
        idle=(),
    )


def _rates(made: Problem, stages: Stages, role: str) -> tuple[float, int, float]:
    cost = made.cost
    if role == "prefill":
        return cost.prefill_rate(stages), 0, 0.0
    rate, batch, tpot = cost.decode_rate(stages) if role == "decode" else cost.colocated_rate(stages)
    if not rate:
        # Nothing holds the limit of time per token: what it does without is measured all the same.
        free = Problem(made.cluster, made.llm, made.workload.model_copy(update={"tpot_s": None}), (), made.engine).cost
        rate, batch, tpot = free.decode_rate(stages) if role == "decode" else free.colocated_rate(stages)
    return rate, max(1, batch), tpot
