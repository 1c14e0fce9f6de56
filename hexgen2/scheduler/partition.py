"""The paper's first phase, step by step: groups, roles by coarsening and a second partition, projection.

1. `gpu_graph`          nodes are GPUs weighted by memory, edges are links weighted by bandwidth
2. `spectral_groups`    K groups with little bandwidth *between* them and equal memory
3. `kernighan_lin`      swaps that raise the bandwidth inside groups while each still holds the model
4. `coarsen`            one node per group, edges are sums of links
5. `split_roles`        a second partition with the opposite sign: *much* bandwidth between prefill and decode
6. `project`            roles back onto groups of GPUs

Both partitions are ours where networkx's will not do: its bisection balances counts of nodes, not memory.
"""

from collections.abc import Mapping, Sequence

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from hexgen2.scheduler.fabric import Fabric, Parts
from hexgen2.scheduler.groups import DECODE, PREFILL, Groups
from hexgen2.scheduler.state import Group, State, parts_of

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int_]

#: A group should hold the model and the KV of so many requests: the paper's K leaves that open.
REQUESTS_PER_GROUP = 8
#: Roles may be exchanged for bandwidth as long as the smaller sum of rates falls less than so.
ROLE_SLACK = 0.02
#: Passes over all pairs end when nothing improves, or after so many swaps per GPU.
SWAPS_PER_GPU = 2


def number_of_groups(groups: Groups) -> int:
    """K: how often the cluster's memory holds the weights and the KV of a few requests; at least one."""
    cost, fabric = groups.cost, groups.fabric
    memory = sum(cost.usable_bytes(fabric.kinds[pool.kind].gpu) * pool.count for pool in fabric.pools)
    return max(1, int(memory / group_bytes(groups)))


def group_bytes(groups: Groups) -> float:
    """Memory that one replica needs."""
    cost = groups.cost
    tokens = REQUESTS_PER_GROUP * cost.workload.mean_context_tokens
    return float(cost.llm.weight_bytes + tokens * cost.kv_bytes_per_token)


def first_phase(groups: Groups, num_groups: int) -> State:
    """Groups with roles: the paper's start, from which refinement goes on. Groups that cannot serve are left out."""
    fabric = groups.fabric
    graph = gpu_graph(groups)
    parts = [
        _parts(graph, each) for each in kernighan_lin(graph, spectral_groups(graph, num_groups), group_bytes(groups))
    ]
    able = [each for each in parts if groups.rate(PREFILL, each) > 0 or groups.rate(DECODE, each) > 0]
    coarse = coarsen(fabric, able)
    rates = {i: (groups.rate(PREFILL, each), groups.rate(DECODE, each)) for i, each in enumerate(able)}
    return project(fabric, able, split_roles(coarse, rates, groups.cost.kv_bytes_per_request))


def gpu_graph(groups: Groups) -> nx.Graph:
    """Nodes 0.. with ``memory`` and ``pool``, edges with ``bandwidth``, in pool order."""
    fabric = groups.fabric
    pools = [number for number, pool in enumerate(fabric.pools) for _ in range(pool.count)]
    graph = nx.Graph()
    for node, pool in enumerate(pools):
        gpu = fabric.kinds[fabric.pools[pool].kind].gpu
        graph.add_node(node, memory=groups.cost.usable_bytes(gpu), pool=pool)
    for one in range(len(pools)):
        a = fabric.pools[pools[one]].machine
        for other in range(one):
            b = fabric.pools[pools[other]].machine
            if bandwidth := fabric.bandwidth[a][b]:
                graph.add_edge(other, one, bandwidth=bandwidth)
    return graph


