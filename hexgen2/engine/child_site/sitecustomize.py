"""Python imports this first in each process whose PYTHONPATH names this folder: packages named in the environment
are absent there. A spawned process imports vLLM, and with it everything else, before any code of ours."""

import os
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

for _name in filter(None, os.environ.get("HEXGEN2_ABSENT_PACKAGES", "").split(",")):
    sys.modules.setdefault(_name, None)  # type: ignore[arg-type]

# The sitecustomize that this one stands before, if there is one.
_here = Path(__file__).resolve().parent
_spec = PathFinder.find_spec("sitecustomize", [entry for entry in sys.path if Path(entry or ".").resolve() != _here])
if _spec is not None and _spec.loader is not None:
    _spec.loader.exec_module(module_from_spec(_spec))
