"""The fleet that is tried: four alike GPUs, so slow that a few requests a second fill them, with emulated engines."""

from pathlib import Path
from typing import Any

from hexgen2 import llm as llms
from hexgen2.cli.fleet_config import FleetConfig
from hexgen2.cluster_file import load_cluster
from hexgen2.placement import Placement, to_yaml
from hexgen2.scheduler.problem import Problem
from hexgen2.scheduler.schedule import solve
from hexgen2.workload import LengthClass, Workload

#: A decode step of Llama 2 7B takes a third of a second, and a prompt of 1,000 tokens two seconds.
CLUSTER = """\
name: slow-four
gpu_types:
  slow:
    flops: 10.0e12
    memory_mib: 32768
    memory_bandwidth_bytes_per_s: 60.0e9
    link: pcie-4
    efficiency: A100-SXM
machines:
  - {name: m, count: 4, gpus: {slow: 1}}
"""
MODEL = "llama-2-7b"
TTFT_S, TPOT_S = 6.0, 0.4
#: What it is planned for: long prompts and short answers. And what comes later.
LONG_PROMPTS, LONG_ANSWERS = (1000, 8), (64, 48)
WORKLOAD = (
    f"name: long-prompts\nprompt_tokens: {LONG_PROMPTS[0]}\noutput_tokens: {LONG_PROMPTS[1]}\n"
    f"slo: {{ttft_s: {TTFT_S}, tpot_s: {TPOT_S}}}\n"
)
#: The emulated model is as small as it can be: this machine's cores are for the fleet's processes.
ENGINE: dict[str, Any] = {"kind": "emulated", "num_layers": 1, "num_kv_heads": 1, "max_num_seqs": 256}
#: As fast as a trace of two minutes needs it; a real fleet keeps the defaults.
REPLANNING: dict[str, Any] = {
    "bucket_s": 2.0,
    "window_s": 10.0,
    "min_requests": 8,
    "interval_s": 10.0,
    "watch_s": 40.0,
    "horizon_s": 60.0,
    "forecast_s": 15.0,
    "lstm_train_s": 2.0,
}


def plan(folder: Path) -> Placement:
    """Write cluster.yaml, workload.yaml and plan.yaml to ``folder``, which is made; the plan."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cluster.yaml").write_text(CLUSTER, encoding="utf-8")
    (folder / "workload.yaml").write_text(WORKLOAD, encoding="utf-8")
    lengths = (LengthClass(prompt_tokens=LONG_PROMPTS[0], output_tokens=LONG_PROMPTS[1], weight=1),)
    workload = Workload(name="long-prompts", lengths=lengths, ttft_s=TTFT_S, tpot_s=TPOT_S)
    problem = Problem(load_cluster(folder / "cluster.yaml"), llms.find(MODEL), workload)
    found = solve(problem, kind="disaggregated", evaluations=200)
    (folder / "plan.yaml").write_text(to_yaml(found), encoding="utf-8")
    return found


def config(folder: Path, tokenizer: Path, *, replan: bool) -> FleetConfig:
    """Of a fleet with the plan in ``folder``, and plans anew or does not."""
    return FleetConfig.model_validate(
        {
            "plan": folder / "plan.yaml",
            "cluster": str(folder / "cluster.yaml"),
            "workload": str(folder / "workload.yaml"),
            "replan": replan,
            "replanning": REPLANNING,
            "engine": ENGINE,
            "tokenizer": tokenizer,
            "kv": {"transport": "tcp"},
            "drain_s": 2,
            **dict.fromkeys(("listen", "http_listen", "coordinator"), "127.0.0.1:0"),
        }
    )
