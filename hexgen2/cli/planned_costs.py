"""Files for emulated engines that stand for a plan's replicas: what a step costs on the planned GPUs."""

from collections.abc import Mapping
from pathlib import Path

import yaml

from hexgen2 import llm as llms
from hexgen2.cli.fleet_config import FleetConfig
from hexgen2.cluster_file import find_cluster
from hexgen2.engine.planned_cost import PlannedCost, StageCost
from hexgen2.placement import Placement
from hexgen2.scheduler.problem import Problem
from hexgen2.simulator.planned import Planned, planned
from hexgen2.workload_file import find_workload


def write_costs(config: FleetConfig, placement: Placement, run_dir: Path) -> Mapping[str, Path]:
    """A file for each replica with what its steps cost on the planned GPUs."""
    problem = Problem(
        find_cluster(config.cluster or placement.cluster),
        llms.find(placement.model),
        find_workload(config.workload or placement.workload),
    )
    longest = problem.workload.longest_prompt_tokens
    plan = planned(placement, problem, longest, where=lambda place: f"{config.plan}: {'.'.join(map(str, place))}: ")
    files = {}
    for replica in placement.replicas:
        files[replica.id] = file = run_dir / f"{replica.id}-cost.yaml"
        text = yaml.safe_dump(planned_cost(plan, replica.id).model_dump(mode="json"), sort_keys=False)
        file.write_text(text, encoding="utf-8")
    return files


def planned_cost(planned: Planned, replica_id: str) -> PlannedCost:
    """Of one replica of a plan."""
    problem, plan = planned.problem, planned.placement
    role = planned.roles[replica_id]
    limits = planned.replica(replica_id, role).limits
    return PlannedCost(
        model=plan.model,
        workload=problem.workload,
        gpu_types=problem.cluster.gpu_types,
        stages=tuple(
            StageCost(
                gpu=stage.gpu,
                tensor_parallel_size=stage.tensor_parallel_size,
                num_layers=stage.num_layers,
                tp_bandwidth_bytes_per_s=stage.tp_bandwidth_bytes_per_s,
                tp_latency_s=stage.tp_latency_s,
                next_bandwidth_bytes_per_s=(
                    None if stage.next_bandwidth_bytes_per_s == float("inf") else stage.next_bandwidth_bytes_per_s
                ),
                next_latency_s=stage.next_latency_s,
            )
            for stage in planned.stages(replica_id)
        ),
        kv_tokens=limits.kv_tokens,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        num_lanes=limits.num_lanes if role != "prefill" else 1,
    )
