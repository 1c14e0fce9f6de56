"""The catalog: GPUs, links, models, workloads, engines and clusters as dated YAML data beside this file.

Numbers live there and nowhere in code; each file says as of when and whence. Looked up by plain names.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent


@cache
def table(name: str) -> Mapping[str, Any]:
    """The file ``NAME.yaml`` of the catalog as it is. Shared: do not change it."""
    loaded: dict[str, Any] = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    return loaded


def names(kind: str) -> tuple[str, ...]:
    """What the catalog has of a kind: ``gpus``, ``links``, ``models``, ``workloads`` or ``engines``."""
    return tuple(table(kind)[kind])


def cluster_files() -> Mapping[str, Path]:
    """The example clusters, by name."""
    return {path.stem: path for path in sorted((FOLDER / "clusters").glob("*.yaml"))}
