"""Costs of kinds of stages, found once each: what the rates of replicas are put together from.

A stage's costs depend on its GPUs and layers alone, and on whether it is the first or the last of its replica.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np

from hexgen2.scheduler.kernels import Numbers
from hexgen2.scheduler.pools import RESERVED_BYTES
from hexgen2.scheduler.stages import Stage, Stages

if TYPE_CHECKING:
    from hexgen2.scheduler.cost_model import CostModel

#: Parts of the engine's largest step that prefill may make do with, where sharing a step does not pay.
TOKEN_BUDGETS = (1, 2, 4, 1_000_000)


@lru_cache(maxsize=8)
def batch_grid(largest: int) -> Numbers:
    """Batch sizes to choose from: all to 32, then steps of about 3 %, up to ``largest``."""
    sizes = list(range(1, min(largest, 32) + 1))
    while sizes[-1] < largest:
        sizes.append(min(largest, max(sizes[-1] + 1, round(sizes[-1] * 1.03))))
    return np.array(sizes, float)


class Grid:
    """What costs are told at: the prompts of a workload, and batches that decode together."""

    def __init__(self, cost: "CostModel") -> None:
        work, limits = cost.workload, cost.engine
        self.prompts = np.array([point.prompt_tokens for point in work.lengths], float)
        self.weights = np.array([point.weight for point in work.lengths])
        # Short prompts share a step up to its budget of tokens, which is a setting: a row for each choice of it.
        budgets = np.array([[limits.max_num_batched_tokens // part] for part in TOKEN_BUDGETS], float)
        self.together = np.clip(np.floor(budgets / self.prompts), 1, limits.max_num_seqs)
        # Prompts as a step takes them alone, and how many of their mean fill a step, by budget.
        self.chunks = np.minimum(self.prompts, limits.max_num_batched_tokens)
        self.mean_chunk = float(self.weights @ self.chunks)
        self.full = np.maximum(1.0, budgets[:, 0] / self.mean_chunk)
        self.batches = batch_grid(limits.max_num_seqs)
        # Of one token only, an answer never reaches decode; kept above zero for workloads of only those.
        self.decode_tokens = max(work.mean_decode_tokens, 1e-9)
        # Prompts whose answers a step of each batch finishes, and so many new ones' tokens.
        self.finished = self.batches / self.decode_tokens
        self.chunk_tokens = self.finished * work.mean_prompt_tokens
        # Of one prompt: its square, and tokens that later chunks read again.
        self.mean_square = float(self.weights @ self.prompts**2)
        chunks = np.maximum(1.0, self.prompts / self.chunk_tokens[:, None])
        self.again = (chunks - 1) / 2 * self.prompts @ self.weights


class Costs(NamedTuple):
    """What kinds of stages cost, one row each: tokens of KV they hold, and that the usual hand-off memory does; seconds
    per prompt when busy (by budget) and when alone; per step with one prompt, as much of it as a step takes, and with
    as many as fill it (by budget); per decode step, and per step that also takes prompts in (both by batch)."""

    kv_tokens: Numbers
    usual_tokens: Numbers
    prefill_busy_s: Numbers
    prefill_alone_s: Numbers
    chunk_s: Numbers
    full_s: Numbers
    decode_s: Numbers
    mixed_s: Numbers

    @classmethod
    def empty(cls, budgets: int, batches: int, rows: int = 0, value: float = 0.0) -> Self:
        """``rows`` of one value."""
        shapes = (rows,), (rows,), (rows, budgets), (rows,), (rows,), (rows, budgets), (rows, batches), (rows, batches)
        return cls(*(np.full(shape, value) for shape in shapes))

    def and_more(self, others: Self) -> Self:
        """These rows and then the others'."""
        return type(self)(*(np.concatenate(pair) for pair in zip(self, others, strict=True)))


