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

from hexgen2.bench import bound
from hexgen2.bench.kv_rig import Rig, Taken, rig
from hexgen2.bench.kv_talk import SHAPE, Setup
from hexgen2.kv.codecs import NONE

LIFE_S = 900


class Row(msgspec.Struct, frozen=True):
    """One figure. ``ratio`` is to ``raw_gb_per_s``; of stage ``exposed`` it is exposed time to prefill's time.

    ``cpu_s_per_gb``: processor time of both ends. ``of_bound``: the share of what copies alone would allow on this
    machine (``bench.bound``), over memory and loopback and without a codec; else 0.
    """

    transport: str
    codec: str
    stage: str
    bytes: int
    gb_per_s: float
    raw_gb_per_s: float
    ratio: float
    link: str
    routes: int
    cpu_s_per_gb: float = 0.0
    of_bound: float = 0.0


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
            raws: list[Taken] = []
            ours: dict[tuple[str, str], list[Taken]] = {each: [] for each in wanted}
            for turn in range(job.repeat + 1):  # the first one warms up
                taken = await pair.raw(num_bytes)
                if turn:
                    raws.append(taken)
                for stage, codec in wanted:
                    taken = await one(pair, size, stage, codec, job.prefill_s)
                    if turn:
                        ours[stage, codec].append(taken)
            one_copy_s = await asyncio.to_thread(bound.copy_s, num_bytes, job.repeat)
            raw_s, raw_cpu_s = _medians(raws)
            for (stage, codec), all_taken in ours.items():
                seconds, cpu_s = _medians(all_taken)
                of_bound = 0.0
                if stage in bound.COPIES and codec == NONE and not job.command:
                    of_bound = bound.least_s(stage, raw_s, raw_cpu_s, one_copy_s) / seconds
                ratio = seconds / job.prefill_s if stage == "exposed" else raw_s / seconds
                row = Row(
                    transport=pair.detail,
                    codec=codec,
                    stage=stage,
                    bytes=num_bytes,
                    gb_per_s=round(num_bytes / seconds / 1e9, 4),
                    raw_gb_per_s=round(num_bytes / raw_s / 1e9, 4),
                    ratio=round(ratio, 3),
                    link=job.link,
                    routes=routes,
                    cpu_s_per_gb=round(cpu_s / num_bytes * 1e9, 3),
                    of_bound=round(of_bound, 3),
                )
                print(msgspec.json.encode(row).decode(), flush=True)


def _medians(all_taken: list[Taken]) -> Taken:
    """Of both by themselves."""
    return Taken(median(each.seconds for each in all_taken), median(each.cpu_s for each in all_taken))


async def one(pair: Rig, num_tokens: int, stage: str, codec: str, prefill_s: float) -> Taken:
    """What one hand-over takes."""
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
