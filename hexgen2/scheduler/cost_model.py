"""Costs of one replica: seconds of its steps, bytes of weights and KV, requests per second.

A replica is a row of pipeline stages, each a tensor-parallel group of one GPU type (paper, section 3.2). A stage's step
takes the longer of its GPUs' kernels and its host's launching of them. Pure; answers are kept by composition.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from hexgen2.cluster import GpuType
from hexgen2.llm import Llm
from hexgen2.scheduler.efficiency import Efficiency, Engine, efficiency, engine
from hexgen2.scheduler.kernels import ACTIVATION_BYTES, Kernels
from hexgen2.scheduler.pools import SPARE_TOKENS
from hexgen2.scheduler.rates import Figures, Rate, Rates
from hexgen2.scheduler.stages import Stage as Stage
from hexgen2.scheduler.stages import Stages as Stages
from hexgen2.workload import Workload

#: Of the driver's memory an engine may use so much, as vLLM's ``gpu_memory_utilization`` has it.
MEMORY_UTILIZATION = 0.9
#: CUDA context, activations and graphs, per GPU.
OVERHEAD_BYTES = 1_000_000_000
#: Registered memory of the KV hand-off per GPU (``KvConfig``: staging and landing, or the send buffer).
STAGING_BYTES = 320 << 20


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
        self._kernels: dict[tuple[str, int, float, float], Kernels] = {}
        self._rates = Rates(self)

    def prefill_s(self, stages: Stages, prompt_tokens: float, batch: int = 1) -> float:
        """Seconds from the start of a step with ``batch`` prompts to their first tokens, all stages in turn."""
        through = self._through_s(
            stages, batch, prompt_tokens * batch, lambda k: k.prefill_layer_s(prompt_tokens, batch)
        )
        return through + self.engine.prefill_s

    def decode_step_s(self, stages: Stages, batch: int, context_tokens: float) -> float:
        """Seconds of one token for each of ``batch`` requests with ``context_tokens`` cached, all stages in turn."""
        return self._through_s(stages, batch, batch, lambda k: k.decode_layer_s(batch, context_tokens))

    def _through_s(self, stages: Stages, batch: int, num_tokens: float, layer_s: Callable[[Kernels], Any]) -> float:
        """Seconds of one step through all stages in turn; ``num_tokens`` move from each to the next."""
        total = 0.0
        for number, stage in enumerate(stages):
            kernels = self.kernels(stage)
            gpu = stage.num_layers * float(layer_s(kernels))
            if number == len(stages) - 1:
                gpu += float(kernels.head_s(batch))
            total += max(gpu, self._host_s(stage, batch)) + self._hop_s(stages, number, num_tokens)
        return total

    def kernels(self, stage: Stage) -> Kernels:
        """Times of one layer on a stage's GPUs."""
        key = (stage.gpu, stage.tensor_parallel_size, stage.tp_bandwidth_bytes_per_s, stage.tp_latency_s)
        found = self._kernels.get(key)
        if found is None:
            found = self._kernels[key] = Kernels(
                self.llm,
                self.gpus[stage.gpu],
                self._efficiencies[stage.gpu],
                self.engine,
                stage.tensor_parallel_size,
                stage.tp_bandwidth_bytes_per_s,
                stage.tp_latency_s,
            )
        return found

    def shared_tokens(self, stages: Stages) -> int:
        """Tokens of whole prompts that share a step at ``prefill_rate``; 0: sharing does not pay."""
        return self._rates.of(stages).shared_tokens

    def codec_s(self, gpu: str, tensor_parallel_size: int, num_layers: int) -> float:
        """Seconds of a stage for writing, or reading, a mean prompt's KV in a codec: so many passes over memory."""
        share = min(tensor_parallel_size, self.llm.num_kv_heads)
        size = num_layers * self.llm.kv_bytes_per_token_layer * self.workload.mean_prompt_tokens / share
        bandwidth = self.gpus[gpu].memory_bandwidth_bytes_per_s * self._efficiencies[gpu].memory
        return size * self.engine.codec_passes / bandwidth

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
        return self._rates.of(stages).kv_tokens

    def fits(self, stages: Stages) -> bool:
        """Whether weights and the longest request of the workload fit."""
        return self.kv_tokens(stages) >= self.workload.longest_tokens + SPARE_TOKENS

    def max_batch(self, stages: Stages) -> int:
        """Requests of mean context whose KV fits at once; 0 when the model does not fit."""
        return int(self.kv_tokens(stages) / self.workload.mean_context_tokens) if self.fits(stages) else 0

    def prefill_latency_s(self, stages: Stages) -> float:
        """Mean seconds to the first token of a request that is alone."""
        return self._rates.of(stages).latency_s

    def prefill_rate(self, stages: Stages) -> float:
        """Prompts per second: one over the mean time that the busiest stage, or link between stages, gives to one.

        The mean of the time over the lengths, never the time of the mean length. 0 where the model, or the longest
        prompt in the engine and in the send buffer, does not fit.
        """
        return self._rates.of(stages).prefill_rps

    def decode_rate(self, stages: Stages) -> Rate:
        """The highest rate of whole answers within memory and the workload's limit of time per token; 0 if none is."""
        return self._rates.of(stages).decode

    def colocated_rate(self, stages: Stages) -> Rate:
        """The same of a replica that does both phases: see `Rates`."""
        return self._rates.of(stages).colocated

    def figures(self, rows: Sequence[Stages]) -> list[Figures]:
        """All of these for many replicas at once, much faster than one after the other."""
        return self._rates.of_all(rows)

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


def even_stages(llm: Llm, gpu: GpuType, tensor_parallel_size: int = 1, pipeline_parallel_size: int = 1) -> Stages:
    """Stages of one GPU type in one machine, layers spread evenly, the type's own link between all."""
    bandwidth, latency = gpu.link_bandwidth_bytes_per_s, gpu.link_latency_s
    fewest, more = divmod(llm.num_layers, pipeline_parallel_size)
    return tuple(
        Stage(gpu.name, tensor_parallel_size, fewest + (n < more), bandwidth, latency, bandwidth, latency)
        for n in range(pipeline_parallel_size)
    )
