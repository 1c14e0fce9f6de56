import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from hexgen2.engine import vllm_env

ENGINE = Path(vllm_env.__file__).parent

#: What a process does that imports a package for CUDA, and one that asks first.
PROBE = "import importlib.util, sys; print(importlib.util.find_spec('torchvision')); import torchvision"


@pytest.fixture
def distributions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the path with ``torchvision`` in a build that cannot be imported."""
    install(tmp_path, "torch", "2.13.0+cpu")
    install(tmp_path, "torchvision", "0.28.0")
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def install(folder: Path, name: str, version: str) -> None:
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def run_child(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROBE],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_packages_of_another_build_than_torchs_are_unusable(distributions: Path) -> None:
    assert vllm_env.unusable_packages() == ("torchvision",)
    install(distributions, "torchaudio", "2.13.0+cpu")
    assert vllm_env.unusable_packages() == ("torchvision",)


def test_they_are_absent_here_and_in_children(distributions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(distributions))
    monkeypatch.setenv("HEXGEN2_ABSENT_PACKAGES", "")
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    assert "operator torchvision::nms" in run_child().stderr
    vllm_env._hide(vllm_env.unusable_packages())
    assert find_spec("torchvision") is None
    child = run_child()
    assert child.stdout == "None\n"
    assert child.stderr.strip().splitlines()[-1].startswith("ModuleNotFoundError")
    monkeypatch.delitem(sys.modules, "torchvision")


def test_another_sitecustomize_still_runs(distributions: Path) -> None:
    (distributions / "sitecustomize.py").write_text("print('theirs')")
    child = run_child(
        PYTHONPATH=os.pathsep.join((str(ENGINE / "child_site"), str(distributions))),
        HEXGEN2_ABSENT_PACKAGES="torchvision",
    )
    assert child.stdout == "theirs\nNone\n"


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as scope:
        for name in ("OMP_WAIT_POLICY", "VLLM_NO_USAGE_STATS", "OMP_NUM_THREADS", "TORCH_COMPILE_DISABLE"):
            scope.setenv(name, "")
            scope.delenv(name)
        for name in ("DO_NOT_TRACK", "HF_HUB_OFFLINE", "TORCH_CPP_LOG_LEVEL", "VLLM_CPU_OMP_THREADS_BIND"):
            scope.setenv(name, os.environ.get(name, "kept"))
        for name in ("VLLM_LOGGING_LEVEL", "VLLM_LOGGING_STREAM"):
            scope.setenv(name, os.environ.get(name, "kept"))
        scope.setenv("OMP_WAIT_POLICY", "ACTIVE")
        scope.setattr(vllm_env, "unusable_packages", lambda: ())
        vllm_env.prepare(3, cpu=False)
        assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
        assert os.environ["VLLM_NO_USAGE_STATS"] == "1"
        assert os.environ["OMP_NUM_THREADS"] == "3"
        assert "TORCH_COMPILE_DISABLE" not in os.environ
