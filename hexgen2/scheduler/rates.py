"""Requests per second of many replicas at once: what the search asks for, thousands of times, in arrays.

A stage's costs depend on its GPUs and layers alone, so they are found once per kind of stage; a replica's are their
sums and maxima. The same replica has the same figures, bit for bit, whether it is asked for alone or among others.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hexgen2.scheduler import bubbles
from hexgen2.scheduler.kernels import ACTIVATION_BYTES, Numbers
from hexgen2.scheduler.pools import RESERVED_BYTES, STEPS_HELD, staging_tokens
from hexgen2.scheduler.stages import Stage, Stages

if TYPE_CHECKING:
    from hexgen2.scheduler.cost_model import CostModel

#: Parts of the engine's largest step that prefill may make do with, where sharing a step does not pay.
TOKEN_BUDGETS = (1, 2, 4, 1_000_000)
#: Replicas that are worked on at once: arrays of this many rows stay in a processor's cache.
AT_ONCE = 512


class Rate(NamedTuple):
    """Requests per second, with how many in flight, and the time per output token that each then sees."""

    rate: float
    batch: int
    tpot_s: float


#: Of a replica that cannot have a role.
NONE = Rate(0.0, 0, 0.0)


class Figures(NamedTuple):
    """What one replica can do. ``kv_tokens`` fit beside its weights; ``latency_s``: prefill of one prompt, alone."""

    kv_tokens: float
    prefill_rps: float
    #: Of whole prompts that share a step at that rate; 0: sharing does not pay.
    shared_tokens: int
    latency_s: float
    decode: Rate
    colocated: Rate


class Rates:
    """Figures by stages, remembered."""

    def __init__(self, cost: "CostModel") -> None:
        self._cost = cost
        work, limits = cost.workload, cost.engine
        self._prompts = np.array([point.prompt_tokens for point in work.lengths], float)
        self._weights = np.array([point.weight for point in work.lengths])
        # Short prompts share a step up to its budget of tokens, which is a setting: a row for each choice of it.
        budgets = np.array([[limits.max_num_batched_tokens // part] for part in TOKEN_BUDGETS], float)
        self._together = np.clip(np.floor(budgets / self._prompts), 1, limits.max_num_seqs)
        # Prompts as a step takes them alone, and how many of their mean fill a step.
        self._chunks = np.minimum(self._prompts, limits.max_num_batched_tokens)
        self._mean_chunk = float(self._weights @ self._chunks)
        self._full = np.maximum(1.0, budgets[:, 0] / self._mean_chunk)
        self._longest_prompt = max(point.prompt_tokens for point in work.lengths)
        self._longest = max(point.prompt_tokens + point.output_tokens for point in work.lengths)
        self._batches = batch_grid(limits.max_num_seqs)
        # Of one token only, an answer never reaches decode; kept above zero for workloads of only those.
        self._decode_tokens = max(work.mean_decode_tokens, 1e-9)
        # Where steps mix both phases: prompt tokens beside each batch, and prompts that they finish.
        self._finished = self._batches / self._decode_tokens
        self._chunk_tokens = self._finished * work.mean_prompt_tokens
        # Of one prompt: its square, and tokens that later chunks read again.
        self._mean_square = float(self._weights @ self._prompts**2)
        chunks = np.maximum(1.0, self._prompts / self._chunk_tokens[:, None])
        self._again = (chunks - 1) / 2 * self._prompts @ self._weights
        self._tables: dict[tuple[Any, ...], _Tables] = {}
        self._numbers: dict[tuple[Any, ...], int] = {}
        self._stages = _Costs.empty(len(TOKEN_BUDGETS), len(self._batches))
        self._found: dict[Stages, Figures] = {}

    def of(self, stages: Stages) -> Figures:
        """Figures of one replica."""
        found = self._found.get(stages)
        return found if found is not None else self.of_all((stages,))[0]

    def of_all(self, rows: Sequence[Stages]) -> list[Figures]:
        """Figures of many, in their order."""
        missing: dict[int, list[Stages]] = {}
        for stages in dict.fromkeys(rows):
            if stages not in self._found:
                missing.setdefault(len(stages), []).append(stages)
        self._add_stages([stages for same in missing.values() for stages in same])
        for same in missing.values():
            for first in range(0, len(same), AT_ONCE):
                chunk = same[first : first + AT_ONCE]
                self._found.update(zip(chunk, self._evaluate(chunk), strict=True))
        return [self._found[stages] for stages in rows]

    def _evaluate(self, rows: Sequence[Stages]) -> list[Figures]:
        """Of replicas with equally many stages."""
        size = len(rows[0])
        at = np.array([[self._numbers[_key(stages, n)] for n in range(size)] for stages in rows])
        bandwidth = np.array([[stage.next_bandwidth_bytes_per_s for stage in stages[:-1]] for stages in rows])
        latency = np.array([[stage.next_latency_s for stage in stages[:-1]] for stages in rows])
        cost, costs, work = self._cost, self._stages, self._cost.workload
        token_s = cost.llm.hidden_size * ACTIVATION_BYTES / bandwidth if size > 1 else bandwidth
        hops = latency + work.mean_prompt_tokens * token_s
        kv_tokens = costs.kv_tokens[at].min(axis=1)
        fits = kv_tokens >= self._longest
        busy = costs.prefill_busy_s[at].max(axis=1)
        budget = busy.argmin(axis=1)
        shared = [cost.engine.max_num_batched_tokens // TOKEN_BUDGETS[int(each)] for each in budget]
        prefill = np.where(fits, 1.0 / np.maximum(busy.min(axis=1), hops.max(axis=1, initial=0.0)), 0.0)
        alone = _sum(costs.prefill_alone_s[at]) + _sum(hops)
        room = np.where(fits, kv_tokens, 0.0)[:, None]
        through, slowest = self._steps(costs.decode_s[at], latency, token_s, self._batches)
        usual = costs.usual_tokens[at].min(axis=1)
        intervals = [self._interval(count, through, slowest) for count in dict.fromkeys((1, size))]
        decode = self._best([(*each, room - self._staging(*each, alone, usual)) for each in intervals])
        # A step is of one phase: those of decode wait for those of prefill, 1 / prefill per request.
        with np.errstate(divide="ignore", invalid="ignore"):
            rounds = self._rounds(at, latency, token_s, budget, through, slowest, 1.0 / prefill)
            colocated = self._best([(size * self._batches, rounds, room)])
        if size == 1 and cost.engine.chunked_prefill:
            # In a pipeline mixed steps come and go like prompts of their own: see `bubbles`.
            chunked = self._chunked(at, latency, token_s, room)
            colocated = [one if one.rate > 0 else other for one, other in zip(chunked, colocated, strict=True)]
        return [
            Figures(float(kv_tokens[i]), float(prefill[i]), shared[i], float(alone[i]), decode[i], colocated[i])
            for i in range(len(rows))
        ]

    def _chunked(self, at: Any, latency: Numbers, token_s: Numbers, room: Numbers) -> list[Rate]:
        """Rates where each step decodes and takes as large a chunk of prompts as keeps up with what it decodes."""
        tokens = self._batches + self._chunk_tokens
        through, slowest = self._steps(self._stages.mixed_s[at], latency, token_s, tokens)
        never = tokens > self._cost.engine.max_num_batched_tokens
        through = np.where(never, np.inf, through)
        return self._best([(*self._interval(1, through, slowest), room)])

    def _rounds(
        self,
        at: Any,
        latency: Numbers,
        token_s: Numbers,
        budget: Any,
        through: Numbers,
        slowest: Numbers,
        prompt_s: Numbers,
    ) -> Numbers:
        """By replica and batch of each of as many micro-batches as stages: seconds of a step of all of them, with the
        prompts that take the places of what they finish. ``prompt_s``: of a prompt in the slowest stage."""
        size = at.shape[1]
        _, apart = self._interval(size, through, slowest)
        per_round = size * self._finished
        prompts = per_round * prompt_s[:, None]
        if size == 1:
            return np.asarray(apart + prompts)
        share, full = np.empty_like(self._batches), np.empty((len(self._full), len(self._batches)))
        for number, most in enumerate(self._full):
            share, full[number] = bubbles.trains(tuple(per_round), float(most))
        one = self._behind(self._stages.chunk_s[at], latency + self._mean_chunk * token_s)
        tokens = self._mean_chunk * self._full[budget]
        many = self._behind(self._stages.full_s[at, budget[:, None]], latency + tokens[:, None] * token_s)
        behind = one[:, None] + full[budget] * (many - one)[:, None]
        if self._cost.engine.chunked_prefill:
            # Steps that carry prompts decode as well: only the others wait for them.
            behind = behind / (1 + self._chunk_tokens / self._cost.engine.max_num_batched_tokens)
        return bubbles.round_s(apart, slowest, prompts, behind, share, size)

    @staticmethod
    def _behind(stages: Numbers, hops: Numbers) -> Numbers:
        """Seconds of a step in all stages and links but the slowest of them."""
        slowest: Numbers = np.maximum(stages.max(axis=1), hops.max(axis=1))
        return _sum(stages) + _sum(hops) - slowest

    def _steps(self, stages: Numbers, latency: Numbers, token_s: Numbers, tokens: Numbers) -> tuple[Numbers, Numbers]:
        """By replica and batch: seconds through all stages and links, and of the slowest of them."""
        through, slowest = np.zeros(stages[:, 0].shape), np.zeros(stages[:, 0].shape)
        for number in range(stages.shape[1]):
            steps = [stages[:, number]]
            if number < stages.shape[1] - 1:
                steps.append(latency[:, number, None] + tokens * token_s[:, number, None])
            for step in steps:
                through += step
                np.maximum(slowest, step, out=slowest)
        return through, slowest

    def _interval(self, micro_batches: int, through: Numbers, slowest: Numbers) -> tuple[Numbers, Numbers]:
        """By batch of each micro-batch: requests in flight, and for each replica the time of a token for them all."""
        return micro_batches * self._batches, np.asarray(np.maximum(through, micro_batches * slowest))

    def _staging(self, in_flight: Numbers, interval: Numbers, made_s: Numbers, usual: Numbers) -> Numbers:
        """By replica and batch: tokens that staging takes beyond what is usual, and set aside already.

        ``made_s``: of one prompt's KV; by whom is not known yet, so as long as this replica would need itself.
        """
        work = self._cost.workload
        if not work.mean_decode_tokens:
            return np.zeros_like(interval)  # Nothing is ever handed over.
        with np.errstate(invalid="ignore"):
            flow = in_flight / (self._decode_tokens * interval)
            held = flow * (made_s[:, None] + STEPS_HELD * interval)
        tokens = np.maximum(staging_tokens(work.mean_prompt_tokens, held), self._longest_prompt)
        return np.asarray(np.maximum(0.0, tokens - usual[:, None]))

    def _best(self, choices: Sequence[tuple[Numbers, Numbers, Numbers]]) -> list[Rate]:
        """The best batch of each replica, of (requests in flight, seconds of a token for them all, tokens of KV that
        fit)."""
        best = [NONE] * len(choices[0][1])
        limit = self._cost.workload.tpot_s
        for in_flight, interval, room in choices:
            allowed = in_flight * self._cost.workload.mean_context_tokens <= room
            if limit is not None:
                allowed &= interval <= limit
            rates = np.where(allowed, in_flight / (self._decode_tokens * interval), 0.0)
            for row, top in enumerate(np.argmax(rates, axis=1)):
                if rates[row, top] > best[row].rate:
                    best[row] = Rate(float(rates[row, top]), int(in_flight[top]), float(interval[row, top]))
        return best

    def _add_stages(self, rows: Sequence[Stages]) -> None:
        """Costs of kinds of stages that have not been met."""
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
            self._stages = self._stages.and_more(self._costs(kind, layers, first, last))

    def _costs(self, kind: tuple[Any, ...], layers: Numbers, first: Numbers, last: Numbers) -> "_Costs":
        """Of stages on the same GPUs: ``layers`` of each, and whether it is the first or the last of its replica."""
        cost, llm = self._cost, self._cost.llm
        gpu, size = kind[0], kind[1]
        if not llm.allows_tensor_parallel_size(size):
            never = _Costs.empty(len(TOKEN_BUDGETS), len(self._batches), len(layers), math.inf)
            return never._replace(kv_tokens=-never.kv_tokens)
        ends = np.minimum(first + last, 1.0) if llm.tie_word_embeddings else first + last
        weights = (layers * llm.layer_bytes + ends * llm.embedding_bytes) / size
        token_bytes = layers * llm.kv_bytes_per_token_layer / min(size, llm.num_kv_heads)
        tables, host = self._table(kind), cost.engine.host(cost.gpus[gpu])
        launch = host.step_s + host.layer_s * layers
        extra = cost.engine.prefill_s * first
        # By stage, budget and length.
        together = layers[:, None, None] * tables.prefill_layer_s + last[:, None, None] * tables.prefill_head_s
        together = np.maximum(together, launch[:, None, None] + host.request_s * self._together)
        together = (together + extra[:, None, None]) / self._together * self._weights
        alone = layers[:, None] * tables.alone_layer_s + last[:, None] * tables.alone_head_s
        alone = (np.maximum(alone, launch[:, None] + host.request_s) + extra[:, None]) * self._weights
        chunk = layers[:, None] * tables.chunk_layer_s + last[:, None] * tables.alone_head_s
        chunk = (np.maximum(chunk, launch[:, None] + host.request_s) + extra[:, None]) * self._weights
        full = layers[:, None] * tables.full_layer_s + last[:, None] * tables.full_head_s
        decode = layers[:, None] * tables.decode_layer_s + last[:, None] * tables.decode_head_s
        mixed_requests = self._batches + np.maximum(1.0, self._finished)
        mixed = layers[:, None] * tables.mixed_layer_s + last[:, None] * tables.mixed_head_s
        return _Costs(
            kv_tokens=(cost.usable_bytes(gpu) - weights) / token_bytes,
            usual_tokens=RESERVED_BYTES / token_bytes,
            prefill_busy_s=together.sum(axis=2),
            prefill_alone_s=alone.sum(axis=1),
            chunk_s=chunk.sum(axis=1),
            full_s=np.maximum(full, launch[:, None] + host.request_s * self._full) + extra[:, None],
            decode_s=np.maximum(decode, launch[:, None] + host.request_s * self._batches),
            mixed_s=np.maximum(mixed, launch[:, None] + host.request_s * mixed_requests) + extra[:, None],
        )

    def _table(self, kind: tuple[Any, ...]) -> "_Tables":
        found = self._tables.get(kind)
        if found is None:
            gpu, size, bandwidth, latency = kind
            kernels = self._cost.kernels(Stage(gpu, size, 1, bandwidth, latency))
            found = self._tables[kind] = _Tables(
                kernels.prefill_layer_s(self._prompts, self._together),
                kernels.head_s(self._together),
                kernels.prefill_layer_s(self._prompts, 1),
                kernels.head_s(1),
                kernels.prefill_layer_s(self._chunks, 1),
                kernels.prefill_layer_s(self._mean_chunk, self._full),
                kernels.head_s(self._full),
                kernels.decode_layer_s(self._batches, self._cost.workload.mean_context_tokens),
                kernels.head_s(self._batches),
                kernels.mixed_layer_s(
                    self._batches,
                    self._cost.workload.mean_context_tokens,
                    self._chunk_tokens,
                    self._finished * self._mean_square,
                    self._finished * self._again,
                    np.maximum(0.0, self._chunk_tokens - self._cost.workload.mean_prompt_tokens),
                ),
                kernels.head_s(self._batches + self._finished),
            )
        return found


class _Costs(NamedTuple):
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

    @staticmethod
    def empty(budgets: int, batches: int, rows: int = 0, value: float = 0.0) -> "_Costs":
        """``rows`` of one value."""
        shapes = (rows,), (rows,), (rows, budgets), (rows,), (rows,), (rows, budgets), (rows, batches), (rows, batches)
        return _Costs(*(np.full(shape, value) for shape in shapes))

    def and_more(self, others: "_Costs") -> "_Costs":
        """These rows and then the others'."""
        return _Costs(*(np.concatenate(pair) for pair in zip(self, others, strict=True)))


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


def _sum(columns: Numbers) -> Numbers:
    """Over the columns, one after the other, so that the number of rows changes no bit."""
    total = np.zeros(len(columns))
    for number in range(columns.shape[1]):
        total = total + columns[:, number]
    return total


@lru_cache(maxsize=8)
def batch_grid(largest: int) -> Numbers:
    """Batch sizes to choose from: all to 32, then steps of about 3 %, up to ``largest``."""
    sizes = list(range(1, min(largest, 32) + 1))
    while sizes[-1] < largest:
        sizes.append(min(largest, max(sizes[-1] + 1, round(sizes[-1] * 1.03))))
    return np.array(sizes, float)
