"""The KV of one vLLM rank: its layers' caches, how they are laid out, and the agent that moves pieces of them.

Lives in vLLM's worker process and is called from its forward thread only.
"""

from collections.abc import Iterable, Mapping
from logging import getLogger
from typing import TYPE_CHECKING

import torch

from hexgen2.engine.vllm_layout import Layout, token_slots
from hexgen2.engine.vllm_sends import Load, Send
from hexgen2.engine.vllm_stream import Inline, Ordering, SideStream

if TYPE_CHECKING:
    from hexgen2.kv.agent import KvAgent

log = getLogger(__name__)


class RankKv:
    """``caches``: global layer number -> that layer's KV memory."""

    def __init__(self, agent: "KvAgent", layout: Layout, caches: Mapping[int, torch.Tensor], block_size: int) -> None:
        self._agent = agent
        self._layout = layout
        self._caches = dict(caches)
        self._block_size = block_size
        self._device = next(iter(self._caches.values())).device
        self._ordering: Ordering = SideStream(self._device) if self._device.type == "cuda" else Inline()

    def load(self, loads: Iterable[Load]) -> set[int]:
        """Copy staged KV to the engine's blocks before a forward pass; returns the blocks that stay without."""
        missing: set[int] = set()
        for load in loads:
            if not self._load(load):
                missing.update(load.block_ids)
        return missing

    def _load(self, load: Load) -> bool:
        staged = self._agent.staged(load.transfer_id)
        if staged is None:
            # Given up since the request was scheduled; its abort is on the way to the engine.
            log.info("transfer %s is gone: nothing to load", load.transfer_id)
            return False
        complete = bool(staged.num_tokens == load.num_tokens)
        if complete:
            slots = token_slots(load.block_ids, self._block_size, load.first_token, load.num_tokens, self._device)
            for layer, cache in self._caches.items():
                self._layout.scatter(cache, slots, staged.layer(layer)[:, :, load.first_token :])
        else:
            log.error(
                "transfer %s holds %d tokens where %d are needed", load.transfer_id, staged.num_tokens, load.num_tokens
            )
        done = self._agent.loaded if complete else self._agent.not_loaded
        self._ordering.after_load(lambda: done(load.transfer_id))
        return complete

    def save(self, layer: int, sends: Iterable[Send]) -> None:
        """Copy what a step has completed of one layer to the send buffer."""
        held = [send for send in sends if self._agent.is_sending(send.transfer_id)]
        if not held:
            return
        cache = self._caches[layer]
        with self._ordering.gathering():
            for send in held:
                piece = self._layout.gather(cache, send.block_ids, send.skip, send.num_tokens)
                self._agent.put(send.transfer_id, layer, send.chunk, piece)

    def end_of_step(self) -> None:
        """Announce what was saved."""
        self._ordering.end_of_step()
        self._agent.flush()

    def close(self) -> None:
        """Stop the agent."""
        self._agent.close()
