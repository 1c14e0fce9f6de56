"""The measuring process of ``hexgen2 bench kv``: one pair of processes, one transport, all that is asked of it.

Prints a row of JSON a line. What is compared is measured in turns, so that both meet the machine in the same mood; each
figure is the median. ``gb_per_s`` counts the engine's bytes, however few a codec makes of them.
"""

import asyncio
import os
import signal
import sys
from statistics import median

import msgspec
import torch

from hexgen2.bench.kv_rig import Rig, rig
from hexgen2.bench.kv_talk import SHAPE, Setup

LIFE_S = 900


class Row(msgspec.Struct, frozen=True):
    """One figure. ``ratio`` is to ``raw_gb_per_s``; of stage ``exposed`` it is exposed time to prefill's time."""

    transport: str
    codec: str
    stage: str
    bytes: int
    gb_per_s: float
    raw_gb_per_s: float
    ratio: float
    link: str
    routes: int


class Job(msgspec.Struct, frozen=True):
    """What to measure. ``what``: (stage, codec, tokens); ``command`` goes before the sender's."""

    ours: Setup
    theirs: Setup
    what: tuple[tuple[str, str, int], ...]
    repeat: int
    link: str = "this machine"
    command: tuple[str, ...] = ()
    prefill_s: float = 0.0


async def measure(job: Job) -> None:
    """Print a row for each of ``what``."""
    routes = max(len(setup.hosts.split(",")) for setup in (job.ours, job.theirs))
    async with rig(job.ours, job.theirs, job.command) as pair:
        for size in dict.fromkeys(tokens for _, _, tokens in job.what):
            wanted = [(stage, codec) for stage, codec, tokens in job.what if tokens == size]
            num_bytes = size * SHAPE.bytes_per_token
            raw_s: list[float] = []
            ours_s: dict[tuple[str, str], list[float]] = {each: [] for each in wanted}
            for turn in range(job.repeat + 1):  # the first one warms up
                taken = await pair.raw(num_bytes)
                if turn:
                    raw_s.append(taken)
                for stage, codec in wanted:
                    taken = await one(pair, size, stage, codec, job.prefill_s)
                    if turn:
                        ours_s[stage, codec].append(taken)
            raw = num_bytes / median(raw_s) / 1e9
            for (stage, codec), seconds in ours_s.items():
                speed = num_bytes / median(seconds) / 1e9
                ratio = median(seconds) / job.prefill_s if stage == "exposed" else speed / raw
                row = Row(
                    *(pair.detail, codec, stage, num_bytes, round(speed, 4), round(raw, 4), round(ratio, 3)),
                    *(job.link, routes),
                )
                print(msgspec.json.encode(row).decode(), flush=True)


async def one(pair: Rig, num_tokens: int, stage: str, codec: str, prefill_s: float) -> float:
    """Seconds of one hand-over."""
    if stage == "exposed":
        return await pair.exposed(num_tokens, codec, prefill_s)
    return await pair.hand_over(num_tokens, stage, codec)


if __name__ == "__main__":
    signal.alarm(LIFE_S)
    torch.set_num_threads(1)
    asyncio.run(measure(msgspec.json.decode(sys.argv[1], type=Job)))
    sys.stdout.flush()
    # UCX's exit handlers may crash where there is no InfiniBand.
    os._exit(0)
