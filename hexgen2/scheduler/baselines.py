"""Placements of other systems, to compare with: DistServe, HexGen and rows of vLLM replicas.

None of them searches from neighbour to neighbour as `refine` does; each does what its paper says, with our costs.
"""

from collections.abc import Callable
from itertools import product
from random import Random

from hexgen2.errors import ConfigError
from hexgen2.scheduler.groups import COLOCATED, DECODE, PREFILL
from hexgen2.scheduler.lp_start import place
from hexgen2.scheduler.moves import Mover, blind
from hexgen2.scheduler.problem import Problem
from hexgen2.scheduler.refine import able
from hexgen2.scheduler.state import Group, Judge, State

#: HexGen's population.
POPULATION = 8

Progress = Callable[[int, float], None]


def genetic(
    judge: Judge,
    mover: Mover,
    start: State,
    evaluations: int,
    seed: int,
    roles: tuple[str, ...],
    progress: Progress | None = None,
) -> State:
    """HexGen's search: a population whose members merge, split and swap groups blindly; the best half survives."""
    chance = Random(seed)
    population = [(judge.flow(start), 0, start)]
    done = 0
    while done < evaluations:
        if progress is not None and done % 200 < POPULATION:
            progress(done, population[0][0])
        children = []
        for _ in range(min(POPULATION, evaluations - done)):
            done += 1
            _, _, parent = population[chance.randrange(len(population))]
            child: State | None = parent
            for _ in range(chance.randint(1, 3)):
                child = mover.propose(child, blind(child, roles, chance), chance) if child is not None else None
            if child is not None:
                child = able(judge, child)
                children.append((judge.flow(child), -done, child))
        population = sorted(population + children, key=lambda each: each[:2], reverse=True)[:POPULATION]
    return population[0][2]


def vllm_replicas(problem: Problem) -> State:
    """Colocated replicas, each of equal GPUs in one machine: what is usually started by hand."""
    judge, groups = problem.judge, []
    for number, pool in enumerate(problem.fabric.pools):
        rates = {
            size: judge.rate(Group(COLOCATED, ((number, size),)))
            for size in range(1, min(pool.count, problem.limits.max_gpus) + 1)
        }
        # best[n]: the most that n GPUs of this pool do, and the size of the last replica.
        best = [(0.0, 0)]
        for count in range(1, pool.count + 1):
            options = [
                (best[count - size][0] + rate, size) for size, rate in rates.items() if size <= count and rate > 0
            ]
            best.append(max([(best[count - 1][0], 0), *options]))
        count = pool.count
        while count > 0:
            size = best[count][1]
            if size:
                groups.append(Group(COLOCATED, ((number, size),)))
            count -= size or 1
    return State.of(problem.fabric, groups)


def distserve(problem: Problem) -> State:
    """One configuration for all prefill and one for all decode replicas, the best of all pairs, and their numbers.

    Raises:
        ConfigError: the cluster has more than one kind of GPU.
    """
    fabric, judge = problem.fabric, problem.judge
    if len(fabric.kinds) > 1:
        kinds = ", ".join(kind.gpu for kind in fabric.kinds)
        raise ConfigError(f"strategy distserve: plans for one kind of GPU; cluster {problem.cluster.name} has {kinds}")
    best: tuple[float, State] | None = None
    for (site, total), (a, b) in product(
        sorted({(site, sum(n for (s, _), n in problem.supply.items() if s == site)) for site, _ in problem.supply}),
        product(range(1, problem.limits.max_gpus + 1), repeat=2),
    ):
        rates = problem.strategies.of(((0, a),)).rates[0], problem.strategies.of(((0, b),)).rates[1]
        if min(rates) <= 0:
            continue
        splits = [(x, (total - x * a) // b) for x in range(1, total // a + 1) if total - x * a >= b]
        if not splits:
            continue
        x, y = max(splits, key=lambda split: (min(split[0] * rates[0], split[1] * rates[1]), split))
        if best is not None and min(x * rates[0], y * rates[1]) <= best[0]:
            continue
        state = _place_all(problem, site, [(PREFILL, a)] * x + [(DECODE, b)] * y)
        flow = judge.flow(state)
        if best is None or flow > best[0]:
            best = flow, state
    if best is None:
        raise ConfigError(f"strategy distserve: cluster {problem.cluster.name} cannot hold two replicas")
    return best[1]


def _place_all(problem: Problem, site: str, wanted: list[tuple[str, int]]) -> State:
    free = [pool.count for pool in problem.fabric.pools]
    groups = []
    for role, size in sorted(wanted, key=lambda each: (-each[1], each[0])):
        parts = place(problem.fabric, free, site, ((0, size),), 1)
        if parts is not None:
            groups.append(Group(role, parts))
            for pool, count in parts:
                free[pool] -= count
    return able(problem.judge, State.of(problem.fabric, groups))
