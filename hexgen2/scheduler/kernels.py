"""Time of one transformer layer on one tensor-parallel group: matrix products, attention, all-reduce, elementwise work.

HexGen's cost model (ICML 2024, section 4) with what it leaves out: attention's operations, reading cached KV, grouped
queries, experts, real shapes, and efficiencies measured per GPU. Works on numbers and on arrays of them alike.
"""

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hexgen2.cluster import GpuType
from hexgen2.llm import Llm
from hexgen2.scheduler.efficiency import Efficiency, Engine, efficiency

Numbers: TypeAlias = "NDArray[np.float64]"

#: Activations have 16 bits whatever the weights have.
ACTIVATION_BYTES = 2


@dataclass(frozen=True, slots=True)
class Kernels:
    """One layer of ``llm`` on ``tensor_parallel_size`` GPUs whose link has a bandwidth (bytes/s) and latency (s)."""

    llm: Llm
    gpu: GpuType
    engine: Engine
    tensor_parallel_size: int
    link_bandwidth_bytes_per_s: float
    link_latency_s: float

    @property
    def rates(self) -> Efficiency:
        """The GPU's efficiencies."""
        return efficiency(self.gpu)

    def prefill_layer_s(self, prompt_tokens: Any, batch: Any = 1) -> Numbers:
        """Of ``batch`` prompts of ``prompt_tokens`` each in one step."""
        llm, rates = self.llm, self.rates
        prompt, batch = np.asarray(prompt_tokens, float), np.asarray(batch, float)
        # Causal: half of the square; two products (scores, values) of two operations each.
        flops = 2.0 * batch * prompt * prompt * llm.num_heads * llm.head_dim / self.tensor_parallel_size
        attention_s = rates.attention_s + flops / (self.gpu.flops * rates.attention_compute)
        return self._layer_s(prompt * batch) + attention_s

    def decode_layer_s(self, batch: Any, context_tokens: Any) -> Numbers:
        """Of one token for each of ``batch`` requests that have ``context_tokens`` cached."""
        llm, rates = self.llm, self.rates
        batch = np.asarray(batch, float)
        # More GPUs than KV heads keep copies: each then reads one whole head.
        share = min(self.tensor_parallel_size, llm.num_kv_heads)
        read = batch * np.asarray(context_tokens, float) * llm.kv_bytes_per_token_layer / share
        bandwidth = self.gpu.memory_bandwidth_bytes_per_s * rates.attention_memory
        return self._layer_s(batch) + rates.attention_s + read / bandwidth

    def head_s(self, positions: Any) -> Numbers:
        """Of the output head for so many positions."""
        return self._gemm_s(np.asarray(positions, float), self.llm.vocab_size * self.llm.hidden_size, 2.0)

    def all_reduce_s(self, tokens: Any) -> Numbers:
        """Of the sum over the group of one hidden state per token."""
        tokens = np.asarray(tokens, float)
        size = self.tensor_parallel_size
        if size == 1:
            return np.zeros_like(tokens)
        payload = tokens * self.llm.hidden_size * ACTIVATION_BYTES
        fixed = self.rates.all_reduce_s + 2 * (size - 1) * self.link_latency_s
        bandwidth = self.link_bandwidth_bytes_per_s * self.rates.all_reduce_bandwidth
        return fixed + 2 * (size - 1) / size * payload / bandwidth

    def _layer_s(self, tokens: Numbers) -> Numbers:
        llm = self.llm
        per_element = llm.weight_bytes_per_element
        attention = llm.attention_elements
        products = self._gemm_s(tokens, attention * 0.5, per_element) + self._gemm_s(
            tokens, attention * 0.5, per_element
        )
        # Of many experts those are read that at least one token chose.
        active = tokens * llm.num_experts_per_token / llm.num_experts
        read = llm.num_experts * (1 - (1 - llm.num_experts_per_token / llm.num_experts) ** tokens)
        mlp = llm.expert_elements
        for part in (1 / 3, 2 / 3) if llm.gated_mlp else (1 / 2, 1 / 2):
            products = products + self._gemm_s(active, mlp * part, per_element, copies=read)
        hidden_bytes = llm.hidden_size * ACTIVATION_BYTES
        bandwidth = self.gpu.memory_bandwidth_bytes_per_s * self.rates.memory
        elementwise = self.engine.elementwise_passes * tokens * hidden_bytes / bandwidth
        return products + elementwise + 2 * self.all_reduce_s(tokens)

    def _gemm_s(self, tokens: Numbers, elements: float, bytes_per_element: float, copies: Any = 1.0) -> Numbers:
        """Products of ``tokens`` rows with ``copies`` matrices of ``elements`` each, divided over the group."""
        size, rates = self.tensor_parallel_size, self.rates
        read = copies * elements * bytes_per_element / size / (self.gpu.memory_bandwidth_bytes_per_s * rates.memory)
        compute = 2 * copies * (tokens + 0.0) * elements / size / (self.gpu.flops * rates.compute)
        return rates.gemm_s + np.maximum(read, compute)
