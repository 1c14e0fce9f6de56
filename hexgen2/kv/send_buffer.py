"""The memory that KV leaves from: pages outside the engine's blocks, held by transfers. One lock per transfer orders
the engine's writes before the release of its pages."""

from dataclasses import dataclass, field
from functools import lru_cache
from threading import Lock

import torch

from hexgen2.kv.host_memory import buffer
from hexgen2.kv.pieces import PieceFormat
from hexgen2.kv.quantise import Coder
from hexgen2.kv.wire import PageLayout, chunk_span, num_chunks


@dataclass(slots=True)
class _Send:
    format: PieceFormat
    num_tokens: int
    pages: tuple[int, ...]
    lock: Lock = field(default_factory=Lock)
    open: bool = True


class SendBuffer:
    """``buffer`` is one registered ``uint8`` tensor of ``num_pages`` pages on the engine's device."""

    def __init__(self, layout: PageLayout, num_bytes: int, device: torch.device) -> None:
        self.layout = layout
        self.num_pages = num_bytes // layout.page_bytes
        self.buffer = buffer(self.num_pages * layout.page_bytes, device)
        self._address = self.buffer.data_ptr()
        self._sends: dict[str, _Send] = {}
        # The forward thread's: it alone calls ``put``.
        self._make_coder = lru_cache(maxsize=8)(Coder)

    @property
    def num_open(self) -> int:
        """Transfers that hold pages."""
        return len(self._sends)

    def __contains__(self, transfer_id: str) -> bool:
        return transfer_id in self._sends

    def open(self, transfer_id: str, token: bytes, num_tokens: int, codec: str, pages: tuple[int, ...]) -> None:
        """Hold ``pages``, one per chunk; each has room for the raw KV, whatever the codec."""
        piece_format = PieceFormat(token, codec, self.layout.shape, self.buffer.device, self._make_coder)
        self._sends[transfer_id] = _Send(piece_format, num_tokens, pages)

    def close(self, transfer_id: str) -> None:
        """Let the pages go; when it returns, no ``put`` of this transfer writes any more."""
        send = self._sends.pop(transfer_id, None)
        if send is not None:
            with send.lock:
                send.open = False

    def put(self, transfer_id: str, layer: int, chunk: int, piece: torch.Tensor) -> torch.Tensor | None:
        """Write one layer of consecutive chunks, ``[kv_head, 2, tokens, head_dim]``, ``chunk`` the first.

        Returns:
            Their digests, chunk by chunk, ``int64[chunk * kv_head]``. None when the transfer is not held (any more).
        """
        send = self._sends.get(transfer_id)
        if send is None:
            return None
        with send.lock:
            if not send.open:
                return None
            first_head = self.layout.slice.first_kv_head
            pages = send.pages[chunk : chunk + num_chunks(piece.shape[2])]
            places = [page * self.layout.page_bytes + self.layout.piece_offset(layer) for page in pages]
            to = [self._address + place for place in places]
            digests = send.format.gather(to, piece, layer=layer, chunk=chunk, first_head=first_head)
            if digests is not None:
                return digests
            heads = self.layout.slice.num_kv_heads
            written = []
            for number, at in enumerate(places):
                start, stop = chunk_span(number, piece.shape[2])
                per_head = send.format.head_bytes(stop - start)
                encoded = self.buffer[at : at + heads * per_head].view(heads, per_head)
                part, where = piece[:, :, start:stop], {"layer": layer, "chunk": chunk + number}
                written.append(send.format.write(encoded, part, **where, first_head=first_head))
            return written[0] if len(written) == 1 else torch.cat(written)
