"""SKELETON (being implemented): the KV agent of one rank. This is its interface to engines."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hexgen2.kv.wire import KvShape, RankSlice

if TYPE_CHECKING:
    import torch

    from hexgen2.kv.transport import Transport


class StagedKv:
    """Verified KV of one transfer, as this rank needs it, in private memory."""

    num_tokens: int

    def layer(self, layer: int) -> "torch.Tensor":
        """``[kv_head, 2 (K, V), token, head_dim]`` of one (global) layer, this rank's heads, all ``num_tokens`` tokens."""
        raise NotImplementedError


class KvAgent:
    """Lives in the process that owns the engine's KV memory. One thread of its own; see module.

    Engine side (called from the engine's forward thread; never blocks on a network or a peer)::

        agent.is_sending(transfer_id) -> bool
        agent.put(transfer_id, layer, chunk, piece)      # piece: [kv_head, 2, tokens_in_chunk, head_dim]
        agent.flush()                                    # end of a forward pass: announce what was put
        agent.staged(transfer_id) -> StagedKv | None     # None: aborted meanwhile; load nothing
        agent.loaded(transfer_id)                        # its KV is in the engine's blocks; staging may be freed
    """

    def __init__(
        self,
        socket_path: Path,
        rank_slice: RankSlice,
        shape: KvShape,
        transport: "Transport",
        *,
        device: "torch.device",
        send_bytes: int,
        staging_bytes: int,
        landing_bytes: int,
    ) -> None:
        """Allocate buffers on ``device``, register them, connect to the service at ``socket_path`` and start the thread."""

    def is_sending(self, transfer_id: str) -> bool:
        """Whether a send buffer is held for the transfer. False once it was aborted: skip the work."""
        raise NotImplementedError

    def put(self, transfer_id: str, layer: int, chunk: int, piece: "torch.Tensor") -> None:
        """Copy one piece to the send buffer and digest it. ``layer`` is global. Unknown transfers are ignored."""
        raise NotImplementedError

    def flush(self) -> None:
        """Announce everything put so far (``put`` announces by itself once enough bytes wait)."""
        raise NotImplementedError

    def staged(self, transfer_id: str) -> StagedKv | None:
        """The verified KV to load, or None when the transfer was aborted."""
        raise NotImplementedError

    def loaded(self, transfer_id: str) -> None:
        """Tell the service that the KV is in the engine's own blocks."""
        raise NotImplementedError

    def close(self) -> None:
        """Stop the thread and free the buffers. Idempotent."""
        raise NotImplementedError


def count(socket_path: Path, counters: Sequence[tuple[str, int]]) -> None:
    """From the scheduler's process: add to the service's counters, e.g. ``("recomputed_tokens", 130)``."""
    raise NotImplementedError
