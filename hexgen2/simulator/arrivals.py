"""Where requests come from: a workload's lengths at random times, or a trace as it was, faster, or all at once."""

from bisect import bisect
from collections.abc import Iterable, Iterator
from itertools import accumulate
from random import Random

from hexgen2.simulator.blueprint import Arrival
from hexgen2.workload import Workload


def poisson(workload: Workload, rate: float, count: int, seed: int) -> Iterator[Arrival]:
    """``count`` requests at ``rate`` per second, independent of each other; lengths by the workload's weights."""
    chance = Random(seed)
    shares = list(accumulate(point.weight for point in workload.lengths))
    time_s = 0.0
    for _ in range(count):
        time_s += chance.expovariate(rate)
        point = workload.lengths[min(bisect(shares, chance.random() * shares[-1]), len(shares) - 1)]
        yield Arrival(time_s, point.prompt_tokens, point.output_tokens)


def at_once(workload: Workload, count: int, seed: int) -> Iterator[Arrival]:
    """``count`` requests, all of them at time 0: offline work."""
    return (arrival._replace(time_s=0.0) for arrival in poisson(workload, 1.0, count, seed))


def scaled(arrivals: Iterable[Arrival], speed: float) -> Iterator[Arrival]:
    """The same requests, coming ``speed`` times as fast."""
    return (arrival._replace(time_s=arrival.time_s / speed) for arrival in arrivals)


def redrawn(arrivals: Iterable[Arrival], rate: float, seed: int) -> Iterator[Arrival]:
    """The same requests in the same order at ``rate`` per second, independent of each other."""
    chance = Random(seed)
    time_s = 0.0
    for arrival in arrivals:
        time_s += chance.expovariate(rate)
        yield arrival._replace(time_s=time_s)
