"""Costs of one replica: seconds of its steps, bytes of weights and KV, requests per second.

A replica is a row of pipeline stages, each a tensor-parallel group of one GPU type (paper, section 3.2). A stage's step
takes the longer of its GPUs' kernels and its host's launching of them. Pure; answers are kept by composition.
"""

import math
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from hexgen2.cluster import GpuType
from hexgen2.llm import Llm
from hexgen2.scheduler.efficiency import Efficiency, Engine, efficiency, engine
from hexgen2.scheduler.kernels import ACTIVATION_BYTES, Kernels, Numbers
from hexgen2.workload import Workload

#: Of the driver's memory an engine may use so much, as vLLM's ``gpu_memory_utilization`` has it.
MEMORY_UTILIZATION = 0.9
#: CUDA context, activations and graphs, per GPU.
OVERHEAD_BYTES = 1_000_000_000
#: Registered memory of the KV hand-off per GPU (``KvConfig``: staging and landing, or the send buffer).
STAGING_BYTES = 320 << 20
#: Parts of the engine's largest step that prefill may make do with, where sharing a step does not pay.
TOKEN_BUDGETS = (1, 2, 4, 1_000_000)


class Stage(NamedTuple):
    """A pipeline stage: ``num_layers`` on ``tensor_parallel_size`` GPUs of one type, and its links (bytes/s, s)."""

    gpu: str
    tensor_parallel_size: int
    num_layers: int
    #: Between the GPUs of this stage.
    tp_bandwidth_bytes_per_s: float
    tp_latency_s: float
    #: To the next stage; of no meaning in the last one.
    next_bandwidth_bytes_per_s: float = math.inf
    next_latency_s: float = 0.0


Stages = tuple[Stage, ...]


class DecodeRate(NamedTuple):
    """Requests per second, with how many in flight, and the time per output token that each then sees."""

    rate: float
    batch: int
    tpot_s: float


