"""JSON schemas of files that people write, from the classes that read them. `python -m hexgen2.schemas` writes them."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel

from hexgen2.cluster_file import ClusterSpec
from hexgen2.inventory import Inventory
from hexgen2.workload_file import WorkloadSpec

FILES: Mapping[str, type[BaseModel]] = {
    "cluster.schema.json": ClusterSpec,
    "workload.schema.json": WorkloadSpec,
    "inventory.schema.json": Inventory,
}


def schema(name: str) -> str:
    """The text of a schema file."""
    document = {"$schema": "https://json-schema.org/draft/2020-12/schema", **FILES[name].model_json_schema()}
    return json.dumps(document, indent=2) + "\n"


def write(folder: Path) -> tuple[Path, ...]:
    """Write all schemas into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (folder / name).write_text(schema(name), encoding="utf-8")
    return tuple(folder / name for name in FILES)


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/schemas"))
