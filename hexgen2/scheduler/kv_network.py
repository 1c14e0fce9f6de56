"""Requests on their way from prefill to decode replicas: how many per second the replicas and the links carry.

The paper's fourth step. source -> prefill -> network card out -> site -> site -> network card in -> decode -> sink is
an integer network that push-relabel solves. It is exact while each replica stands on one machine. A replica
over several machines sends its layers through several cards at once, which no flow can say: `verify` adds up every
card's bytes in a linear program instead, and its answer is the one that plans publish.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import frexp

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import csr_matrix, vstack

from hexgen2.kv.codecs import NONE
from hexgen2.scheduler.cost import CostModel
from hexgen2.scheduler.fabric import Fabric
from hexgen2.scheduler.flow import Network, cheapest_max_flow, max_flow
from hexgen2.scheduler.groups import COLOCATED, DECODE, PREFILL, Choice
from hexgen2.scheduler.kv_codecs import PLAIN, WireCodec, wire_codecs

#: Rates become integers in steps of the largest one over 2^30.
UNITS = 30

#: Up to so many replicas, of which one spans machines, the search itself asks the linear program.
FEW = 8

#: A card: ("out" or "in", machine); a link between sites: ("site", from, to); between machines: ("link", from, to).
Wire = tuple[str, int | str] | tuple[str, int | str, int | str]


@dataclass(frozen=True, slots=True)
class Replica:
    """A node of the network. ``spans``: (machine, first layer, layer behind the last); ``gpus``: how many by machine.

    ``hops``: bytes of hidden states per request on each card, for a pipeline that crosses machines.
    """

    role: str
    rps: float
    spans: tuple[tuple[int, int, int], ...]
    gpus: tuple[tuple[int, int], ...]
    hops: tuple[tuple[Wire, float], ...]
    #: Seconds that writing, or reading, a mean prompt's KV in a codec takes of the replica's busiest stage.
    codec_s: float = 0.0

    @property
    def machine(self) -> int | None:
        """The one it stands on, if it is one."""
        return self.gpus[0][0] if len(self.gpus) == 1 else None


@dataclass(frozen=True, slots=True)
class Routed:
    """``rps`` in all; ``routes``: (prefill, decode, requests per second), replicas by position."""

    rps: float
    routes: tuple[tuple[int, int, float], ...]
    #: Of each card or link that carries anything: bytes per second and its bandwidth.
    wires: tuple[tuple[Wire, float, float], ...]
    #: What each route's KV travels in.
    codecs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class KvPath:
    """Shares of a prompt's KV by wire, what the links inside machines allow (bytes/s), and the way's latency."""

    shares: tuple[tuple[Wire, float], ...]
    inner_bytes_per_s: float
    latency_s: float


class KvNetwork:
    """Builds networks for one cluster, model and workload. ``codecs``: names of those that routes may use."""

    def __init__(self, fabric: Fabric, cost: CostModel, codecs: Sequence[str] = (NONE,)) -> None:
        self._fabric = fabric
        self._cost = cost
        self._kv_bytes = float(cost.kv_bytes_per_request)
        self._codecs = wire_codecs(cost.llm, codecs)
        self._smallest = min(codec.ratio for codec in self._codecs)
        self._num_layers = cost.llm.num_layers
        cluster = fabric.cluster
        numbers = {machine.name: i for i, machine in enumerate(cluster.machines)}
        self._limits: dict[Wire, float] = {}
        for number, bandwidth in enumerate(fabric.nic):
            self._limits["out", number] = self._limits["in", number] = bandwidth
        for link in cluster.site_links:
            for a, b in (link.between, link.between[::-1]):
                self._limits["site", a, b] = link.bandwidth_bytes_per_s
        self._pairs: set[tuple[int, int]] = set()
        for link in cluster.machine_links:
            one, other = (numbers[name] for name in link.between)
            self._pairs |= {(one, other), (other, one)}
            self._limits["link", one, other] = self._limits["link", other, one] = link.bandwidth_bytes_per_s

    def kv_rps(self, bytes_per_s: float) -> float:
        """Requests per second whose KV this bandwidth between machines carries, in the smallest codec allowed."""
        return bytes_per_s / (self._kv_bytes * self._smallest)

    def replica(self, role: str, choice: Choice) -> Replica:
        """The node that a group with its strategy becomes."""
        fabric, work = self._fabric, self._cost.workload
        spans: list[tuple[int, int, int]] = []
        gpus: dict[int, int] = defaultdict(int)
        for stage in choice.stages:
            machine, end = fabric.pools[stage.pool].machine, stage.first_layer + stage.num_layers
            gpus[machine] += stage.tensor_parallel_size
            if spans and spans[-1][0] == machine:
                spans[-1] = (machine, spans[-1][1], end)
            else:
                spans.append((machine, stage.first_layer, end))
        tokens = {PREFILL: work.mean_prompt_tokens, DECODE: work.mean_decode_tokens}.get(
            role, work.mean_prompt_tokens + work.mean_decode_tokens
        )
        hops: dict[Wire, float] = defaultdict(float)
        for (a, *_), (b, *_) in pairwise(spans):
            for wire in self._wires(a, b):
                hops[wire] += tokens * self._cost.llm.hidden_size * 2.0
        kinds = fabric.kinds
        codec_s = max(
            self._cost.codec_s(kinds[fabric.pools[each.pool].kind].gpu, each.tensor_parallel_size, each.num_layers)
            for each in choice.stages
        )
        return Replica(
            role, choice.rps, tuple(spans), tuple(sorted(gpus.items())), tuple(sorted(hops.items(), key=str)), codec_s
        )

    def may_bind(self, replicas: Sequence[Replica]) -> bool:
        """Whether any card or link could be full. False proves that the flow is the smaller sum of rates."""
        totals: dict[Wire, float] = defaultdict(float)
        senders: dict[int, float] = defaultdict(float)
        receivers: dict[int, float] = defaultdict(float)
        for replica in replicas:
            for wire, per_request in replica.hops:
                totals[wire] += per_request * replica.rps
            if replica.role == COLOCATED:
                continue
            way, side = ("out", senders) if replica.role == PREFILL else ("in", receivers)
            for machine, first, end in replica.spans:
                load = replica.rps * self._kv_bytes * (end - first) / self._num_layers
                totals[way, machine] += load
                side[machine] += load
        if any(load > self._limits[wire] for wire, load in totals.items()):
            return True
        # Within a machine: what comes from, and what goes to, its GPUs is at most what its smaller side holds.
        for machine in senders.keys() & receivers.keys():
            inner = self._fabric.cluster.machines[machine].intra_bandwidth_bytes_per_s
            if min(senders[machine], receivers[machine]) > inner:
                return True
        sites = self._fabric.site
        for wire, limit in self._limits.items():
            if wire[0] in ("out", "in"):
                continue
            a, b = wire[1], wire[2]  # type: ignore[misc]
            if wire[0] == "link":
                sent, received = senders.get(int(a), 0.0), receivers.get(int(b), 0.0)
            else:
                sent = sum(load for machine, load in senders.items() if sites[machine] == a)
                received = sum(load for machine, load in receivers.items() if sites[machine] == b)
            if min(sent, received) + totals.get(wire, 0.0) > limit:
                return True
        return False

    def flow(self, replicas: Sequence[Replica]) -> float:
        """Requests per second, for the search's loop."""
        if len(replicas) <= FEW and (self._pairs or any(replica.machine is None for replica in replicas)):
            return self.verify(replicas, routed=False).rps
        network, unit = self.network(replicas)
        return max_flow(network).value * unit

    def cut(self, replicas: Sequence[Replica]) -> tuple[frozenset[int], frozenset[int]]:
        """Replicas whose rate, and machines whose card, is in a minimum cut: more of these is what the flow lacks."""
        network, _ = self.network(replicas)
        side = max_flow(network).source_side
        count = len(replicas)
        needy = frozenset(
            i
            for i, replica in enumerate(replicas)
            if (replica.role == PREFILL and i not in side) or (replica.role == DECODE and i in side)
        )
        # A card out is cut on its arc to the site, a card in on its arc from the site.
        machines = set()
        last = count + 2 * len(self._fabric.nic)
        for tail, head in zip(network.tails, network.heads, strict=True):
            if tail in side and head not in side:
                if count <= tail < last and head >= last:
                    machines.add((tail - count) // 2)
                elif count <= head < last and tail >= last:
                    machines.add((head - count) // 2)
        return needy, frozenset(machines)

    def network(self, replicas: Sequence[Replica]) -> tuple[Network, float]:
        """The integer network, and the requests per second that one unit stands for.

        Nodes: the replicas, then (out, in) of each machine, then (out, in) of each site, then source and sink. A
        replica over several machines takes the card of the machine with most of its layers. Between machines KV has
        the size of the smallest codec that is allowed.
        """
        fabric = self._fabric
        count, machines, sites = len(replicas), len(fabric.nic), fabric.sites
        out_of = {site: count + 2 * machines + i for i, site in enumerate(sites)}
        source = count + 2 * machines + len(sites)
        sink = source + 1
        largest = max((replica.rps for replica in replicas), default=1.0)
        unit = 2.0 ** (frexp(largest)[1] - UNITS)
        plenty = (1 << UNITS) * max(1, count)
        arcs: list[tuple[int, int, int]] = []

        def units(bytes_per_s: float) -> int:
            return min(plenty, int(bytes_per_s / self._kv_bytes / unit))

        by_machine: dict[int, list[int]] = defaultdict(list)
        for i, replica in enumerate(replicas):
            rate = int(replica.rps / unit)
            if replica.role == COLOCATED:
                arcs += [(source, i, rate), (i, sink, rate)]
                continue
            main = max(replica.spans, key=lambda span: (span[2] - span[1], -span[0]))[0]
            if replica.machine is not None:
                by_machine[main].append(i)
            if replica.role == PREFILL:
                arcs += [(source, i, rate), (i, count + 2 * main, plenty)]
            else:
                arcs += [(i, sink, rate), (count + 2 * main + 1, i, plenty)]
        for machine, there in by_machine.items():
            inner = fabric.cluster.machines[machine].intra_bandwidth_bytes_per_s
            for i in there:
                for j in there:
                    if replicas[i].role == PREFILL and replicas[j].role == DECODE:
                        lanes = min(replicas[i].gpus[0][1], replicas[j].gpus[0][1])
                        arcs.append((i, j, units(inner * lanes)))
        for machine, bandwidth in enumerate(fabric.nic):
            core = out_of[fabric.site[machine]]
            arcs.append((count + 2 * machine, core, units(bandwidth / self._smallest)))
            arcs.append((core, count + 2 * machine + 1, units(bandwidth / self._smallest)))
        for a in sites:
            for b in sites:
                if a != b:
                    limit = self._limits.get(("site", a, b))
                    arcs.append((out_of[a], out_of[b], plenty if limit is None else units(limit / self._smallest)))
        tails, heads, capacities = (tuple(column) for column in zip(*arcs, strict=True))
        return Network(sink + 1, source, sink, tails, heads, capacities, (0,) * len(arcs)), unit

    def verify(self, replicas: Sequence[Replica], *, routed: bool = True) -> Routed:
        """The largest flow with every card's and link's bytes added up, and of its routings one with the least KV time.

        maximise sum f_ij; sum_j f_ij <= rate_i; sum_i f_ij <= rate_j; per wire sum f_ij bytes_ij <= bandwidth, where
        the bytes of a pair are its layer-matched KV and the pipelines' hidden states. Where codecs are allowed there is
        an f for each of them, and of all largest flows one with the least error is taken.
        """
        prefill = [i for i, replica in enumerate(replicas) if replica.role == PREFILL]
        decode = [i for i, replica in enumerate(replicas) if replica.role == DECODE]
        pairs = [
            (i, j, codec)
            for i in prefill
            for j in decode
            for codec in (self._codecs if self._apart(replicas[i], replicas[j]) else (PLAIN,))
        ] + [(i, i, PLAIN) for i, replica in enumerate(replicas) if replica.role == COLOCATED]
        if not pairs:
            return Routed(0.0, (), ())
        unit = 2.0 ** frexp(max(replica.rps for replica in replicas))[1]
        rows: dict[object, int] = {}
        limits: list[float] = []
        data: list[float] = []
        at: list[tuple[int, int]] = []

        def put(row: object, limit: float, column: int, value: float) -> None:
            if row not in rows:
                rows[row] = len(limits)
                limits.append(limit)
            data.append(value)
            at.append((rows[row], column))

        times, caps = [], []
        for column, (i, j, codec) in enumerate(pairs):
            for end in {i, j}:
                busy = 0.0 if codec == PLAIN else replicas[end].codec_s * replicas[end].rps
                put(end, replicas[end].rps / unit, column, 1.0 + busy)
            loads: dict[Wire, float] = defaultdict(float)
            for end in {i, j}:
                for wire, per_request in replicas[end].hops:
                    loads[wire] += per_request
            seconds, cap = (0.0, np.inf) if i == j else self._moved(replicas[i], replicas[j], loads, codec.ratio)
            times.append(seconds)
            caps.append(cap / unit)
            for wire, per_request in loads.items():
                # In shares of the wire's own bandwidth, so that all rows have coefficients near one.
                put(wire, 1.0, column, per_request * unit / self._limits[wire])
        matrix = csr_matrix((data, tuple(zip(*at, strict=True))), shape=(len(limits), len(pairs)))
        bounds = [(0.0, None if cap == np.inf else cap) for cap in caps]
        first = linprog(-np.ones(len(pairs)), A_ub=matrix, b_ub=limits, bounds=bounds, method="highs-ds")
        if first.status != 0:
            raise ValueError(f"no flow: {first.message}")
        value = -float(first.fun)
        if not routed:
            return Routed(value * unit, (), ())
        scale = max(times) or 1.0
        # Exactness first: a codec is used where the flow needs it, never to be a little quicker.
        worth = np.array([codec.error for *_, codec in pairs]) * 1000
        least = linprog(
            np.array(times) / scale + worth,
            A_ub=vstack([matrix, csr_matrix(-np.ones(len(pairs)))], format="csr"),
            b_ub=[*limits, -value * (1 - 1e-9)],
            bounds=bounds,
            method="highs-ds",
        )
        x = least.x if least.status == 0 else first.x
        # A route has one codec: where its flow is in several, the smallest of them.
        flows: dict[tuple[int, int], float] = defaultdict(float)
        taken: dict[tuple[int, int], WireCodec] = {}
        for (i, j, codec), flow in zip(pairs, x, strict=True):
            flows[i, j] += float(flow) * unit
            if (i, j) not in taken or (flow > 1e-7 and codec.ratio < taken[i, j].ratio):
                taken[i, j] = codec
        return self._routed(replicas, list(flows), list(flows.values()), taken)

    def route(self, replicas: Sequence[Replica]) -> Routed:
        """The flow and its routes: by preflow-push and least cost where no card binds, else as `verify` has it."""
        if self.may_bind(replicas):
            return self.verify(replicas)
        prefill = [i for i, replica in enumerate(replicas) if replica.role == PREFILL]
        decode = [i for i, replica in enumerate(replicas) if replica.role == DECODE]
        alone = [(i, i, r.rps) for i, r in enumerate(replicas) if r.role == COLOCATED]
        if not prefill or not decode:
            return self._routed(replicas, [(i, i) for i, *_ in alone], [rate for *_, rate in alone])
        unit = 2.0 ** (frexp(max(replica.rps for replica in replicas))[1] - UNITS)
        source, sink = len(replicas), len(replicas) + 1
        arcs = [(source, i, int(replicas[i].rps / unit), 0) for i in prefill]
        arcs += [(j, sink, int(replicas[j].rps / unit), 0) for j in decode]
        pairs = [(i, j) for i in prefill for j in decode]
        times = [self._moved(replicas[i], replicas[j], defaultdict(float))[0] for i, j in pairs]
        # Costs in thousandths of the slowest pair: differences below that are no reason to prefer a route.
        scale = max(times) or 1.0
        arcs += [(i, j, 1 << UNITS, round(t / scale * 1000)) for (i, j), t in zip(pairs, times, strict=True)]
        tails, heads, capacities, costs = (tuple(column) for column in zip(*arcs, strict=True))
        found = cheapest_max_flow(Network(sink + 1, source, sink, tails, heads, capacities, costs))
        flows = [units * unit for units in found.arcs[len(prefill) + len(decode) :]]
        return self._routed(replicas, [*pairs, *((i, i) for i, *_ in alone)], [*flows, *(rate for *_, rate in alone)])

    def transfer_s(self, sender: Replica, receiver: Replica, codec: str = NONE) -> float:
        """Seconds that one mean prompt's KV takes between two replicas when nobody else uses the links."""
        used = next(each for each in self._codecs if each.name == codec)
        return self._moved(sender, receiver, defaultdict(float), used.ratio)[0]

    def _apart(self, sender: Replica, receiver: Replica) -> bool:
        """Whether any KV goes from one machine to another."""
        return any(
            a != b and min(end, other_end) > max(first, other_first)
            for a, first, end in sender.spans
            for b, other_first, other_end in receiver.spans
        )

    @property
    def bandwidths(self) -> Mapping[Wire, float]:
        """Of cards and links, bytes per second."""
        return self._limits

    def path(self, sender: Replica, receiver: Replica) -> KvPath:
        """What a mean prompt's KV passes from one replica to another."""
        loads: dict[Wire, float] = defaultdict(float)
        _, inner_rps = self._moved(sender, receiver, loads)
        pairs = [(a, b) for a, *_ in sender.spans for b, *_ in receiver.spans if a != b]
        latency = max((self._fabric.latency[a][b] for a, b in pairs), default=0.0)
        shares = tuple((wire, loads[wire] / self._kv_bytes) for wire in sorted(loads, key=str))
        return KvPath(shares, inner_rps * self._kv_bytes, latency)

    def _routed(
        self,
        replicas: Sequence[Replica],
        pairs: Sequence[tuple[int, int]],
        flows: Sequence[float],
        taken: Mapping[tuple[int, int], WireCodec] | None = None,
    ) -> Routed:
        codecs = taken or {}
        largest = max(flows, default=0.0)
        kept = [(i, j, flow) for (i, j), flow in zip(pairs, flows, strict=True) if flow > 1e-7 * largest]
        used: dict[Wire, float] = defaultdict(float)
        for i, j, flow in kept:
            loads: dict[Wire, float] = defaultdict(float)
            if i != j:
                self._moved(replicas[i], replicas[j], loads, codecs.get((i, j), PLAIN).ratio)
            for end in {i, j}:
                for wire, per_request in replicas[end].hops:
                    loads[wire] += per_request
            for wire, per_request in loads.items():
                used[wire] += flow * per_request
        wires = tuple((wire, used[wire], self._limits[wire]) for wire in sorted(used, key=str))
        names = tuple(codecs.get((i, j), PLAIN).name for i, j, _ in kept)
        return Routed(sum(flow for *_, flow in kept), tuple(kept), wires, names)

    def _moved(
        self, sender: Replica, receiver: Replica, loads: dict[Wire, float], ratio: float = 1.0
    ) -> tuple[float, float]:
        """Adds a request's KV to ``loads``; returns the busiest link's seconds and the rate that inner links allow.

        ``ratio``: of a codec, for what goes from one machine to another.
        """
        fabric, per_layer = self._fabric, self._kv_bytes / self._num_layers
        seconds, inner_rps = 0.0, np.inf
        between: dict[tuple[int, int], float] = defaultdict(float)
        for a, first, end in sender.spans:
            for b, other_first, other_end in receiver.spans:
                if (layers := min(end, other_end) - max(first, other_first)) > 0:
                    between[a, b] += layers * per_layer
        sent: dict[Wire, float] = defaultdict(float)
        for (a, b), size in between.items():
            if a == b:
                lanes = min(dict(sender.gpus)[a], dict(receiver.gpus)[b])
                bandwidth = fabric.cluster.machines[a].intra_bandwidth_bytes_per_s * lanes
                seconds = max(seconds, size / bandwidth)
                inner_rps = min(inner_rps, bandwidth / size)
                continue
            size *= ratio
            for wire in self._wires(a, b):
                sent[wire] += size
            seconds = max(seconds, fabric.latency[a][b] + size / fabric.bandwidth[a][b])
        for wire, size in sent.items():
            seconds = max(seconds, size / self._limits[wire])
            loads[wire] += size
        return seconds, float(inner_rps)

    def _wires(self, a: int, b: int) -> Iterator[Wire]:
        """What bytes from one machine to another pass."""
        yield "out", a
        yield "in", b
        if (a, b) in self._pairs:
            yield "link", a, b
        elif (wire := ("site", self._fabric.site[a], self._fabric.site[b])) in self._limits:
            yield wire
