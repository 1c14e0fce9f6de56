"""Unlike machines made of this one: vLLM on shares of its cores, each machine behind a shaped link of its own."""

from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml

from benchmarks.mixed.setting import Setting
from hexgen2 import llm as llms
from hexgen2.bench.netns import Link, Namespace
from hexgen2.cli.members import Place
from hexgen2.errors import ConfigError
from hexgen2.profile.fit import PROFILE
from hexgen2.scheduler.efficiency import engine

DTYPE = "float32"
#: Cores of each machine, and its link in bits/s. What is left of two cores is for gateway, coordinator and clients.
MACHINES = {"a": (0.6, 1e9), "b": (0.4, 1e9), "c": (0.3, 0.5e9), "d": (0.2, 0.5e9)}
LATENCY_S = 2e-4
MEMORY_MIB = 3000
WORKLOADS = {"prefill-heavy": (256, 8), "decode-heavy": (32, 48)}
#: Seconds for each token after the first.
TPOT_S = 1.0
#: Where coordinator and gateway listen.
HUB = "10.78.0.1"
#: Times that a share of a core makes longer.
_TIMES = ("gemm_s", "attention_s", "cached_attention_s")


def setting(profile: Path, model: Path) -> Setting:
    """``profile``: what ``hexgen2 profile --engine vllm`` wrote of one whole core.

    Raises:
        ConfigError: it has no core.
    """
    kinds = yaml.safe_load(profile.read_text(encoding="utf-8"))["gpu_types"]
    if "cpu" not in kinds:
        raise ConfigError(f"{profile}: gpu_types: no cpu: profile a machine without GPUs")
    cluster = {
        "name": "mixed",
        "gpu_types": {_kind(cores): _share(kinds["cpu"], cores) for cores, _ in MACHINES.values()},
        "machines": [
            {
                "name": name,
                "gpus": {_kind(cores): 1},
                "nic": {"bandwidth_bytes_per_s": bits_per_s / 8, "latency_s": LATENCY_S},
            }
            for name, (cores, bits_per_s) in MACHINES.items()
        ],
    }
    splits = tuple(each for size in (1, 2, 3) for each in combinations(MACHINES, size))
    return Setting(
        cluster=cluster,
        llm=llms.find(model, weight_dtype=DTYPE, kv_dtype=DTYPE),
        workloads=WORKLOADS,
        tpot_s=TPOT_S,
        guesses={
            "equal-split": (("a", "d"),),
            "round-robin": (("a", "c"),),
            "one-role-each": (("a", "b"), ("c", "d")),
            "by-hand": splits,
            "by-hand-halves": tuple(each for each in splits if len(each) == 2),
            "colocated": ((),),
        },
        by_speed=frozenset({"by-hand", "by-hand-halves", "colocated"}),
        engine=engine(PROFILE),
    )


def places() -> dict[str, Place]:
    """A namespace for each machine, joined to this one's by a link of its own. The caller has entered one."""
    here = Namespace.here()
    here.run("ip", "address", "replace", f"{HUB}/32", "dev", "lo")
    found = {}
    for number, (name, (_, bits_per_s)) in enumerate(MACHINES.items(), 1):
        near, host = f"10.78.{number}.1", f"10.78.{number}.2"
        link = Link.between(here, near, Namespace.new(), host)
        link.route_all_through(near)
        link.shape(bits_per_s)
        found[name] = Place(host, link.b_side.command)
    return found


def _kind(cores: float) -> str:
    return f"cpu-{cores:g}"


def _share(core: Mapping[str, Any], cores: float) -> dict[str, Any]:
    """A core that stands still for part of the time: all takes longer alike."""
    return {
        **{key: value for key, value in core.items() if key != "measured"},
        "flops": core["flops"] * cores,
        "memory_bandwidth_bytes_per_s": core["memory_bandwidth_bytes_per_s"] * cores,
        "memory_mib": MEMORY_MIB,
        "reached": {key: value / cores if key in _TIMES else value for key, value in core["reached"].items()},
        "host": {key: value / cores for key, value in core["host"].items()},
    }