class CostModel:
    """Costs of replicas of one model under one workload. Answers are remembered by their stages.

    ``gpu_types`` are the kinds of GPU that stages may name; ``profile`` is the engine's and ``efficiencies`` are the
    GPUs', both from the catalog unless given.
    """

    def __init__(
        self,
        llm: Llm,
        workload: Workload,
        gpu_types: Iterable[GpuType],
        profile: Engine | None = None,
        staging_bytes: int = STAGING_BYTES,
        efficiencies: Mapping[str, Efficiency] | None = None,
    ) -> None:
        self.llm = llm
        self.workload = workload
        self.gpus = {gpu.name: gpu for gpu in gpu_types}
        self._efficiencies = efficiencies or {name: efficiency(gpu) for name, gpu in self.gpus.items()}
        self.engine = profile or engine()
        self.staging_bytes = staging_bytes
        #: KV of one token, all layers.
        self.kv_bytes_per_token = llm.kv_bytes_per_token
        #: KV that a mean prompt carries from prefill to decode.
        self.kv_bytes_per_request = llm.kv_bytes_per_token * workload.mean_prompt_tokens
        self._prompts = np.array([point.prompt_tokens for point in workload.lengths], float)
        self._weights = np.array([point.weight for point in workload.lengths])
        # Short prompts share a step up to its budget of tokens, which is a setting: a row for each choice of it.
        budgets = np.array([[self.engine.max_num_batched_tokens // part] for part in TOKEN_BUDGETS], float)
        self._together = np.clip(np.floor(budgets / self._prompts), 1, self.engine.max_num_seqs)
        self._longest = max(point.prompt_tokens + point.output_tokens for point in workload.lengths)
        self._batches = batch_grid(self.engine.max_num_seqs)
        self._kernels: dict[tuple[str, int, float, float], _Tables] = {}
        self._stage_parts: dict[tuple[Any, bool, bool], _Part] = {}
        self._prefill_rates: dict[Stages, float] = {}
        self._decode_rates: dict[Stages, DecodeRate] = {}

    def prefill_s(self, stages: Stages, prompt_tokens: float, batch: int = 1) -> float:
        """Seconds from the start of a step with ``batch`` prompts to their first tokens, all stages in turn."""
        total = 0.0
        for number, stage in enumerate(stages):
            kernels = self._tables(stage).kernels
            gpu = stage.num_layers * float(kernels.prefill_layer_s(prompt_tokens, batch))
            if number == len(stages) - 1:
                gpu += float(kernels.head_s(batch))
            total += max(gpu, self._host_s(stage, batch)) + self._hop_s(stages, number, prompt_tokens * batch)
        return total + self.engine.prefill_s

    def decode_step_s(self, stages: Stages, batch: int, context_tokens: float) -> float:
        """Seconds of one token for each of ``batch`` requests with ``context_tokens`` cached, all stages in turn."""
        total = 0.0
        for number, stage in enumerate(stages):
            kernels = self._tables(stage).kernels
            gpu = stage.num_layers * float(kernels.decode_layer_s(batch, context_tokens))
            if number == len(stages) - 1:
                gpu += float(kernels.head_s(batch))
            total += max(gpu, self._host_s(stage, batch)) + self._hop_s(stages, number, batch)
        return total

    def kernels(self, stage: Stage) -> Kernels:
        """Times of one layer on a stage's GPUs."""
        return self._tables(stage).kernels

    def shared_tokens(self, stages: Stages) -> int:
        """Tokens of whole prompts that share a step at ``prefill_rate``; 0: sharing does not pay."""
        parts = self._parts(stages)
        busy = parts[0].prefill_busy_s
        for part in parts[1:]:
            busy = np.maximum(busy, part.prefill_busy_s)
        return self.engine.max_num_batched_tokens // TOKEN_BUDGETS[int(np.argmin(busy))]

    def weight_bytes_per_gpu(self, stages: Stages, number: int) -> float:
        """Of stage ``number``: its layers, the embedding in the first and the head in the last."""
        llm, stage = self.llm, stages[number]
        ends = (number == 0) + (number == len(stages) - 1)
        if len(stages) == 1 and llm.tie_word_embeddings:
            ends = 1
        return (stage.num_layers * llm.layer_bytes + ends * llm.embedding_bytes) / stage.tensor_parallel_size

    def usable_bytes(self, gpu: str) -> float:
        """Memory of one GPU for weights and KV."""
        return self.gpus[gpu].memory_bytes * MEMORY_UTILIZATION - OVERHEAD_BYTES - self.staging_bytes

    def kv_tokens(self, stages: Stages) -> float:
        """Tokens whose KV fits beside the weights, in the stage that has least room; negative when these do not fit."""
        return min(part.kv_tokens for part in self._parts(stages))

    def fits(self, stages: Stages) -> bool:
        """Whether weights and the longest request of the workload fit."""
        return self.kv_tokens(stages) >= self._longest

    def max_batch(self, stages: Stages) -> int:
        """Requests of mean context whose KV fits at once; 0 when the model does not fit."""
        if not self.fits(stages):
            return 0
        return int(self.kv_tokens(stages) / self.workload.mean_context_tokens)

    def prefill_latency_s(self, stages: Stages) -> float:
        """Mean seconds to the first token of a request that is alone."""
        hops = sum(self._hop_s(stages, number, self.workload.mean_prompt_tokens) for number in range(len(stages)))
        return sum(part.prefill_alone_s for part in self._parts(stages)) + float(hops)

    def prefill_rate(self, stages: Stages) -> float:
        """Prompts per second: one over the mean time that the busiest stage, or link between stages, gives to one.

        The mean of the time over the lengths, never the time of the mean length. 0 when the model does not fit.
        """
        found = self._prefill_rates.get(stages)
        if found is None:
            found = self._prefill_rates[stages] = self._prefill_rate(stages)
        return found

    def decode_rate(self, stages: Stages) -> DecodeRate:
        """The highest rate of whole answers within memory and the workload's limit of time per token; 0 if none is."""
        found = self._decode_rates.get(stages)
        if found is None:
            found = self._decode_rates[stages] = self._decode_rate(stages)
        return found

    def _prefill_rate(self, stages: Stages) -> float:
        if not self.fits(stages):
            return 0.0
        parts = self._parts(stages)
        busy = parts[0].prefill_busy_s
        for part in parts[1:]:
            busy = np.maximum(busy, part.prefill_busy_s)
        hops = (self._hop_s(stages, number, self.workload.mean_prompt_tokens) for number in range(len(stages)))
        return float(1.0 / max(float(busy.min()), *hops))

    def _decode_rate(self, stages: Stages) -> DecodeRate:
        limit = self.max_batch(stages)
        if limit < 1:
            return DecodeRate(0.0, 0, 0.0)
        # Seconds for every size of a micro-batch on the grid, all stages in turn and in the slowest of them.
        through, slowest = np.zeros_like(self._batches), np.zeros_like(self._batches)
        for number, part in enumerate(self._parts(stages)):
            through, slowest = through + part.decode_s, np.maximum(slowest, part.decode_s)
            if number < len(stages) - 1:
                hop = self._hop_s(stages, number, self._batches)
                through, slowest = through + hop, np.maximum(slowest, hop)
        best = DecodeRate(0.0, 0, 0.0)
        for micro_batches in {1, len(stages)}:
            interval = np.maximum(through, micro_batches * slowest)
            in_flight = micro_batches * self._batches
            allowed = in_flight <= limit
            if self.workload.tpot_s is not None:
                allowed &= interval <= self.workload.tpot_s
            # An answer of one token never reaches decode; the mean is kept above zero for workloads of only those.
            rates = np.where(allowed, in_flight / (max(self.workload.mean_decode_tokens, 1e-9) * interval), 0.0)
            top = int(np.argmax(rates))
            if rates[top] > best.rate:
                best = DecodeRate(float(rates[top]), int(in_flight[top]), float(interval[top]))
        return best

    def _parts(self, stages: Stages) -> "list[_Part]":
        """What each stage costs by itself: the same stages return in very many replicas, so this is remembered."""
        last = len(stages) - 1
        parts = []
        for number, stage in enumerate(stages):
            key = (stage[:5], number == 0, number == last)
            part = self._stage_parts.get(key)
            if part is None:
                part = self._stage_parts[key] = self._part(stages, number)
            parts.append(part)
        return parts

    def _part(self, stages: Stages, number: int) -> "_Part":
        stage, llm = stages[number], self.llm
        if not llm.allows_tensor_parallel_size(stage.tensor_parallel_size):
            return _Part(
                -math.inf, np.full(len(TOKEN_BUDGETS), math.inf), math.inf, np.full_like(self._batches, math.inf)
            )
        room = self.usable_bytes(stage.gpu) - self.weight_bytes_per_gpu(stages, number)
        share = min(stage.tensor_parallel_size, llm.num_kv_heads)
        tables, host, last = self._tables(stage), self.engine.host(self.gpus[stage.gpu]), number == len(stages) - 1
        launch = host.step_s + host.layer_s * stage.num_layers
        extra = self.engine.prefill_s if number == 0 else 0.0
        together = stage.num_layers * tables.prefill_layer_s + tables.prefill_head_s * last
        together = np.maximum(together, launch + host.request_s * self._together) + extra
        alone = stage.num_layers * tables.kernels.prefill_layer_s(self._prompts, 1) + tables.kernels.head_s(1) * last
        alone = np.maximum(alone, launch + host.request_s) + extra
        decode = stage.num_layers * tables.decode_layer_s + tables.decode_head_s * last
        return _Part(
            kv_tokens=room / (stage.num_layers * llm.kv_bytes_per_token_layer / share),
            prefill_busy_s=(together / self._together) @ self._weights,
            prefill_alone_s=float(self._weights @ alone),
            decode_s=np.maximum(decode, launch + host.request_s * self._batches),
        )

    def _tables(self, stage: Stage) -> "_Tables":
        key = (stage.gpu, stage.tensor_parallel_size, stage.tp_bandwidth_bytes_per_s, stage.tp_latency_s)
        found = self._kernels.get(key)
        if found is None:
            kernels = Kernels(
                self.llm,
                self.gpus[stage.gpu],
                self._efficiencies[stage.gpu],
                self.engine,
                stage.tensor_parallel_size,
                stage.tp_bandwidth_bytes_per_s,
                stage.tp_latency_s,
            )
            found = self._kernels[key] = _Tables(
                kernels,
                kernels.prefill_layer_s(self._prompts, self._together),
                kernels.head_s(self._together),
                kernels.decode_layer_s(self._batches, self.workload.mean_context_tokens),
                kernels.head_s(self._batches),
            )
        return found

    def _host_s(self, stage: Stage, batch: float) -> float:
        host = self.engine.host(self.gpus[stage.gpu])
        return host.step_s + host.layer_s * stage.num_layers + host.request_s * batch

    def _hop_s(self, stages: Stages, number: int, tokens: Any) -> Any:
        """Hidden states of ``tokens`` from stage ``number`` to the next; nothing after the last."""
        if number == len(stages) - 1:
            return 0.0
        stage = stages[number]
        payload = tokens * self.llm.hidden_size * ACTIVATION_BYTES
        return stage.next_latency_s + payload / stage.next_bandwidth_bytes_per_s


class _Part(NamedTuple):
    """What one stage costs: tokens of KV it holds, seconds per prompt when busy and when alone, per decode batch.

    ``prefill_busy_s`` has one entry for each of ``TOKEN_BUDGETS``.
    """

    kv_tokens: float
    prefill_busy_s: Numbers
    prefill_alone_s: float
    decode_s: Numbers


class _Tables(NamedTuple):
    """Kernel times over the workload's prompts and over the grid of batches."""

    kernels: Kernels
    prefill_layer_s: Numbers
    prefill_head_s: Numbers
    decode_layer_s: Numbers
    decode_head_s: Numbers


@lru_cache(maxsize=8)
def batch_grid(largest: int) -> Numbers:
    """Batch sizes to choose from: all to 32, then steps of about 3 %, up to ``largest``."""
    sizes = list(range(1, min(largest, 32) + 1))
    while sizes[-1] < largest:
        sizes.append(min(largest, max(sizes[-1] + 1, round(sizes[-1] * 1.03))))
    return np.array(sizes, float)


def even_stages(llm: Llm, gpu: GpuType, tensor_parallel_size: int = 1, pipeline_parallel_size: int = 1) -> Stages:
    """Stages of one GPU type in one machine, layers spread evenly, the type's own link between all."""
    bandwidth, latency = gpu.link_bandwidth_bytes_per_s, gpu.link_latency_s
    fewest, more = divmod(llm.num_layers, pipeline_parallel_size)
    return tuple(
        Stage(gpu.name, tensor_parallel_size, fewest + (n < more), bandwidth, latency, bandwidth, latency)
        for n in range(pipeline_parallel_size)
    )
