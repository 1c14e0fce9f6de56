"""The cluster, the workloads, and what else than the plan one might have done with such machines."""

from collections.abc import Mapping
from math import ceil
from typing import Any

from hexgen2 import llm as llms
from hexgen2.cluster_file import make_cluster
from hexgen2.placement import Placement, ReplicaPlan, RoutePlan, StagePlan
from hexgen2.scheduler.cost import Stages
from hexgen2.scheduler.cost_model import even_stages
from hexgen2.scheduler.problem import Problem
from hexgen2.workload import LengthClass, Workload

MODEL = "llama-3.1-8b"
#: Two kinds of device: C computes almost twice as fast, B reads more than half as fast again. Both are some fifty times
#: slower than GPUs of today, so that what the services themselves take on a few cores does not count.
CLUSTER: Mapping[str, Any] = {
    "name": "mixed",
    "gpu_types": {
        "C": {"flops": 5.5e12, "memory_mib": 24000, "memory_bandwidth_bytes_per_s": 0.0325e12},
        "B": {"flops": 3.0e12, "memory_mib": 24000, "memory_bandwidth_bytes_per_s": 0.0525e12},
    },
    "machines": [
        {"name": "c", "count": 3, "gpus": {"C": 1}},
        {"name": "b", "count": 3, "gpus": {"B": 1}},
    ],
}
#: Seconds for each token after the first.
TPOT_S = 0.65
WORKLOADS = {
    "prefill-heavy": (500, 4),
    "decode-heavy": (16, 64),
}


def workload(name: str) -> Workload:
    """By name; all requests alike, so that what is foretold is one number."""
    prompt, output = WORKLOADS[name]
    lengths = (LengthClass(prompt_tokens=prompt, output_tokens=output, weight=1.0),)
    return Workload(name=name, lengths=lengths, tpot_s=TPOT_S)


def problem(name: str) -> Problem:
    """What is planned for."""
    return Problem(make_cluster(CLUSTER), llms.find(MODEL), workload(name))


def by_hand(made: Problem, roles: Mapping[str, str]) -> Placement:
    """A placement with one replica for each machine in the role it is given, every route with the same share."""
    cost, mean = made.cost, made.workload.mean_prompt_tokens
    kinds = {machine.name: machine.gpus[0][0] for machine in made.cluster.machines}
    stages = {kind: even_stages(made.llm, made.cluster.gpu_type(kind)) for kind in set(kinds.values())}
    replicas = []
    for machine, role in roles.items():
        kind = kinds[machine]
        rate, batch, tpot = _rates(made, stages[kind], role)
        replicas.append(
            ReplicaPlan(
                id=f"{role}-{machine}",
                role=role,
                stages=(
                    StagePlan(
                        machine=machine, gpu=kind, tensor_parallel_size=1, first_layer=0, num_layers=made.llm.num_layers
                    ),
                ),
                capacity_rps=rate,
                flow_rps=1.0,
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
            RoutePlan(prefill=p.id, decode=d.id, flow_rps=1.0, transfer_s=0.0)
            for p in ends["prefill"]
            for d in ends["decode"]
        ),
        links=(),
        idle=(),
    )


def guesses(made: Problem) -> dict[str, Placement]:
    """Without a planner. Of the two ways to give each kind of device one role, the one that carries more.

    ``round-robin``: machines take roles in turn. ``colocated``: every machine serves whole requests.
    """
    c, b = ([f"{kind}-{number}" for number in range(3)] for kind in "cb")

    def placed(*prefill: str) -> Placement:
        return by_hand(made, {machine: "prefill" if machine in prefill else "decode" for machine in (*c, *b)})

    return {
        "equal-split": placed(c[0], b[0], b[1]),
        "round-robin": placed(c[0], c[2], b[1]),
        "one-role-each": max((placed(*c), placed(*b)), key=lambda each: each.throughput_rps),
        "colocated": by_hand(made, dict.fromkeys((*c, *b), "colocated")),
    }


def in_flight(made: Problem, placement: Placement) -> int:
    """Requests at a time that keep the bottleneck busy, with little more than that waiting before it."""
    decoding = [each for each in placement.replicas if each.tpot_s is not None]
    answer_s = max(each.tpot_s or 0.0 for each in decoding) * (made.workload.mean_output_tokens - 1)
    most = sum(each.batch or 1 for each in decoding)
    prefilling = sum(each.role != "decode" for each in placement.replicas)
    return 2 * prefilling + min(most, ceil(1.1 * placement.throughput_rps * answer_s))


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
