"""The paper's first phase on graphs that can be checked in the head."""

import itertools
import random

import networkx as nx
import numpy as np
import pytest

from hexgen2.scheduler.groups import PREFILL
from hexgen2.scheduler.partition import ROLE_SLACK, fiedler_vector, kernighan_lin, spectral_groups, split_roles


def islands(count: int, size: int, strong: float = 100.0, weak: float = 1.0) -> nx.Graph:
    graph = nx.complete_graph(count * size)
    for a, b in graph.edges:
        graph[a][b]["bandwidth"] = strong if a // size == b // size else weak
    for node in graph:
        graph.nodes[node]["memory"] = 80.0
    return graph


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_islands_of_fast_links_become_groups(count: int) -> None:
    graph = islands(count, 4)
    found = kernighan_lin(graph, spectral_groups(graph, count), 4 * 80.0)
    assert sorted(map(sorted, found)) == [list(range(4 * i, 4 * i + 4)) for i in range(count)]


def test_memory_is_shared_equally_not_the_number_of_gpus() -> None:
    graph = islands(1, 6)
    for node in (0, 1):
        graph.nodes[node]["memory"] = 160.0
    groups = spectral_groups(graph, 2)
    held = sorted(sum(graph.nodes[node]["memory"] for node in group) for group in groups)
    assert held == [320.0, 320.0]


def test_swaps_mend_a_bad_start_and_keep_the_memory_each_group_needs() -> None:
    graph = islands(2, 4)
    found = kernighan_lin(graph, [frozenset({0, 1, 4, 5}), frozenset({2, 3, 6, 7})], 4 * 80.0)
    assert sorted(map(sorted, found)) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_equal_links_have_a_definite_order() -> None:
    graph = islands(1, 8)
    order = np.argsort(fiedler_vector(nx.to_numpy_array(graph, weight="bandwidth")))
    assert list(order) in (list(range(8)), list(range(7, -1, -1)))
    halves = [sorted(group) for group in spectral_groups(graph, 2)]
    assert sorted(halves) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_who_is_better_at_prefill_does_prefill() -> None:
    coarse = nx.complete_graph(4)
    nx.set_edge_attributes(coarse, 1e12, "bandwidth")
    roles = split_roles(coarse, {0: (9.0, 2.0), 1: (3.0, 3.0), 2: (2.0, 4.0), 3: (2.0, 3.0)}, 1.0)
    assert [node for node, role in roles.items() if role == PREFILL] == [0]


def test_second_partition_wants_bandwidth_between_the_roles() -> None:
    # Equal groups on two machines: either way two do prefill, and fast links lie inside a machine.
    coarse = nx.complete_graph(4)
    for a, b in coarse.edges:
        coarse[a][b]["bandwidth"] = 100.0 if a // 2 == b // 2 else 1.0
    roles = split_roles(coarse, dict.fromkeys(range(4), (1.0, 1.0)), 50.0)
    assert roles[0] != roles[1]
    assert roles[2] != roles[3]


@pytest.mark.parametrize("seed", range(20))
def test_exchange_of_roles_ends_where_no_flip_or_swap_helps(seed: int) -> None:
    chance = random.Random(seed)
    coarse = nx.complete_graph(6)
    for a, b in coarse.edges:
        coarse[a][b]["bandwidth"] = chance.uniform(1, 100)
    rates = {node: (chance.uniform(1, 5), chance.uniform(1, 5)) for node in coarse}
    roles = split_roles(coarse, rates, 20.0)
    prefill = frozenset(node for node, role in roles.items() if role == PREFILL)

    def least(chosen: frozenset[int]) -> float:
        return min(sum(rates[n][0] for n in chosen), sum(rates[n][1] for n in coarse if n not in chosen))

    def across(chosen: frozenset[int]) -> float:
        return sum(
            min(float(coarse[a][b]["bandwidth"]), 20.0 * min(rates[a][0], rates[b][1]))
            for a, b in itertools.product(chosen, set(coarse) - chosen)
        )

    start = sorted(coarse, key=lambda node: -rates[node][0] / rates[node][1])
    best = max(least(frozenset(start[:n])) for n in range(1, 6))
    assert least(prefill) >= best * (1 - ROLE_SLACK) - 1e-9
    for a, b in itertools.product(prefill, set(coarse) - prefill):
        for changed in ({a}, {b}, {a, b}):
            other = prefill ^ changed
            if other and len(other) < 6 and least(other) >= best * (1 - ROLE_SLACK):
                assert across(other) <= across(prefill) * (1 + 1e-6)
