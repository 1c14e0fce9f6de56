"""The built-in workloads: length tables of public production traces, and of the paper's four classes of one of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hexgen2.request_trace import Request, read_trace, summarise

#: More prompt tokens make heavy prefill, more output tokens heavy decode (paper, section 5).
HEAVY_PROMPT_TOKENS, HEAVY_OUTPUT_TOKENS = 512, 128

CONVERSATION = "azure2023_conv.csv.gz"
OTHERS = {"azure-code": "azure2023_code.csv.gz", "mooncake-conversation": "mooncake_conversation.csv.gz"}


def fit_workloads(folder: Path) -> dict[str, Any]:
    """Entries of workloads.yaml by name. Raises ConfigError when a trace is missing."""
    conversation = read_trace(folder / CONVERSATION)
    found = {}
    for name in ("HPLD", "HPHD", "LPHD", "LPLD"):
        members = [request for request in conversation if classify(request) == name]
        found[name] = _entry(members, len(conversation))
    found["azure-conversation"] = _entry(conversation, len(conversation))
    for name, file in OTHERS.items():
        requests = read_trace(folder / file)
        found[name] = _entry(requests, len(requests))
    return found


def classify(request: Request) -> str:
    """HPLD, HPHD, LPHD or LPLD: heavy or light prefill, heavy or light decode."""
    prefill = "HP" if request.prompt_tokens > HEAVY_PROMPT_TOKENS else "LP"
    return prefill + ("HD" if request.output_tokens > HEAVY_OUTPUT_TOKENS else "LD")


def _entry(requests: Sequence[Request], total: int) -> dict[str, Any]:
    prompts, outputs = ([request[index] for request in requests] for index in (0, 1))
    return {
        "requests": len(requests),
        "share": round(len(requests) / total, 4),
        "mean_prompt_tokens": round(sum(prompts) / len(prompts), 1),
        "mean_output_tokens": round(sum(outputs) / len(outputs), 1),
        "lengths": [[p.prompt_tokens, p.output_tokens, round(p.weight, 6)] for p in summarise(requests)],
    }
