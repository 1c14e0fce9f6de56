"""Where a fit is kept: two YAML files of the catalog, and a table of errors for people."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from hexgen2.scheduler.efficiency import DEFAULT_ENGINE
from hexgen2.scheduler.fit import Error, Fit

EFFICIENCIES = """\
# Made by `hexgen2 fit --write`: parts of nominal speed that measured kernels reach, and their fixed times (seconds).
# What each field is: hexgen2/scheduler/efficiency.py. Sources: matrix products, attention and collectives from
# aiconfigurator-core 0.12.0 (PyPI, Apache-2.0; medians over frameworks), A6000 and RTX-3090 products from
# casys-kaist/LLMServingSim at 5daddb21a545 (MIT). pcie-4's all-reduce is of L40S with direct access between GPUs
# (sglang 0.5.12); most other collections there had none and are 9 to 13 times slower. Attention of the A6000 and the
# RTX-3090 is the L40S's. `default` is for GPUs and links that nobody measured.
"""
ENGINES = """\
# Made by `hexgen2 fit --write`: what an engine adds to kernels. Fitted to Llama-2-70B fp16 at TP 4 on A100-80GB and
# H100-80GB (Mutinifni/splitwise-sim at 8f99e7dc9b40, MIT: an engine of 2023); 80 layers cannot tell a step's own time
# from the layers', so a tenth is taken to be the step's. max_num_seqs and max_num_batched_tokens are settings.
"""
WORKLOADS = """\
# Made by `hexgen2 fit --write`: lengths as rows of [prompt tokens, output tokens, share of the requests], quantiles of
# production traces (hexgen2/request_trace.py says how). HPLD to LPLD: Azure's conversation trace parted at more than
# 512 prompt and more than 128 output tokens. Sources: Azure/AzurePublicDataset at b469a113cedc (the traces of 2023,
# CC-BY-4.0), kvcache-ai/Mooncake at 3b5a59413395 (Apache-2.0).
"""


def write_workloads(found: Mapping[str, Any], folder: Path) -> Path:
    """Write workloads.yaml into ``folder``, a row of lengths a line."""
    lines = [WORKLOADS, "workloads:\n"]
    for name, entry in found.items():
        head = {key: value for key, value in entry.items() if key != "lengths"}
        lines.append(f"  {name}:\n" + "".join(f"    {key}: {value}\n" for key, value in head.items()))
        lines.append("    lengths:\n" + "".join(f"      - {row}\n" for row in entry["lengths"]))
    path = folder / "workloads.yaml"
    path.write_text("".join(lines), encoding="utf-8")
    return path


def write(found: Fit, folder: Path) -> tuple[Path, ...]:
    """Write the catalog's two files into ``folder``."""
    texts = {
        "efficiencies.yaml": EFFICIENCIES + dump({"gpus": _plain(found.kernels), "links": _plain(found.links)}),
        "engines.yaml": ENGINES + dump({"engines": {DEFAULT_ENGINE: _plain(found.engine)}}),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return tuple(folder / name for name in texts)


def dump(value: object) -> str:
    """YAML without anchors, keys as they come."""
    return str(yaml.dump(value, Dumper=_Plain, sort_keys=False, allow_unicode=True, width=120))


def markdown(errors: tuple[Error, ...]) -> str:
    """The errors as a table."""
    head = "| what | GPU | in the fit | measurements | median | p90 | bias |\n|---|---|---|---|---|---|---|\n"
    rows = (
        f"| {e.what} | {e.gpu} | {'no' if e.held_out else 'yes'} | {e.count} "
        f"| {e.p50:.1%} | {e.p90:.1%} | {e.bias:+.1%} |\n"
        for e in errors
    )
    return head + "".join(rows)


class _Plain(yaml.SafeDumper):
    """No anchors for values that occur twice."""

    def ignore_aliases(self, data: object) -> bool:
        """See yaml."""
        return True


def _plain(value: object) -> object:
    return {key: _plain(inner) for key, inner in value.items()} if isinstance(value, Mapping) else value