class StageCosts:
    """Rows of ``found``, added as kinds of stages are met."""

    def __init__(self, cost: "CostModel", grid: Grid) -> None:
        self._cost, self._grid = cost, grid
        self._tables: dict[tuple[Any, ...], _Tables] = {}
        self._numbers: dict[tuple[Any, ...], int] = {}
        self.found = Costs.empty(len(TOKEN_BUDGETS), len(grid.batches))

    def add(self, rows: Sequence[Stages]) -> None:
        """Have a row for each stage of these replicas."""
        new: dict[tuple[Any, ...], dict[tuple[Any, ...], None]] = {}
        for stages in rows:
            for number in range(len(stages)):
                key = _key(stages, number)
                if key not in self._numbers:
                    new.setdefault(key[0], {})[key] = None
        for kind, keys in new.items():
            for key in keys:
                self._numbers[key] = len(self._numbers)
            layers, first, last = (np.array([key[i] for key in keys], float) for i in (1, 2, 3))
            self.found = self.found.and_more(self._costs(kind, layers, first, last))

    def numbers(self, rows: Sequence[Stages]) -> list[list[int]]:
        """Of each stage of these replicas, which were added: its row."""
        return [[self._numbers[_key(stages, number)] for number in range(len(stages))] for stages in rows]

    def _costs(self, kind: tuple[Any, ...], layers: Numbers, first: Numbers, last: Numbers) -> Costs:
        """Of stages on the same GPUs: ``layers`` of each, and whether it is the first or the last of its replica."""
        cost, llm, grid = self._cost, self._cost.llm, self._grid
        gpu, size = kind[0], kind[1]
        if not llm.allows_tensor_parallel_size(size):
            never = Costs.empty(len(TOKEN_BUDGETS), len(grid.batches), len(layers), math.inf)
            return never._replace(kv_tokens=-never.kv_tokens)
        ends = np.minimum(first + last, 1.0) if llm.tie_word_embeddings else first + last
        weights = (layers * llm.layer_bytes + ends * llm.embedding_bytes) / size
        token_bytes = layers * llm.kv_bytes_per_token_layer / min(size, llm.num_kv_heads)
        tables, host = self._table(kind), cost.engine.host(cost.gpus[gpu])
        launch = host.step_s + host.layer_s * layers
        extra = cost.engine.prefill_s * first
        # By stage, budget and length.
        together = layers[:, None, None] * tables.prefill_layer_s + last[:, None, None] * tables.prefill_head_s
        together = np.maximum(together, launch[:, None, None] + host.request_s * grid.together)
        together = (together + extra[:, None, None]) / grid.together * grid.weights

        def alone_s(layer_s: Numbers) -> Numbers:
            """Of a step with one prompt, which takes so long in a layer: the mean over the lengths."""
            steps = layers[:, None] * layer_s + last[:, None] * tables.alone_head_s
            steps = np.maximum(steps, launch[:, None] + host.request_s) + extra[:, None]
            return np.asarray((steps * grid.weights).sum(axis=1))

        full = layers[:, None] * tables.full_layer_s + last[:, None] * tables.full_head_s
        decode = layers[:, None] * tables.decode_layer_s + last[:, None] * tables.decode_head_s
        mixed_requests = grid.batches + np.maximum(1.0, grid.finished)
        mixed = layers[:, None] * tables.mixed_layer_s + last[:, None] * tables.mixed_head_s
        return Costs(
            kv_tokens=(cost.usable_bytes(gpu) - weights) / token_bytes,
            usual_tokens=RESERVED_BYTES / token_bytes,
            prefill_busy_s=together.sum(axis=2),
            prefill_alone_s=alone_s(tables.alone_layer_s),
            chunk_s=alone_s(tables.chunk_layer_s),
            full_s=np.maximum(full, launch[:, None] + host.request_s * grid.full) + extra[:, None],
            decode_s=np.maximum(decode, launch[:, None] + host.request_s * grid.batches),
            mixed_s=np.maximum(mixed, launch[:, None] + host.request_s * mixed_requests) + extra[:, None],
        )

    def _table(self, kind: tuple[Any, ...]) -> "_Tables":
        found = self._tables.get(kind)
        if found is None:
            gpu, size, bandwidth, latency = kind
            work, grid = self._cost.workload, self._grid
            kernels = self._cost.kernels(Stage(gpu, size, 1, bandwidth, latency))
            found = self._tables[kind] = _Tables(
                kernels.prefill_layer_s(grid.prompts, grid.together),
                kernels.head_s(grid.together),
                kernels.prefill_layer_s(grid.prompts, 1),
                kernels.head_s(1),
                kernels.prefill_layer_s(grid.chunks, 1),
                kernels.prefill_layer_s(grid.mean_chunk, grid.full),
                kernels.head_s(grid.full),
                kernels.decode_layer_s(grid.batches, work.mean_context_tokens),
                kernels.head_s(grid.batches),
                kernels.mixed_layer_s(
                    grid.batches,
                    work.mean_context_tokens,
                    grid.chunk_tokens,
                    grid.finished * grid.mean_square,
                    grid.finished * grid.again,
                    np.maximum(0.0, grid.chunk_tokens - work.mean_prompt_tokens),
                ),
                kernels.head_s(grid.batches + grid.finished),
            )
        return found


class _Tables(NamedTuple):
    """Kernel times of one layer, and of the output head, on one kind of stage: over prompts and over batches."""

    prefill_layer_s: Numbers
    prefill_head_s: Numbers
    alone_layer_s: Numbers
    alone_head_s: Numbers
    chunk_layer_s: Numbers
    full_layer_s: Numbers
    full_head_s: Numbers
    decode_layer_s: Numbers
    decode_head_s: Numbers
    mixed_layer_s: Numbers
    mixed_head_s: Numbers


def _key(stages: Stages, number: int) -> tuple[Any, ...]:
    """(what stages with the same kernel times share, layers, whether first, whether last)."""
    gpu, size, layers, bandwidth, latency = stages[number][:5]
    return (gpu, size, bandwidth, latency), layers, number == 0, number == len(stages) - 1
