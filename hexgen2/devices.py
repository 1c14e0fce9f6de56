"""What a plan's GPUs are on this machine: GPUs by number, or shares of CPU cores. Pure, but for ``here``.

A plan may name CPU cores as its devices: ``cpu`` is one core, ``cpu-0.25`` a quarter of one. GPUs have their catalog
names; a driver's name is matched by its words ("NVIDIA A100-SXM4-80GB" is an ``A100-SXM``).
"""

import os
import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from hexgen2.errors import ConfigError
from hexgen2.placement import Placement, ReplicaPlan

#: How long the driver may take to list its GPUs.
DRIVER_TIMEOUT_S = 20.0

_CPU = re.compile(r"cpu(?:-(0\.\d+|[1-9]\d*(?:\.\d+)?))?")


@dataclass(frozen=True, slots=True)
class Machine:
    """This machine: the driver's name of each GPU by number, and cores that this process may use."""

    gpus: tuple[str, ...]
    cores: int


@dataclass(frozen=True, slots=True)
class Share:
    """What one replica gets: GPUs by number, rank by rank, or so many cores."""

    gpus: tuple[int, ...] = ()
    cores: float = 0.0


def here() -> Machine:
    """The machine that this runs on; without a driver it has no GPU."""
    try:
        found = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=DRIVER_TIMEOUT_S,
            check=False,
        )
        names = found.stdout.splitlines() if found.returncode == 0 else []
    except (OSError, subprocess.TimeoutExpired):
        names = []
    return Machine(tuple(name.strip() for name in names if name.strip()), len(os.sched_getaffinity(0)))


def cpu_share(device: str) -> float | None:
    """Cores of a CPU device; None for what is none."""
    match = _CPU.fullmatch(device)
    return None if match is None else float(match.group(1) or 1)


def is_gpu(planned: str, driver_name: str) -> bool:
    """Whether a GPU that the driver calls so is the catalog's."""
    words = re.split(r"[^a-z0-9]+", driver_name.lower())
    wanted = planned.lower().split("-")
    # The last part is the form factor, which drivers spell with a number (SXM4) or not at all (H200 is SXM alone).
    form = wanted[-1] if len(wanted) > 1 and wanted[-1] in ("sxm", "pcie") else ""
    names = wanted[:-1] if form else wanted
    if not all(name in words for name in names):
        return False
    other = "pcie" if form == "sxm" else "sxm"
    return not (form and any(word.startswith(other) for word in words))


def shares(placement: Placement, machine: Machine) -> Mapping[str, Share]:
    """What each replica of the plan gets of this machine.

    Raises:
        ConfigError: the machine does not have it; says what differs and what to do.
    """
    problems = missing(placement, machine)
    if problems:
        raise ConfigError(
            f"the plan is for other hardware than this machine has: {'; '.join(problems)}. Start it where that is, "
            "plan for this machine, or rehearse the plan here with --engine emulated"
        )
    free = list(range(len(machine.gpus)))
    found: dict[str, Share] = {}
    for replica in placement.replicas:
        gpus: list[int] = []
        for stage in replica.stages:
            for _ in range(stage.tensor_parallel_size if cpu_share(stage.gpu) is None else 0):
                number = next(each for each in free if is_gpu(stage.gpu, machine.gpus[each]))
                free.remove(number)
                gpus.append(number)
        found[replica.id] = Share(tuple(gpus), _cores(replica))
    return found


def missing(placement: Placement, machine: Machine) -> list[str]:
    """What the plan takes and the machine does not have, each in a few words."""
    problems = []
    wanted: Counter[str] = Counter()
    for replica in placement.replicas:
        devices = [stage.gpu for stage in replica.stages]
        if 0 < sum(cpu_share(device) is not None for device in devices) < len(devices):
            problems.append(f"replica {replica.id} is on GPUs and CPU cores at once, which no engine serves")
        for stage in replica.stages:
            wanted[stage.gpu] += stage.tensor_parallel_size
    cores = sum(_cores(replica) for replica in placement.replicas)
    if cores > machine.cores + 1e-9:
        problems.append(f"it takes {cores:g} CPU cores, and {machine.cores} are here")
    for device, count in sorted(wanted.items()):
        if cpu_share(device) is not None:
            continue
        have = sum(is_gpu(device, name) for name in machine.gpus)
        if have < count:
            problems.append(f"it takes {count} {device}, and {_told(machine.gpus, have)}")
    return problems


def _told(gpus: Iterable[str], have: int) -> str:
    if have:
        return f"{have} {'is' if have == 1 else 'are'} here"
    counts = Counter(gpus)
    return f"{', '.join(f'{n} {name}' for name, n in sorted(counts.items()))} is here" if counts else "no GPU is here"


def _cores(replica: ReplicaPlan) -> float:
    return sum((cpu_share(stage.gpu) or 0.0) * stage.tensor_parallel_size for stage in replica.stages)