def spectral_groups(graph: nx.Graph, num_groups: int) -> tuple[frozenset[int], ...]:
    """K groups by recursive spectral bisection: sort by the Fiedler vector, cut where memory is shared as K is."""
    nodes = sorted(graph)
    weights = nx.to_numpy_array(graph, nodelist=nodes, weight="bandwidth")
    memory = np.array([graph.nodes[node]["memory"] for node in nodes])

    def bisect(members: Ints, count: int) -> list[frozenset[int]]:
        if count <= 1 or len(members) <= 1:
            return [frozenset(nodes[member] for member in members)]
        left = count // 2
        order = members[np.argsort(fiedler_vector(weights[np.ix_(members, members)]), kind="stable")]
        held = np.cumsum(memory[order])
        cut = int(np.argmin(np.abs(held - held[-1] * left / count))) + 1
        cut = min(max(cut, 1), len(order) - 1)
        return bisect(np.sort(order[:cut]), left) + bisect(np.sort(order[cut:]), count - left)

    return tuple(bisect(np.arange(len(nodes)), num_groups))


def fiedler_vector(weights: Floats) -> Floats:
    """Second eigenvector of the Laplacian of symmetric weights, rounded, its sign fixed: ties are ties.

    Where equal links make its eigenspace degenerate, eigenvectors are arbitrary; the nodes' own order, added as a
    ramp of a millionth, decides.
    """
    weights = weights / (weights.max() or 1.0)
    laplacian = np.diag(weights.sum(axis=1)) - weights
    # A preference for the order of nodes: a weak path through them separates what bandwidth does not.
    path = np.arange(len(weights) - 1)
    for a, b in ((path, path + 1), (path + 1, path)):
        laplacian[a, b] -= 1e-6
        laplacian[a, a] += 1e-6
    _, vectors = np.linalg.eigh(laplacian)
    vector: Floats = np.round(vectors[:, 1], 9)
    return vector if vector[np.argmax(np.abs(vector))] < 0 else -vector


def kernighan_lin(graph: nx.Graph, groups: Sequence[frozenset[int]], memory_bytes: float) -> tuple[frozenset[int], ...]:
    """Swap the pair of GPUs that raises bandwidth inside groups most, again and again, until none does.

    A group that holds ``memory_bytes`` keeps them. O(n^2) per swap, at most `SWAPS_PER_GPU` n swaps.
    """
    nodes = sorted(graph)
    weights = nx.to_numpy_array(graph, nodelist=nodes, weight="bandwidth")
    weights /= weights.max() or 1.0
    memory = np.array([graph.nodes[node]["memory"] for node in nodes])
    group = np.zeros(len(nodes), dtype=int)
    for number, members in enumerate(groups):
        for node in members:
            group[nodes.index(node)] = number
    held = np.array([memory[group == number].sum() for number in range(len(groups))])
    indicator = np.eye(len(groups))[group]
    for _ in range(SWAPS_PER_GPU * len(nodes)):
        to = weights @ indicator  # node -> bandwidth to each group
        own = to[np.arange(len(nodes)), group]
        across = to[:, group]  # [i, j]: bandwidth of i to the group of j
        gain = across - own[:, None] + (across - own[:, None]).T - 2 * weights
        loses = held[group][:, None] - memory[:, None] + memory[None, :]
        floor = np.minimum(held, memory_bytes)[group][:, None]
        fine = (loses >= floor - 1) & (loses >= floor - 1).T & (group[:, None] != group[None, :])
        gain = np.where(fine, gain, -np.inf)
        i, j = divmod(int(np.argmax(gain)), len(nodes))
        if not gain[i, j] > 1e-9:
            break
        held[group[i]] += memory[j] - memory[i]
        held[group[j]] += memory[i] - memory[j]
        group[i], group[j] = group[j], group[i]
        indicator = np.eye(len(groups))[group]
    return tuple(
        frozenset(node for node, number in zip(nodes, group, strict=True) if number == each)
        for each in range(len(groups))
        if (group == each).any()
    )


def coarsen(fabric: Fabric, parts: Sequence[Parts]) -> nx.Graph:
    """One node per group; between two of them the sum of their GPUs' links, no more than network cards carry."""
    graph = nx.Graph()
    graph.add_nodes_from(range(len(parts)))
    for one, members in enumerate(parts):
        for other in range(one):
            total: dict[tuple[int, int], float] = {}
            for pool, count in members:
                for peer, peers in parts[other]:
                    a, b = fabric.pools[pool].machine, fabric.pools[peer].machine
                    lanes = min(count, peers) if a == b else 1
                    total[a, b] = max(total.get((a, b), 0.0), fabric.bandwidth[a][b] * lanes)
            graph.add_edge(other, one, bandwidth=sum(total.values()))
    return graph


