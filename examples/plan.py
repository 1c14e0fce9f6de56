"""Plan from Python: ``python examples/plan.py [CLUSTER] [MODEL] [WORKLOAD]``, each a file or a name of the catalog."""

import sys

from hexgen2.placement import to_yaml
from hexgen2.scheduler.schedule import schedule


def main(cluster: str = "workstation", model: str = "llama-2-7b", workload: str = "lpld") -> None:
    """Print what the plan promises, its replicas and routes, and how the file that runs it begins."""
    # More evaluations find better plans; the same arguments give the same plan.
    plan = schedule(cluster, model, workload, evaluations=200, seed=0)
    print(f"{plan.throughput_rps:.3g} requests/s, {plan.kind}: {plan.why}")
    if plan.gap is not None:
        print(f"no plan could be more than {plan.gap:.1%} above it; in the way: {plan.bottleneck}")
    for replica in plan.replicas:
        gpus = ", ".join(f"{count} {gpu} on {machine}" for (machine, gpu), count in replica.gpus.items())
        print(f"  {replica.id}: {gpus}, {replica.flow_rps:.3g} of {replica.capacity_rps:.3g} requests/s")
    for route in plan.routes:
        print(f"  {route.prefill} -> {route.decode}: {route.flow_rps:.3g} requests/s")
    print(f"plan.yaml: {to_yaml(plan).splitlines()[0]} ...")


if __name__ == "__main__":
    main(*sys.argv[1:])
