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
from hexgen2.scheduler.efficiency import Efficiency, Engine

Numbers: TypeAlias = "NDArray[np.float64]"

#: Activations have 16 bits whatever the weights have.
ACTIVATION_BYTES = 2


def blended_max(one: Any, other: Any, blend: float) -> Numbers:
    """The larger of two times where they are far apart, and up to 2^(1/blend) times that where both bind."""
    larger = np.maximum(one, other)
    return np.asarray(larger * (1 + (np.minimum(one, other) / larger) ** blend) ** (1 / blend))


@dataclass(frozen=True, slots=True)
class Kernels:
    """One layer of ``llm`` on ``tensor_parallel_size`` GPUs whose link has a bandwidth (bytes/s) and latency (s)."""

    llm: Llm
    gpu: GpuType
    rates: Efficiency
    engine: Engine
    tensor_parallel_size: int
    link_bandwidth_bytes_per_s: float
    link_latency_s: float

    def prefill_layer_s(self, prompt_tokens: Any, batch: Any = 1) -> Numbers:
        """Of ``batch`` prompts of ``prompt_tokens`` each in one step."""
        llm, rates = self.llm, self.rates
        prompt, batch = np.asarray(prompt_tokens, float), np.asarray(batch, float)
        # Causal: half of the square; two products (scores, values) of two operations each.
        flops = 2.0 * batch * prompt * prompt * llm.num_heads * llm.head_dim / self.tensor_parallel_size
        attention_s = flops / (self.gpu.flops * rates.attention_compute) * self.engine.prompt_attention_factor
        # What an engine adds for tokens that share a step with another prompt's.
        shared = self.engine.host(self.gpu).shared_token_s * prompt * (batch - 1) * llm.hidden_size
        return np.asarray(self._layer_s(prompt * batch) + rates.attention_s + attention_s + shared)

    def decode_layer_s(self, batch: Any, context_tokens: Any) -> Numbers:
        """Of one token for each of ``batch`` requests that have ``context_tokens`` cached."""
        llm, rates = self.llm, self.rates
        batch = np.asarray(batch, float)
        # More GPUs than KV heads keep copies: each then reads one whole head.
        share = min(self.tensor_parallel_size, llm.num_kv_heads)
        read = batch * np.asarray(context_tokens, float) * llm.kv_bytes_per_token_layer / share
        bandwidth = self.gpu.memory_bandwidth_bytes_per_s * rates.attention_memory
        return np.asarray(self._layer_s(batch) + rates.cached_attention_s + read / bandwidth)

    def mixed_layer_s(
        self,
        batch: Any,
        context_tokens: Any,
        chunk_tokens: Any,
        prompt_squares: Any,
        read_again_tokens: Any,
        shared_tokens: Any,
    ) -> Numbers:
        """Of a step that decodes for ``batch`` requests and takes in ``chunk_tokens`` of prompts.

        As Sarathi-Serve has it (OSDI 2024). Matrix products see all tokens at once; attention over prompts and over
        cached tokens runs one after the other, and a prompt's later chunks read the keys and values of its earlier ones
        again. ``prompt_squares``: sum of squared lengths of the prompts that a step finishes; ``read_again_tokens``: of
        them all; ``shared_tokens``: of prompts beside the first.
        """
        llm, rates = self.llm, self.rates
        batch, chunk = np.asarray(batch, float), np.asarray(chunk_tokens, float)
        flops = 2.0 * np.asarray(prompt_squares, float) * llm.num_heads * llm.head_dim / self.tensor_parallel_size
        attention_s = flops / (self.gpu.flops * rates.attention_compute) * self.engine.prompt_attention_factor
        share = min(self.tensor_parallel_size, llm.num_kv_heads)
        read = (batch * np.asarray(context_tokens, float) + read_again_tokens) * llm.kv_bytes_per_token_layer / share
        read_s = read / (self.gpu.memory_bandwidth_bytes_per_s * rates.attention_memory)
        shared_s = self.engine.host(self.gpu).shared_token_s * np.asarray(shared_tokens, float) * llm.hidden_size
        fixed_s = rates.attention_s + rates.cached_attention_s
        return np.asarray(self._layer_s(batch + chunk) + fixed_s + attention_s + read_s + shared_s)

    def head_s(self, positions: Any) -> Numbers:
        """Of the output head for so many positions."""
        return self._gemm_s(np.asarray(positions, float), self.llm.vocab_size, self.llm.hidden_size, 2.0)

    def all_reduce_s(self, tokens: Any) -> Numbers:
        """Of the sum over the group of one hidden state per token."""
        tokens = np.asarray(tokens, float)
        size = self.tensor_parallel_size
        if size == 1:
            return np.zeros_like(tokens)
        payload = tokens * self.llm.hidden_size * ACTIVATION_BYTES
        # The link's own latency counts where it is more than what the collective was measured with.
        fixed = self.rates.all_reduce_s + (size - 1) * max(self.rates.all_reduce_hop_s, self.link_latency_s)
        bandwidth = self.link_bandwidth_bytes_per_s * self.rates.all_reduce_bandwidth
        return np.asarray(fixed + 2 * (size - 1) / size * payload / bandwidth)

    def _layer_s(self, tokens: Numbers) -> Numbers:
        """All but attention over other tokens."""
        llm, size = self.llm, self.tensor_parallel_size
        per_element = llm.weight_bytes_per_element
        hidden, heads = llm.hidden_size, llm.num_heads * llm.head_dim / size
        # Beyond as many GPUs as KV heads, each computes one whole head.
        kv_heads = max(llm.num_kv_heads / size, 1) * llm.head_dim
        products = self._gemm_s(tokens, heads + 2 * kv_heads, hidden, per_element, size=1)
        products = products + self._gemm_s(tokens, hidden, heads, per_element, size=1)
        # Of many experts those are read that at least one token chose; each has its share of the tokens.
        chance = llm.num_experts_per_token / llm.num_experts
        experts = llm.num_experts * (1 - (1 - chance) ** tokens) if llm.num_experts > 1 else np.ones_like(tokens)
        each = tokens * llm.num_experts_per_token / experts
        up = (2 if llm.gated_mlp else 1) * llm.intermediate_size
        products = products + self._gemm_s(each, up, hidden, per_element, copies=experts)
        products = products + self._gemm_s(each, hidden, llm.intermediate_size, per_element, copies=experts)
        serial = self.engine.host(self.gpu).token_s * tokens * hidden
        return np.asarray(products + serial + 2 * self.all_reduce_s(tokens))

    def _gemm_s(
        self, rows: Numbers, n: float, k: float, bytes_per_element: float, copies: Any = 1.0, size: int | None = None
    ) -> Numbers:
        """Products of ``rows`` tokens with each of ``copies`` n x k matrices, divided over the group."""
        rates, size = self.rates, size or self.tensor_parallel_size
        weights = n * k * bytes_per_element / size
        read = copies * (weights + ACTIVATION_BYTES * rows * (n + k) / size)
        flops = 2 * copies * rows * n * k / size
        read_s = read / (self.gpu.memory_bandwidth_bytes_per_s * rates.memory)
        return np.asarray(rates.gemm_s + blended_max(flops / (self.gpu.flops * rates.compute), read_s, rates.blend))
