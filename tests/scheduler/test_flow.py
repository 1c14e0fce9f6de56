"""Any maximum flow: capacities, conservation, flow = cut, and the same value as networkx finds."""

import random

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from networkx.algorithms.flow import preflow_push

from hexgen2.scheduler.flow import Flow, Network, as_graph, cheapest_max_flow, max_flow
from hexgen2.scheduler.lp_start import lp_start
from hexgen2.scheduler.moves import Mover
from hexgen2.scheduler.problem import SPLIT
from hexgen2.scheduler.refine import refine
from tests.scheduler.problems import machines, problem


@st.composite
def networks(draw: st.DrawFn) -> Network:
    nodes = draw(st.integers(2, 9))
    ends = st.tuples(st.integers(0, nodes - 1), st.integers(0, nodes - 1)).filter(lambda ends: ends[0] != ends[1])
    arcs = draw(st.lists(st.tuples(ends, st.integers(0, 40), st.integers(0, 9)), min_size=1, max_size=25))
    return network_of(nodes, [(tail, head, capacity, cost) for (tail, head), capacity, cost in arcs])


def network_of(nodes: int, arcs: list[tuple[int, int, int, int]]) -> Network:
    tails, heads, capacities, costs = (tuple(column) for column in zip(*arcs, strict=True))
    return Network(nodes, 0, nodes - 1, tails, heads, capacities, costs)


def check(network: Network, flow: Flow) -> None:
    net = [0] * network.num_nodes
    cut = 0
    for tail, head, capacity, units in zip(network.tails, network.heads, network.capacities, flow.arcs, strict=True):
        assert 0 <= units <= capacity
        net[tail] -= units
        net[head] += units
        if tail in flow.source_side and head not in flow.source_side:
            cut += capacity
    assert net[network.sink] == flow.value == -net[network.source]
    assert all(net[node] == 0 for node in range(network.num_nodes) if node not in (network.source, network.sink))
    assert network.sink not in flow.source_side
    assert cut == flow.value


@given(networks())
@settings(deadline=None)
def test_a_flow_keeps_capacities_conserves_and_equals_its_cut(network: Network) -> None:
    check(network, max_flow(network))
    check(network, cheapest_max_flow(network))


@given(networks())
@settings(deadline=None, max_examples=50)
def test_the_cheapest_flow_costs_what_networkx_finds(network: Network) -> None:
    graph = nx.MultiDiGraph()
    graph.add_nodes_from(range(network.num_nodes))
    for tail, head, capacity, cost in zip(network.tails, network.heads, network.capacities, network.costs, strict=True):
        graph.add_edge(tail, head, capacity=capacity, weight=cost)
    flow = cheapest_max_flow(network)
    graph.nodes[network.source]["demand"] = -flow.value
    graph.nodes[network.sink]["demand"] = flow.value
    cost, _ = nx.network_simplex(graph)
    assert sum(units * cost for units, cost in zip(flow.arcs, network.costs, strict=True)) == cost


@pytest.mark.parametrize("seed", range(200))
def test_or_tools_and_networkx_agree(seed: int) -> None:
    chance = random.Random(seed)
    nodes = chance.randint(4, 30)
    arcs = [
        (tail, head, chance.randint(0, 10**9), 0)
        for tail in range(nodes)
        for head in range(nodes)
        if tail != head and chance.random() < 0.3
    ] or [(0, nodes - 1, 5, 0)]
    network = network_of(nodes, arcs)
    value, _ = nx.maximum_flow(as_graph(network), network.source, network.sink, flow_func=preflow_push)
    assert max_flow(network).value == value


@given(machines, st.sampled_from(["hpld", "lphd"]), st.integers(0, 5))
@settings(deadline=None, max_examples=25)
def test_networkx_finds_our_networks_flow(given: list[tuple[str, int, float]], workload: str, seed: int) -> None:
    case = problem(given, "opt-30b", workload)
    start = lp_start(case.judge, case.limits, case.columns(SPLIT), case.lp(SPLIT))
    state = refine(case.judge, Mover(case.fabric, case.limits, SPLIT), start, 30, seed, SPLIT).state
    replicas = case.judge.replicas(state)
    if not replicas:
        return
    network, unit = case.judge.network.network(replicas)
    value, _ = nx.maximum_flow(as_graph(network), network.source, network.sink, flow_func=preflow_push)
    assert max_flow(network).value == value
    # Never more than replicas serve.
    assert value * unit <= case.judge.ceiling(state)
    check(network, max_flow(network))
