"""How long a step of an engine takes: from the scheduler's cost model, or from an engine's own figures.

A step may mix parts of prompts with one token for each request in decode. Its time is told part by part: a pipeline
stage, the link to the next, the next stage ... Parts work on different steps at the same time.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from hexgen2.scheduler.cost_model import CostModel, Stages
from hexgen2.scheduler.kernels import ACTIVATION_BYTES


class Step(NamedTuple):
    """What one step computes."""

    #: Of prompts, over all of them; each times the tokens before it (which its attention reads); those that share the
    #: step with another prompt's; how many prompts.
    prompt_tokens: int
    attended: float
    shared_tokens: int
    num_prompts: int
    #: Requests in decode, the tokens that they have cached together.
    num_decoding: int
    context_tokens: float
    #: Positions whose next token is sampled.
    num_sampled: int


class StepTimes(Protocol):
    """See the module."""

    @property
    def num_parts(self) -> int:
        """How many there are."""

    def parts(self, step: Step) -> tuple[float, ...]:
        """Seconds of each."""


@dataclass(frozen=True, slots=True)
class Figures:
    """An engine of one part whose times are linear: the emulated engine's figures, or a fit to a measured one.

    ``context_token_s`` is what each cached token adds to a decode step, ``prompt_s`` what each prompt adds.
    """

    prompt_token_s: float
    step_s: float
    request_s: float
    context_token_s: float = 0.0
    attended_s: float = 0.0
    prompt_s: float = 0.0
    num_parts: int = 1

    def parts(self, step: Step) -> tuple[float, ...]:
        """See ``StepTimes``."""
        return (
            self.step_s
            + self.prompt_token_s * step.prompt_tokens
            + self.prompt_s * step.num_prompts
            + self.attended_s * step.attended
            + self.request_s * step.num_decoding
            + self.context_token_s * step.context_tokens,
        )


class _StageTimes(NamedTuple):
    """One stage: tables by number of tokens, and what is linear."""

    layers_s: list[float]
    head_s: list[float]
    prompt_fixed_s: float
    attended_s: float
    shared_token_s: float
    cached_fixed_s: float
    context_token_s: float
    launch_s: float
    request_s: float
    extra_s: float
    hop_s: float
    hop_token_s: float


class PipelineTimes:
    """Of a replica by the cost model: each stage the longer of its kernels and its host's launching."""

    def __init__(self, cost: CostModel, stages: Stages, max_tokens: int) -> None:
        self.num_parts = 2 * len(stages) - 1
        self._stages = tuple(_stage_times(cost, stages, number, max_tokens) for number in range(len(stages)))

    def parts(self, step: Step) -> tuple[float, ...]:
        """See ``StepTimes``."""
        tokens = step.prompt_tokens + step.num_decoding
        requests = step.num_prompts + step.num_decoding
        found = []
        for stage in self._stages:
            seconds = stage.layers_s[tokens]
            extra = 0.0
            if step.num_prompts:
                seconds += (
                    stage.prompt_fixed_s + stage.attended_s * step.attended + stage.shared_token_s * step.shared_tokens
                )
                extra = stage.extra_s
            if step.num_decoding:
                seconds += stage.cached_fixed_s + stage.context_token_s * step.context_tokens
            if stage.head_s:
                seconds += stage.head_s[step.num_sampled]
            host = stage.launch_s + stage.request_s * requests
            found.append((seconds if seconds > host else host) + extra)
            found.append(stage.hop_s + stage.hop_token_s * tokens)
        del found[-1]
        return tuple(found)


def _stage_times(cost: CostModel, stages: Stages, number: int, max_tokens: int) -> _StageTimes:
    """Every figure is read off the cost model's own functions, at points where one term stands alone."""
    stage, last = stages[number], number == len(stages) - 1
    kernels, host = cost.kernels(stage), cost.engine.host(cost.gpus[stage.gpu])
    counts = np.arange(max_tokens + 1, dtype=float)
    counts[0] = 1.0
    layer = kernels.decode_layer_s(counts, 0.0) - kernels.rates.cached_attention_s
    head = kernels.head_s(counts)
    head[0] = 0.0
    thousand = 1000.0
    plain = float(kernels.decode_layer_s(thousand, 0.0)) - kernels.rates.cached_attention_s
    alone = float(kernels.prefill_layer_s(thousand, 1)) - plain - kernels.rates.attention_s
    double = float(kernels.decode_layer_s(2 * thousand, 0.0)) - kernels.rates.cached_attention_s
    pair = float(kernels.prefill_layer_s(thousand, 2)) - double - kernels.rates.attention_s
    read = float(kernels.decode_layer_s(1, 1e6) - kernels.decode_layer_s(1, 0.0)) / 1e6
    layers = stage.num_layers
    return _StageTimes(
        layers_s=(layers * layer).tolist(),
        head_s=head.tolist() if last else [],
        prompt_fixed_s=layers * kernels.rates.attention_s,
        # A whole prompt of s tokens attends to s^2 / 2.
        attended_s=layers * alone / (thousand * thousand / 2),
        shared_token_s=layers * (pair - 2 * alone) / thousand,
        cached_fixed_s=layers * kernels.rates.cached_attention_s,
        context_token_s=layers * read,
        launch_s=host.step_s + host.layer_s * layers,
        request_s=host.request_s,
        extra_s=cost.engine.prefill_s if number == 0 else 0.0,
        hop_s=0.0 if last else stage.next_latency_s,
        hop_token_s=0.0 if last else cost.llm.hidden_size * ACTIVATION_BYTES / stage.next_bandwidth_bytes_per_s,
    )
