"""Small plans that can be checked in the head."""

from pathlib import Path

from hexgen2.placement import Placement, ReplicaPlan, RoutePlan, StagePlan, to_yaml


def stage(gpu: str = "A100-SXM", size: int = 1, first: int = 0, layers: int = 40, machine: str = "a100") -> StagePlan:
    return StagePlan(machine=machine, gpu=gpu, tensor_parallel_size=size, first_layer=first, num_layers=layers)


def planned_replica(replica_id: str, role: str, *stages: StagePlan, flow: float = 1.0, batch: int = 8) -> ReplicaPlan:
    return ReplicaPlan.model_validate(
        {
            "id": replica_id,
            "role": role,
            "stages": stages or (stage(),),
            "capacity_rps": 2.0,
            "flow_rps": flow,
            "utilisation": flow / 2,
            "batch": None if role == "prefill" else batch,
        }
    )


def placement(*replicas: ReplicaPlan, routes: tuple[tuple[str, str, float], ...] = ()) -> Placement:
    """On the catalog's ``three-machines``, of a model with 40 layers."""
    return Placement(
        cluster="three-machines",
        model="llama-2-13b",
        workload="hphd",
        kind="mixed",
        why="a test",
        throughput_rps=2.0,
        bottleneck="none",
        ttft_s=0.5,
        tpot_s=0.05,
        load_rps=1.5,
        output_tokens_per_s=100.0,
        strategy="by hand",
        seed=0,
        evaluations=0,
        replicas=replicas,
        routes=tuple(RoutePlan(prefill=p, decode=d, flow_rps=flow, transfer_s=0.01) for p, d, flow in routes),
        links=(),
        idle=(),
    )


def mixed() -> Placement:
    """One of each role on A100s of one machine: a request in three is served as a whole."""
    return placement(
        planned_replica("p", "prefill", flow=2.0),
        planned_replica("d", "decode", flow=2.0),
        planned_replica("c", "colocated", flow=1.0),
        routes=(("p", "d", 2.0),),
    )


def write(folder: Path, plan: Placement, name: str = "plan.yaml") -> Path:
    path = folder / name
    path.write_text(to_yaml(plan), encoding="utf-8")
    return path
