"""Parallel strategies of a group: how many GPUs share each stage, and how many layers each stage has.

The paper's third step (section 3.2). Tensor parallelism stays inside one machine and one kind of GPU, pipelines cross
both, and layers are shared out by speed or by memory, so stages are as uneven as their GPUs. A composition's
candidates are found once, over ideal links; a group then takes the best of them over the links that it really has.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from hexgen2.scheduler.cost import CostModel, Stage
from hexgen2.scheduler.fabric import Composition, Fabric
from hexgen2.scheduler.rates import Figures

#: A stage before it stands anywhere: (kind, GPUs, layers).
Shape = tuple[int, int, int]

#: Without a limit of the time to first token, prefill may take so many times the least that its GPUs can do.
LATENCY_SLACK = 2.0


@dataclass(frozen=True, slots=True)
class Candidate:
    """A strategy of a composition with its figures over ideal links."""

    shapes: tuple[Shape, ...]
    prefill_rps: float
    latency_s: float
    decode_rps: float
    tpot_s: float
    batch: int
    colocated_rps: float


@dataclass(frozen=True, slots=True)
class Candidates:
    """Of one composition. Prefill's within the limit of latency, best rate first; decode's and colocated best first."""

    prefill: tuple[Candidate, ...]
    decode: tuple[Candidate, ...]
    colocated: tuple[Candidate, ...]

    @property
    def rates(self) -> tuple[float, float, float]:
        """The best of each role; zero where there is none."""
        return (
            self.prefill[0].prefill_rps if self.prefill else 0.0,
            self.decode[0].decode_rps if self.decode else 0.0,
            self.colocated[0].colocated_rps if self.colocated else 0.0,
        )


class Strategies:
    """Candidates by composition, remembered."""

    def __init__(self, fabric: Fabric, cost: CostModel) -> None:
        self._fabric = fabric
        self._cost = cost
        self._found: dict[Composition, Candidates] = {}
        self._layer_s: dict[tuple[int, int], tuple[float, float]] = {}
        # No link of the cluster is better than this one.
        links = [*(kind.intra_bandwidth_bytes_per_s for kind in fabric.kinds), *(max(row) for row in fabric.bandwidth)]
        delays = [*(kind.intra_latency_s for kind in fabric.kinds), *(min(row) for row in fabric.latency)]
        self._ideal = (max(links), min(delays))

    def of(self, composition: Composition) -> Candidates:
        """The candidates of a composition."""
        found = self._found.get(composition)
        return found if found is not None else self.of_all((composition,))[0]

    def of_all(self, compositions: Sequence[Composition]) -> list[Candidates]:
        """The candidates of many, in their order: their costs are found together."""
        missing = [each for each in dict.fromkeys(compositions) if each not in self._found]
        shapes = [tuple(self._shapes(each)) if self._has_room(each) else () for each in missing]
        stages = [tuple(self.stage(shape, *self._ideal) for shape in row) for rows in shapes for row in rows]
        figures = iter(self._cost.figures(stages))
        for composition, rows in zip(missing, shapes, strict=True):
            self._found[composition] = self._rank([_candidate(row, next(figures)) for row in rows])
        return [self._found[each] for each in compositions]

    def stage(self, shape: Shape, bandwidth_bytes_per_s: float, latency_s: float) -> Stage:
        """A stage with its link to the next."""
        kind = self._fabric.kinds[shape[0]]
        return Stage(
            kind.gpu,
            shape[1],
            shape[2],
            kind.intra_bandwidth_bytes_per_s,
            kind.intra_latency_s,
            bandwidth_bytes_per_s,
            latency_s,
        )

    def _has_room(self, composition: Composition) -> bool:
        room = (self._cost.usable_bytes(self._fabric.kinds[kind].gpu) * count for kind, count in composition)
        return sum(room) >= self._cost.llm.weight_bytes

    def _rank(self, candidates: Sequence[Candidate]) -> Candidates:
        # Prefill and decode need room for a prompt in their pools as well: who has none may still colocate.
        prefill = self._in_time([each for each in candidates if each.prefill_rps > 0])
        decode = [each for each in candidates if each.decode_rps > 0]
        whole = self._in_time([each for each in candidates if each.prefill_rps > 0 or each.colocated_rps > 0])
        colocated = [each for each in whole if each.colocated_rps > 0]
        return Candidates(
            tuple(sorted(prefill, key=lambda each: (-each.prefill_rps, each.latency_s, each.shapes))),
            tuple(sorted(decode, key=lambda each: (-each.decode_rps, each.tpot_s, each.shapes))),
            tuple(sorted(colocated, key=lambda each: (-each.colocated_rps, each.tpot_s, each.shapes))),
        )

    def _in_time(self, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        """Within the limit of the time to first token, or not much slower than the quickest of them."""
        limit = self._cost.workload.ttft_s or LATENCY_SLACK * min((each.latency_s for each in candidates), default=0.0)
        return [each for each in candidates if each.latency_s <= limit]

    def _shapes(self, composition: Composition) -> Iterator[tuple[Shape, ...]]:
        """Every choice of tensor parallelism per kind, each with its layers shared out in up to four ways."""
        num_layers = self._cost.llm.num_layers
        seen = set()
        for choice in product(*(tuple(self._degrees(kind, count)) for kind, count in composition)):
            row = [(kind, size) for (kind, _), sizes in zip(composition, choice, strict=True) for size in sizes]
            if len(row) > num_layers:
                continue
            most = self._most_layers(row)
            speed = [self._speed(kind, size) for kind, size in row]
            by_prefill = [each[0] for each in speed]
            by_decode = [each[1] for each in speed]
            room = [float(self._room(kind, size)) for kind, size in row]
            shares = [by_prefill]
            if len({stage for stage in row}) > 1:
                between = [a / sum(by_decode) + b / sum(room) for a, b in zip(by_decode, room, strict=True)]
                shares += [by_decode, room, between]
            for share in shares:
                layers = apportion(share, most, num_layers)
                if layers is not None:
                    shapes = tuple((kind, size, n) for (kind, size), n in zip(row, layers, strict=True))
                    if shapes not in seen:
                        seen.add(shapes)
                        yield shapes

    def _degrees(self, kind: int, count: int) -> Iterator[tuple[int, ...]]:
        """Sizes of the stages that ``count`` GPUs of a kind make: all alike, or by the binary digits of ``count``."""
        largest = min(count, self._fabric.kinds[kind].max_count)
        size = 1
        while size <= largest:
            if count % size == 0 and self._cost.llm.allows_tensor_parallel_size(size):
                yield (size,) * (count // size)
            size *= 2
        digits = tuple(1 << bit for bit in reversed(range(count.bit_length())) if count >> bit & 1)
        if (
            len(digits) > 1
            and count <= self._fabric.kinds[kind].max_count
            and all(self._cost.llm.allows_tensor_parallel_size(size) for size in digits)
        ):
            yield digits

    def _speed(self, kind: int, size: int) -> tuple[float, float]:
        """Layers per second of a stage in prefill and in decode."""
        found = self._layer_s.get((kind, size))
        if found is None:
            layers = max(1, self._cost.llm.num_layers // 4)
            stages = (self.stage((kind, size, layers), *self._ideal),)
            work = self._cost.workload
            found = self._layer_s[kind, size] = (
                layers / self._cost.prefill_s(stages, work.mean_prompt_tokens),
                layers / self._cost.decode_step_s(stages, 32, work.mean_context_tokens),
            )
        return found

    def _room(self, kind: int, size: int) -> float:
        return size * self._cost.usable_bytes(self._fabric.kinds[kind].gpu)

    def _most_layers(self, row: Sequence[tuple[int, int]]) -> list[int]:
        """Layers whose weights, and KV of one request of mean length, fit each stage."""
        llm, work = self._cost.llm, self._cost.workload
        tokens = work.mean_prompt_tokens + work.mean_output_tokens
        most = []
        for number, (kind, size) in enumerate(row):
            ends = (number == 0) + (number == len(row) - 1)
            copies = size / min(size, llm.num_kv_heads)
            layer = llm.layer_bytes + tokens * llm.kv_bytes_per_token_layer * copies
            most.append(int((self._room(kind, size) - ends * llm.embedding_bytes) / layer))
        return most


def _candidate(shapes: tuple[Shape, ...], figures: Figures) -> Candidate:
    return Candidate(
        shapes,
        figures.prefill_rps,
        figures.latency_s,
        figures.decode.rate,
        figures.decode.tpot_s,
        figures.decode.batch,
        figures.colocated.rate,
    )


def apportion(shares: Sequence[float], most: Sequence[int], total: int) -> tuple[int, ...] | None:
    """``total`` layers by ``shares``, each at least one and at most ``most``; None when they do not fit.

    One layer after the other to where it makes the least of the longest stage.

    >>> apportion([2.0, 1.0, 1.0], [99, 99, 99], 80)
    (40, 20, 20)
    """
    if min(most) < 1 or sum(most) < total or len(shares) > total:
        return None
    whole = sum(shares)
    layers = [max(1, min(limit, int(total * share / whole))) for share, limit in zip(shares, most, strict=True)]
    while (missing := total - sum(layers)) != 0:
        step = 1 if missing > 0 else -1
        free = [i for i, n in enumerate(layers) if (n < most[i] if step > 0 else n > 1)]
        if step > 0:
            chosen = min(free, key=lambda i: ((layers[i] + 1) / shares[i], i))
        else:
            chosen = max(free, key=lambda i: (layers[i] / shares[i], -i))
        layers[chosen] += step
    return tuple(layers)
