"""``hexgen2 bench kv``: hand-overs between two processes, beside the bare transport, with stages left out, over links
of a chosen rate and over two of them; and what of a hand-over prefill does not hide."""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec

import msgspec

from hexgen2.bench import netns
from hexgen2.bench.kv_measure import LIFE_S, Job, Row
from hexgen2.bench.kv_talk import SHAPE, Setup
from hexgen2.bench.netns import Link, Namespace
from hexgen2.errors import Unavailable
from hexgen2.kv.ucx import NIXL_MODULES

HOST = "127.0.0.1"
STAGES = ("protocol", "gather", "digest")
#: What the figures should reach, by (transport, stage), as a share of the bare transport.
TARGETS = {
    ("tcp", "protocol"): 0.9,
    ("ucx", "protocol"): 0.9,
    ("tcp", "gather"): 0.8,
    ("ucx", "gather"): 0.6,
    ("tcp", "digest"): 0.7,
    ("ucx", "digest"): 0.45,
}
SHAPED_TARGET, TWO_ROUTES_TARGET, INT8_TARGET, EXPOSED_TARGET = 0.95, 1.8, 1.6, 0.1
#: How long the prefill takes whose KV is sent meanwhile.
PREFILL_S = 1.0
_SHAPED_MBIT = (1000, 5000)
_ADDRESSES = (("10.77.0.1", "10.77.0.2"), ("10.78.0.1", "10.78.0.2"))


def transports() -> tuple[str, ...]:
    """Those of this machine."""
    return ("tcp", "ucx") if any(map(find_spec, NIXL_MODULES)) else ("tcp",)


def local_rows(name: str, codecs: Sequence[str], sizes: Sequence[int], repeat: int) -> Iterator[Row]:
    """Between two processes of this machine. ``sizes`` in MiB."""
    tokens = [size * (1 << 20) // SHAPE.bytes_per_token for size in sizes]
    what = [(stage, "none", size) for size in tokens for stage in STAGES]
    what += [("digest", codec, size) for size in tokens for codec in codecs if codec != "none"]
    setup = Setup(name, HOST, "", max(tokens))
    yield from _run(Job(setup, setup, tuple(what), repeat))
    yield from _run(Job(setup, setup, (("exposed", "none", tokens[-1]),), min(repeat, 5), prefill_s=PREFILL_S))


def shaped_rows(codecs: Sequence[str], size: int, repeat: int) -> Iterator[Row]:
    """Over TCP through shaped links between two network namespaces: one, then two at once. ``size`` in MiB."""
    tokens = size * (1 << 20) // SHAPE.bytes_per_token
    here, there = Namespace.new(), Namespace.new()
    links = [Link.between(here, a, there, b) for a, b in _ADDRESSES]
    ours, theirs = ([pair[side] for pair in _ADDRESSES] for side in (0, 1))
    for mbit in _SHAPED_MBIT:
        for link in links:
            link.shape(mbit * 1e6)
        for routes in (1, 2):
            what = [("digest", "none", tokens)]
            if routes == 1:
                what += [("digest", codec, tokens) for codec in codecs if codec != "none"]
            job = Job(
                Setup("tcp", ",".join(ours[:routes]), "", tokens),
                Setup("tcp", ",".join(theirs[:routes]), "", tokens),
                tuple(what),
                repeat,
                link=f"{mbit / 1000:g} Gbit/s" + (" x 2" if routes == 2 else ""),
                command=there.command,
            )
            yield from _run(job, here.command)


def why_not_shaped() -> str:
    """Why there are no shaped rows; empty when there are."""
    return netns.why_not()


def target(row: Row) -> float | None:
    """What the row's ratio should be at least (of stage ``exposed``: at most); None: nothing is asked of it."""
    if row.stage == "exposed":
        return EXPOSED_TARGET
    if row.routes == 2:
        return TWO_ROUTES_TARGET
    if row.link.endswith("Gbit/s"):
        return (
            SHAPED_TARGET if row.codec == "none" else INT8_TARGET if (row.codec, row.link[0]) == ("int8", "1") else None
        )
    return TARGETS.get((row.transport.split()[0], row.stage)) if row.codec == "none" else None


def _run(job: Job, command: Sequence[str] = ()) -> Iterator[Row]:
    text = msgspec.json.encode(job).decode()
    args = [*command, sys.executable, "-m", "hexgen2.bench.kv_measure", text]
    with subprocess.Popen(args, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                yield msgspec.json.decode(line, type=Row)
            if process.wait(LIFE_S):
                raise Unavailable(f"the measuring process ended with status {process.returncode}")
        finally:
            process.kill()
