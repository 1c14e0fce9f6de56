"""Maximum flow in an integer network, its minimum cut, and the cheapest of all maximum flows.

The paper's section 3.3 solves its flow by preflow-push. OR-tools' push-relabel does it in the search's loop; `as_graph`
gives the same network to networkx, which is the oracle in the tests. Capacities are integers: with floats
push-relabel implementations disagree on whether a residual of 1e-16 is one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import networkx as nx
import numpy as np
from ortools.graph.python import max_flow as or_max_flow
from ortools.graph.python import min_cost_flow as or_min_cost_flow


@dataclass(frozen=True, slots=True)
class Network:
    """Arcs by position: ``tails[i] -> heads[i]`` carries 0 to ``capacities[i]`` units, each at ``costs[i]``."""

    num_nodes: int
    source: int
    sink: int
    tails: tuple[int, ...]
    heads: tuple[int, ...]
    capacities: tuple[int, ...]
    costs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Flow:
    """``arcs[i]`` units on arc i, ``value`` in all, and the nodes that the residual network reaches from the source.

    Arcs that leave ``source_side`` are a minimum cut: full, and together the reason why no more can flow.
    """

    value: int
    arcs: tuple[int, ...]
    source_side: frozenset[int]


def max_flow(network: Network) -> Flow:
    """A maximum flow by push-relabel, O(V^2 sqrt(E)); which of several is not defined, see `cheapest_max_flow`.

    >>> max_flow(Network(3, 0, 2, (0, 1), (1, 2), (5, 3), (0, 0))).value
    3
    """
    solver = or_max_flow.SimpleMaxFlow()
    ids = solver.add_arcs_with_capacity(
        np.asarray(network.tails, dtype=np.int32),
        np.asarray(network.heads, dtype=np.int32),
        np.asarray(network.capacities, dtype=np.int64),
    )
    status = solver.solve(network.source, network.sink)
    if status != solver.OPTIMAL:
        raise ValueError(f"no maximum flow: OR-tools says {status}")
    flows = tuple(int(units) for units in solver.flows(ids))
    return Flow(int(solver.optimal_flow()), flows, _reached(network, flows))


def cheapest_max_flow(network: Network) -> Flow:
    """Of all maximum flows the one whose sum of units x cost is least: routes do not depend on a solver's whim."""
    value = max_flow(network).value
    solver = or_min_cost_flow.SimpleMinCostFlow()
    ids = solver.add_arcs_with_capacity_and_unit_cost(
        np.asarray(network.tails, dtype=np.int32),
        np.asarray(network.heads, dtype=np.int32),
        np.asarray(network.capacities, dtype=np.int64),
        np.asarray(network.costs, dtype=np.int64),
    )
    solver.set_nodes_supplies(np.asarray([network.source, network.sink]), np.asarray([value, -value]))
    status = solver.solve()
    if status != solver.OPTIMAL:
        raise ValueError(f"no cheapest maximum flow: OR-tools says {status}")
    flows = tuple(int(units) for units in solver.flows(ids))
    return Flow(value, flows, _reached(network, flows))


def as_graph(network: Network) -> nx.DiGraph:
    """The same network for networkx; parallel arcs are joined."""
    graph = nx.DiGraph()
    graph.add_nodes_from(range(network.num_nodes))
    for tail, head, capacity in zip(network.tails, network.heads, network.capacities, strict=True):
        if graph.has_edge(tail, head):
            graph[tail][head]["capacity"] += capacity
        else:
            graph.add_edge(tail, head, capacity=capacity)
    return graph


def _reached(network: Network, flows: Sequence[int]) -> frozenset[int]:
    residual: list[list[int]] = [[] for _ in range(network.num_nodes)]
    for tail, head, capacity, units in zip(network.tails, network.heads, network.capacities, flows, strict=True):
        if units < capacity:
            residual[tail].append(head)
        if units > 0:
            residual[head].append(tail)
    seen, todo = {network.source}, [network.source]
    while todo:
        for node in residual[todo.pop()]:
            if node not in seen:
                seen.add(node)
                todo.append(node)
    return frozenset(seen)
