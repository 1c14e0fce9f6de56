"""vLLM's KV connector: the three places where the engine meets a hand-over.

In the scheduler: a request that takes over a transfer starts with its prompt's KV there (once; after a pre-emption it
is computed again), and each step is told which chunks it completes. In each worker: staged KV is written before the
step that needs it, and each layer's chunks are copied out behind that layer. vLLM's states for KV that is still on
its way are never used: a request reaches the engine when its KV is here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.distributed.utils import get_pp_indices
from vllm.model_executor.models.utils import extract_layer_index

from hexgen2.config import TlsConfig
from hexgen2.engine.vllm_env import is_cpu, leave_at_once
from hexgen2.engine.vllm_layout import DenseLayout, Layout, PackedLayout, check_exact, cpu_cache_write
from hexgen2.engine.vllm_rank import RankKv
from hexgen2.engine.vllm_sends import Load, Send, Sends
from hexgen2.errors import ConfigError
from hexgen2.kv.agent import KvAgent, count
from hexgen2.kv.choose import make_transports
from hexgen2.kv.wire import KvShape, RankSlice

#: Keys of a request's ``kv_transfer_params``: the id of the transfer to send its KV to, or to load it from.
SEND_TRANSFER = "hexgen2_send_transfer"
LOAD_TRANSFER = "hexgen2_load_transfer"
_CHUNKS_PER_SEND = 16


@dataclass(frozen=True, slots=True)
class StepTransfers(KVConnectorMetadata):
    """What one step has to do, from the scheduler to every worker."""

    sends: tuple[Send, ...] = ()
    loads: tuple[Load, ...] = ()


class HexgenConnector(KVConnectorBase_V1):
    """See the module. vLLM makes one in the scheduler and one in each worker."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        if len(kv_cache_config.kv_cache_groups) != 1:
            raise ConfigError("models with several kinds of KV cache are not supported")
        self._socket = Path(self._option("agent_socket"))
        self._block_size: int = vllm_config.cache_config.block_size
        # On a CPU a chunk is still in the cache when it is copied on; on CUDA each call launches kernels.
        self._sends = Sends(self._block_size, chunks_per_send=1 if is_cpu() else _CHUNKS_PER_SEND)
        self._new_loads: dict[str, Load] = {}
        self._loaded: set[str] = set()
        self._rank: RankKv | None = None
        self._missing_blocks: set[int] = set()

    # The scheduler's side.

    @property
    def requires_kv_delivery(self) -> bool:
        """False: the step that ends a prompt copies its KV out, so blocks freed later hold nothing that is owed."""
        return False

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """True: layers are saved one by one, which a graph of the whole model would skip."""
        return True

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """All of the prompt but its last token, once; without side effects, since vLLM may ask again."""
        if _transfer(request, LOAD_TRANSFER) is None or request.request_id in self._loaded:
            return 0, False
        return max(0, request.num_prompt_tokens - 1 - num_computed_tokens), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """The request has its blocks: note what to load or to send."""
        if (transfer_id := _transfer(request, SEND_TRANSFER)) is not None:
            self._sends.admit(request.request_id, transfer_id, request.num_prompt_tokens)
        if (transfer_id := _transfer(request, LOAD_TRANSFER)) is None:
            return
        if num_external_tokens:
            num_tokens = request.num_prompt_tokens - 1
            first_token = num_tokens - num_external_tokens
            num_blocks = -(-num_tokens // self._block_size)
            block_ids = tuple(blocks.get_block_ids()[0][:num_blocks])
            self._new_loads[request.request_id] = Load(transfer_id, block_ids, first_token, num_tokens)
            self._loaded.add(request.request_id)
        elif request.request_id in self._loaded:
            # Pre-empted: all it had, its last token excepted, is computed here again.
            count(self._socket, (("recomputed_tokens", request.num_tokens - 1),))

    def build_connector_meta(self, scheduler_output: Any) -> StepTransfers:
        """What this step loads, and which chunks it completes."""
        loads, self._new_loads = tuple(self._new_loads.values()), {}
        computed: dict[str, int] = {}
        for new in scheduler_output.scheduled_new_reqs:
            if new.req_id in self._sends:
                self._sends.replace_blocks(new.req_id, new.block_ids[0])
                computed[new.req_id] = new.num_computed_tokens
        cached = scheduler_output.scheduled_cached_reqs
        for request_id, blocks, num_computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            if request_id not in self._sends:
                continue
            computed[request_id] = num_computed
            if request_id in cached.resumed_req_ids:
                self._sends.replace_blocks(request_id, blocks[0])
            elif blocks is not None:
                self._sends.add_blocks(request_id, blocks[0])
        sends = tuple(
            send
            for request_id, num_computed in computed.items()
            for send in self._sends.advance(
                request_id, num_computed + scheduler_output.num_scheduled_tokens[request_id]
            )
        )
        return StepTransfers(sends, loads)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Forget the request; vLLM frees its blocks at once."""
        self._sends.drop(request.request_id)
        self._new_loads.pop(request.request_id, None)
        self._loaded.discard(request.request_id)
        return False, None

    # A worker's side.

    def register_kv_caches(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        """Learn the layout, start this rank's agent.

        Raises:
            ConfigError: KV memory that is not understood, a buffer that is too small, no service at the socket.
        """
        caches = {extract_layer_index(name): cache for name, cache in kv_caches.items()}
        if len(caches) != len(kv_caches):
            raise ConfigError("models with several KV caches per layer are not supported")
        shape = _kv_shape(self._vllm_config)
        rank_slice = _rank_slice(self._vllm_config, shape, caches)
        most_layers = _most_layers(self._vllm_config, shape)
        expected = (rank_slice.num_kv_heads, self._block_size, 2 * shape.head_dim, shape.dtype)
        for layer, cache in caches.items():
            found = (*cache.shape[1:], str(cache.dtype).removeprefix("torch."))
            # On CUDA a kernel's blocks may be smaller than the scheduler's.
            if (found[0], *found[2:]) != (expected[0], *expected[2:]) or self._block_size % found[1]:
                raise ConfigError(f"KV cache of layer {layer} is {found}; {expected} was expected (heads, tokens, K+V)")
        cache = next(iter(caches.values()))
        layout = self._layout(next(iter(kv_caches)), cache, shape.head_dim)
        check_exact(layout, cache, self._block_size)
        tls = self._option("tls")
        agent = KvAgent(
            self._socket,
            rank_slice,
            shape,
            make_transports(
                self._option("transport"),
                self._option("host"),
                self._option("devices"),
                tls and TlsConfig.model_validate(tls),
            ),
            device=cache.device,
            # Pages have the same numbers on all ranks: more than the fullest rank has room for would lie idle.
            send_bytes=self._option("send_bytes") * rank_slice.num_layers // most_layers,
            staging_bytes=self._option("staging_bytes") * rank_slice.num_layers // most_layers,
            landing_bytes=self._option("landing_bytes"),
            stall_s=self._option("stall_s"),
        )
        self._rank = RankKv(agent, layout, caches, self._block_size)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Write staged KV to the engine's blocks; blocks that stay without make vLLM fail their request."""
        step = self._step()
        if step.loads and self._rank is not None:
            self._missing_blocks |= self._rank.load(step.loads)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: loads are issued before the step."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Copy the chunks that this step has completed of this layer."""
        step = self._step()
        if step.sends and self._rank is not None:
            self._rank.save(extract_layer_index(layer_name), step.sends)

    def wait_for_save(self) -> None:
        """Announce what was saved; blocks may be reused from here on."""
        step = self._step()
        if (step.sends or step.loads) and self._rank is not None:
            self._rank.end_of_step()

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks whose KV did not come: vLLM ends their request with an error, so that nothing wrong is served."""
        missing, self._missing_blocks = self._missing_blocks, set()
        return missing

    def shutdown(self) -> None:
        """vLLM is stopping: stop this rank's agent."""
        if self._rank is not None:
            self._rank.close()
            self._rank = None
        leave_at_once()

    def _step(self) -> StepTransfers:
        step = self._get_connector_metadata()
        assert isinstance(step, StepTransfers)
        return step

    def _option(self, name: str) -> Any:
        return self._kv_transfer_config.kv_connector_extra_config[name]

    def _layout(self, layer_name: str, cache: torch.Tensor, head_dim: int) -> Layout:
        if cache.device.type == "cuda":
            return DenseLayout(self._block_size)
        if cache.device.type == "cpu" and cache.shape[2] == self._block_size:
            layer = self._vllm_config.compilation_config.static_forward_context[layer_name]
            return PackedLayout(cpu_cache_write(layer.isa), self._block_size, head_dim, cache.dtype)
        raise ConfigError(f"KV memory on {cache.device} in blocks of {cache.shape[2]} tokens is not supported")


def _transfer(request: Any, key: str) -> str | None:
    params = request.kv_transfer_params
    return params.get(key) if params else None


def _kv_shape(vllm_config: Any) -> KvShape:
    model = vllm_config.model_config
    return KvShape(
        num_layers=model.get_total_num_hidden_layers(),
        num_kv_heads=model.get_total_num_kv_heads(),
        head_dim=model.get_head_size(),
        dtype=str(model.dtype).removeprefix("torch."),
    )


def _most_layers(vllm_config: Any, shape: KvShape) -> int:
    """Of any stage of the pipeline."""
    size = vllm_config.parallel_config.pipeline_parallel_size
    ranges = [get_pp_indices(shape.num_layers, rank, size) for rank in range(size)]
    return max(int(stop - start) for start, stop in ranges)


def _rank_slice(vllm_config: Any, shape: KvShape, layers: Mapping[int, object]) -> RankSlice:
    parallel = vllm_config.parallel_config
    first, last = min(layers), max(layers)
    if last - first + 1 != len(layers):
        raise ConfigError(f"a rank's layers must be contiguous; this one has {sorted(layers)}")
    size = parallel.tensor_parallel_size
    tp_rank = parallel.rank % size
    return RankSlice(
        rank=parallel.rank,
        first_layer=first,
        num_layers=len(layers),
        # With more ranks than heads, consecutive ranks share one.
        first_kv_head=tp_rank * shape.num_kv_heads // size,
        num_kv_heads=max(1, shape.num_kv_heads // size),
    )
