"""The rack as files: its hosts, the plan that runs there, and the inventory. Pure."""

from collections.abc import Sequence
from itertools import product

import yaml

from hexgen2.placement import Placement, ReplicaPlan, RoutePlan, StagePlan

SUBNET = "10.89.77.0/24"
#: By name. The coordinator is on the first, gateways on the first and the last.
HOSTS = {"a": "10.89.77.11", "b": "10.89.77.12", "c": "10.89.77.13"}
GATEWAYS = ("a", "c")
#: Each role is on two hosts, so that one of them may go.
REPLICAS = {"prefill-0": "a", "prefill-1": "b", "decode-0": "b", "decode-1": "c"}
#: Where models are on the hosts.
MODELS = "/srv/models"
#: What an emulated worker needs beside the package: the hand-over's tensors.
ENGINE_PACKAGES = ("torch==2.13.0+cpu", "numba>=0.61")

_FLOW_RPS = 0.5


def plan() -> Placement:
    """Made by hand: any plan would do, engines are emulated."""
    prefill, decode = ([name for name in REPLICAS if name.startswith(role)] for role in ("prefill", "decode"))
    routes = tuple(
        RoutePlan(prefill=first, decode=second, flow_rps=_FLOW_RPS, transfer_s=0.01)
        for first, second in product(prefill, decode)
    )
    return Placement(
        cluster="three-machines",
        model="llama-2-7b",
        workload="hphd",
        kind="disaggregated",
        why="each role on two hosts",
        throughput_rps=_FLOW_RPS * len(routes),
        bottleneck="none",
        ttft_s=0.5,
        tpot_s=0.05,
        load_rps=_FLOW_RPS * len(routes) * 0.75,
        output_tokens_per_s=100.0,
        strategy="by hand",
        seed=0,
        evaluations=0,
        replicas=tuple(_replica(name, machine) for name, machine in REPLICAS.items()),
        routes=routes,
        links=(),
        idle=(),
    )


def _replica(name: str, machine: str) -> ReplicaPlan:
    role = name.partition("-")[0]
    stage = StagePlan(machine=machine, gpu="cpu", tensor_parallel_size=1, first_layer=0, num_layers=32)
    return ReplicaPlan.model_validate(
        {
            "id": name,
            "role": role,
            "stages": (stage,),
            "capacity_rps": 4 * _FLOW_RPS,
            "flow_rps": 2 * _FLOW_RPS,
            "utilisation": 0.5,
            "batch": 8 if role == "decode" else None,
        }
    )


def inventory(model: str, vocab_size: int, wheel: str) -> str:
    """An inventory.yaml. ``model``: its folder's name in ``MODELS``; ``wheel``: this package, beside the inventory."""
    packages: Sequence[str] = (wheel, *ENGINE_PACKAGES)
    data = {
        "hosts": [{"name": name, "address": address, "cores": 2} for name, address in HOSTS.items()],
        "coordinator": next(iter(HOSTS)),
        "gateways": list(GATEWAYS),
        "model": f"{MODELS}/{model}",
        "engine": {"kind": "emulated", "vocab_size": vocab_size},
        "packages": list(packages),
        "constraints": "constraints.txt",
    }
    return yaml.safe_dump(data, sort_keys=False)
