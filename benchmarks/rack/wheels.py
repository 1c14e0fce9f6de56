"""Wheels that the hosts install from, so that they need no network: this tree as two releases, and what these need."""

import shutil
import sys
import tempfile
from pathlib import Path

from benchmarks.rack.command import run
from benchmarks.rack.files import ENGINE_PACKAGES
from hexgen2 import __version__

TREE = Path(__file__).parents[2]
#: What the package is built from (MANIFEST.in).
_SOURCE = ("hexgen2", "services", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in")
_PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
_BUILD_S, _DOWNLOAD_S = 300.0, 1800.0


def releases() -> tuple[str, str]:
    """This tree's version, and one whose last number is higher."""
    first, _, last = __version__.rpartition(".")
    return __version__, f"{first}.{int(last) + 1}"


async def build(version: str, folder: Path) -> Path:
    """This tree as a wheel of ``version``, in ``folder``."""
    with tempfile.TemporaryDirectory(prefix="hexgen2-wheel-") as name:
        source = Path(name)
        for each in _SOURCE:
            if (TREE / each).is_dir():
                shutil.copytree(TREE / each, source / each, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copyfile(TREE / each, source / each)
        for file, line in (("pyproject.toml", 'version = "{}"'), ("hexgen2/__init__.py", '__version__ = "{}"')):
            text = (source / file).read_text(encoding="utf-8")
            (source / file).write_text(
                text.replace(line.format(__version__), line.format(version), 1), encoding="utf-8"
            )
        await run(*_PIP, "wheel", "--no-deps", "--wheel-dir", folder, source, limit_s=_BUILD_S)
    return folder / f"hexgen2-{version}-py3-none-any.whl"


async def download(wheel: Path, folder: Path) -> None:
    """All that ``wheel`` needs, for this Python, to ``folder``; what is there already is not fetched again."""
    _clear(folder)
    places = (f"--constraint={TREE / 'constraints.txt'}", f"--find-links={folder}", f"--dest={folder}")
    words = ("download", "--only-binary=:all:", *places)
    await run(*_PIP, *words, wheel, *ENGINE_PACKAGES, limit_s=_DOWNLOAD_S)


def _clear(folder: Path) -> None:
    """Earlier builds of this tree would be taken for this one: they have its name."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("hexgen2-*.whl"):
        old.unlink()
