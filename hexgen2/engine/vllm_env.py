"""What must be true of a process before vLLM is imported in it. Imports nothing heavy."""

import atexit
import importlib.metadata
import logging
import multiprocessing
import os
import sys
from contextlib import suppress
from pathlib import Path

#: Wanted by transformers for images and sound alone. PyPI's are built for CUDA and fail to import beside a CPU torch.
OPTIONAL_PACKAGES = ("torchvision", "torchaudio", "torchcodec")


def unusable_packages() -> tuple[str, ...]:
    """Those that are installed, but not in torch's build."""
    if not _version("torch").endswith("+cpu"):
        return ()
    versions = {name: _version(name) for name in OPTIONAL_PACKAGES}
    return tuple(name for name, version in versions.items() if version and not version.endswith("+cpu"))


def prepare(omp_num_threads: int, *, cpu: bool) -> None:
    """Set this process's environment, and so its children's, for one engine. What is set already stays."""
    defaults = {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        # Of the engine's own processes; this one logs vLLM's warnings as it logs everything (``adopt_logging``).
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        # Spinning threads of two engines on the same cores slow each other down tenfold.
        "OMP_WAIT_POLICY": "PASSIVE",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    if cpu:
        # Without graphs vLLM still compiles a few small functions at their first use: the first request that asks
        # for logprobs would stop everybody else for ten seconds and more.
        defaults["TORCH_COMPILE_DISABLE"] = "1"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    os.environ["OMP_NUM_THREADS"] = str(omp_num_threads)
    _hide(unusable_packages())


def adopt_logging(level: int) -> None:
    """After vLLM's import: its records go where all of this process's do, from ``level`` on."""
    logger = logging.getLogger("vllm")
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(level)
    # Warns at every request that there is no tokenizer; we gave it none.
    logging.getLogger("vllm.renderers.base").setLevel(logging.ERROR)


def leave_at_once() -> None:
    """In a process of vLLM's own, when it ends in order: skip Python's finalisation.

    Collecting what torch and transformers leave takes seconds, and UCX may crash in it; nothing is owed by then.
    """
    error = sys.exc_info()[1]
    if multiprocessing.parent_process() is not None and (error is None or isinstance(error, SystemExit)):
        atexit.register(_leave)


def _leave() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def is_cpu() -> bool:
    """Whether vLLM will run on this machine's CPU."""
    import torch

    return not torch.cuda.is_available()


def _hide(names: tuple[str, ...]) -> None:
    """Make packages absent, also for ``importlib.util.find_spec``: here, and in every process started from here."""
    if not names:
        return
    for name in names:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
    os.environ["HEXGEN2_ABSENT_PACKAGES"] = ",".join(names)
    folder = str(Path(__file__).resolve().parent / "child_site")
    paths = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    os.environ["PYTHONPATH"] = os.pathsep.join((folder, *(path for path in paths if path != folder)))


def _version(name: str) -> str:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return ""