def split_roles(
    coarse: nx.Graph, rates: Mapping[int, tuple[float, float]], kv_bytes_per_request: float
) -> dict[int, str]:
    """Prefill or decode for each group: comparative advantage first, then swaps and flips for bandwidth between them.

    Sorted by prefill over decode rate, the prefix with the largest min(sum prefill, sum decode) does prefill. A swap
    or flip is taken when it raises the bandwidth across, of each pair no more than its requests need, and costs less
    than `ROLE_SLACK` of that minimum. ``rates``: (prefill, decode) requests per second by node.
    """
    nodes = sorted(coarse, key=lambda node: (-rates[node][0] / max(rates[node][1], 1e-12), node))
    p, d = (np.array([rates[node][way] for node in nodes]) for way in (0, 1))
    # [i, j]: bandwidth from i to j that requests can use, if i does prefill and j decode.
    links = nx.to_numpy_array(coarse, nodelist=nodes, weight="bandwidth")
    useful = np.minimum(links, np.minimum(p[:, None], d[None, :]) * kv_bytes_per_request)
    least = [min(p[:n].sum(), d[n:].sum()) for n in range(1, len(nodes))] or [0.0]
    first = int(np.argmax(least)) + 1
    prefill = np.arange(len(nodes)) < first
    floor = max(least) * (1 - ROLE_SLACK)
    for _ in nodes:
        step = _best_exchange(useful, p, d, prefill, floor)
        if step is None:
            break
        prefill = prefill ^ step
    return {node: PREFILL if does else DECODE for node, does in zip(nodes, prefill, strict=True)}


def _best_exchange(useful: Floats, p: Floats, d: Floats, prefill: Bools, floor: float) -> Bools | None:
    """The flip or swap (as a mask of changes) that adds most useful bandwidth between the roles; None if none does."""
    ones = np.arange(len(p))
    to_decode, from_prefill = useful @ ~prefill, prefill @ useful
    # Of one node changing its role: what its new role reaches less what its old one did.
    flip = np.where(prefill, from_prefill - to_decode, to_decode - from_prefill)
    sum_p, sum_d = p[prefill].sum(), d[~prefill].sum()
    least_p, least_d = sum_p + np.where(prefill, -p, p), sum_d + np.where(prefill, d, -d)
    alone = np.where(np.minimum(least_p, least_d) >= floor, flip, -np.inf)
    alone[prefill & (prefill.sum() == 1)] = -np.inf
    alone[~prefill & ((~prefill).sum() == 1)] = -np.inf
    # [a, b]: a leaves prefill and b joins it; a to b was counted twice as lost, b to a is new.
    swap = flip[:, None] + flip[None, :] + useful + useful.T
    fits = np.minimum(sum_p - p[:, None] + p[None, :], sum_d + d[:, None] - d[None, :]) >= floor
    swap = np.where(prefill[:, None] & ~prefill[None, :] & fits, swap, -np.inf)
    one, pair = int(np.argmax(alone)), int(np.argmax(swap))
    enough = 1e-9 * float(useful.sum())
    if max(alone[one], swap.flat[pair]) <= enough:
        return None
    a, b = divmod(pair, len(p))
    chosen: Bools = (ones == one) if alone[one] >= swap.flat[pair] else (ones == a) | (ones == b)
    return chosen


def project(fabric: Fabric, parts: Sequence[Parts], roles: Mapping[int, str]) -> State:
    """Roles of super nodes become roles of their groups."""
    return State.of(fabric, [Group(roles[number], each) for number, each in enumerate(parts)])


def _parts(graph: nx.Graph, nodes: frozenset[int]) -> Parts:
    counts: dict[int, int] = {}
    for node in nodes:
        pool = graph.nodes[node]["pool"]
        counts[pool] = counts.get(pool, 0) + 1
    return parts_of(counts)
