"""Requests per second of many replicas at once: what the search asks for, thousands of times, in arrays.

A stage's costs depend on its GPUs and layers alone, so they are found once per kind of stage; a replica's are their
sums and maxima. The same replica has the same figures, bit for bit, whether it is asked for alone or among others.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hexgen2.scheduler import bubbles
from hexgen2.scheduler.kernels import ACTIVATION_BYTES, Numbers
from hexgen2.scheduler.pools import SPARE_TOKENS, STEPS_HELD, staging_tokens
from hexgen2.scheduler.stage_costs import TOKEN_BUDGETS, Grid, StageCosts
from hexgen2.scheduler.stages import Stages

if TYPE_CHECKING:
    from hexgen2.scheduler.cost_model import CostModel

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
        self._grid = Grid(cost)
        self._costs = StageCosts(cost, self._grid)
        self._trains_of: dict[int, tuple[Numbers, Numbers]] = {}
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
        self._costs.add([stages for same in missing.values() for stages in same])
        for same in missing.values():
            for first in range(0, len(same), AT_ONCE):
                chunk = same[first : first + AT_ONCE]
                self._found.update(zip(chunk, self._evaluate(chunk), strict=True))
        return [self._found[stages] for stages in rows]

    def _evaluate(self, rows: Sequence[Stages]) -> list[Figures]:
        """Of replicas with equally many stages."""
        size = len(rows[0])
        at = np.array(self._costs.numbers(rows))
        bandwidth = np.array([[stage.next_bandwidth_bytes_per_s for stage in stages[:-1]] for stages in rows])
        latency = np.array([[stage.next_latency_s for stage in stages[:-1]] for stages in rows])
        cost, costs, work = self._cost, self._costs.found, self._cost.workload
        token_s = cost.llm.hidden_size * ACTIVATION_BYTES / bandwidth if size > 1 else bandwidth
        hops = latency + work.mean_prompt_tokens * token_s
        kv_tokens = costs.kv_tokens[at].min(axis=1)
        longest, longest_prompt = (n + SPARE_TOKENS for n in (work.longest_tokens, work.longest_prompt_tokens))
        usual = costs.usual_tokens[at].min(axis=1)
        # A prompt is in the send buffer while it is in the engine.
        prefills = kv_tokens - np.maximum(0.0, work.longest_prompt_tokens - usual) >= longest_prompt
        busy = costs.prefill_busy_s[at].max(axis=1)
        budget = busy.argmin(axis=1)
        shared = [cost.engine.max_num_batched_tokens // TOKEN_BUDGETS[int(each)] for each in budget]
        prompt_s = np.maximum(busy.min(axis=1), hops.max(axis=1, initial=0.0))
        prefill = np.where(prefills, 1.0 / prompt_s, 0.0)
        alone = _sum(costs.prefill_alone_s[at]) + _sum(hops)
        room = np.where(kv_tokens >= longest, kv_tokens, 0.0)[:, None]
        through, slowest = self._steps(costs.decode_s[at], latency, token_s, self._grid.batches)
        intervals = [self._interval(count, through, slowest) for count in dict.fromkeys((1, size))]
        beside = [room - self._staging(*each, alone, usual) for each in intervals]
        decode = self._best(
            [(*each, np.where(left >= longest, left, 0.0)) for each, left in zip(intervals, beside, strict=True)]
        )
        # A step is of one phase: those of decode wait for those of prefill.
        with np.errstate(divide="ignore", invalid="ignore"):
            rounds = self._rounds(at, latency, token_s, hops, budget, through, slowest, prompt_s)
            colocated = self._best([(size * self._grid.batches, rounds, room)])
        if size == 1 and cost.engine.chunked_prefill:
            # In a pipeline mixed steps come and go like prompts of their own: see `bubbles`.
            chunked = self._chunked(at[:, 0], room)
            colocated = [one if one.rate > 0 else other for one, other in zip(chunked, colocated, strict=True)]
        return [
            Figures(float(kv_tokens[i]), float(prefill[i]), shared[i], float(alone[i]), decode[i], colocated[i])
            for i in range(len(rows))
        ]

    def _chunked(self, at: Any, room: Numbers) -> list[Rate]:
        """Rates in one stage where each step decodes and takes as large a chunk of prompts as keeps up with that."""
        tokens = self._grid.batches + self._grid.chunk_tokens
        never = tokens > self._cost.engine.max_num_batched_tokens
        step_s = np.where(never, np.inf, self._costs.found.mixed_s[at])
        return self._best([(self._grid.batches, step_s, room)])

    def _rounds(
        self,
        at: Any,
        latency: Numbers,
        token_s: Numbers,
        hops: Numbers,
        budget: Any,
        through: Numbers,
        slowest: Numbers,
        prompt_s: Numbers,
    ) -> Numbers:
        """By replica and batch of each of as many micro-batches as stages: seconds of a step of all of them, with the
        prompts that take the places of what they finish. ``prompt_s``: of a prompt in the slowest stage, where as
        many share a step as pays."""
        size = at.shape[1]
        _, apart = self._interval(size, through, slowest)
        per_round = size * self._grid.finished
        chunked = self._cost.engine.chunked_prefill
        if chunked:
            prompts = per_round * prompt_s[:, None]
        else:
            # Each micro-batch has its own: few prompts share a step, whatever many could.
            share, full = self._trains(1)
            alone = np.maximum(self._costs.found.prefill_alone_s[at].max(axis=1), hops.max(axis=1, initial=0.0))
            mean, most = self._grid.finished, self._grid.full[budget][:, None]
            prompts = size * bubbles.prompts_s(mean, share, full[budget], most, alone[:, None], prompt_s[:, None])
        if size == 1:
            return np.asarray(apart + prompts)
        share, full = self._trains(size)
        one = self._behind(self._costs.found.chunk_s[at], latency + self._grid.mean_chunk * token_s)
        tokens = self._grid.mean_chunk * self._grid.full[budget]
        many = self._behind(self._costs.found.full_s[at, budget[:, None]], latency + tokens[:, None] * token_s)
        behind = one[:, None] + full[budget] * (many - one)[:, None]
        if chunked:
            # Steps that carry prompts decode as well: only the others wait for them.
            behind = behind / (1 + self._grid.chunk_tokens / self._cost.engine.max_num_batched_tokens)
        return bubbles.round_s(apart, slowest, prompts, behind, share, size)

    def _trains(self, micro_batches: int) -> tuple[Numbers, Numbers]:
        """By batch of each: the share of turns with prompts, and how full their longest step is, by budget."""
        if micro_batches not in self._trains_of:
            prompts = micro_batches * self._grid.finished
            found = [bubbles.trains(prompts, float(most)) for most in self._grid.full]
            self._trains_of[micro_batches] = found[0][0], np.array([full for _, full in found])
        return self._trains_of[micro_batches]

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
        return micro_batches * self._grid.batches, np.asarray(np.maximum(through, micro_batches * slowest))

    def _staging(self, in_flight: Numbers, interval: Numbers, made_s: Numbers, usual: Numbers) -> Numbers:
        """By replica and batch: tokens that staging takes beyond what is usual, and set aside already.

        ``made_s``: of one prompt's KV; by whom is not known yet, so as long as this replica would need itself.
        """
        work = self._cost.workload
        if not work.mean_decode_tokens:
            return np.zeros_like(interval)  # Nothing is ever handed over.
        with np.errstate(invalid="ignore"):
            flow = in_flight / (self._grid.decode_tokens * interval)
            held = flow * (made_s[:, None] + STEPS_HELD * interval)
        tokens = np.maximum(staging_tokens(work.mean_prompt_tokens, held), work.longest_prompt_tokens)
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
            rates = np.where(allowed, in_flight / (self._grid.decode_tokens * interval), 0.0)
            for row, top in enumerate(np.argmax(rates, axis=1)):
                if rates[row, top] > best[row].rate:
                    best[row] = Rate(float(rates[row, top]), int(in_flight[top]), float(interval[row, top]))
        return best


def _sum(columns: Numbers) -> Numbers:
    """Over the columns, one after the other, so that the number of rows changes no bit."""
    total = np.zeros(len(columns))
    for number in range(columns.shape[1]):
        total = total + columns[:, number]
    return total
