"""Decides which token chunks of which requests a step of vLLM completes, and where their blocks are. Pure.

Lives in vLLM's scheduler process. A chunk is sent in the step that computes its last token, so sending overlaps the
rest of prefill; chunks that were found in the prefix cache go with the request's first step.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from hexgen2.kv.wire import CHUNK_TOKENS, complete_chunks


@dataclass(frozen=True, slots=True)
class Send:
    """Consecutive chunks, ``chunk`` the first, to gather after each layer of this step: ``num_tokens`` tokens, ``skip``
    tokens into ``block_ids``."""

    transfer_id: str
    chunk: int
    block_ids: tuple[int, ...]
    skip: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Load:
    """KV to write before this step: tokens ``first_token`` to ``num_tokens`` (excluded) of a request's blocks."""

    transfer_id: str
    block_ids: tuple[int, ...]
    first_token: int
    num_tokens: int


@dataclass(slots=True)
class _Progress:
    transfer_id: str
    num_prompt_tokens: int
    block_ids: list[int] = field(default_factory=list)
    num_sent: int = 0


class Sends:
    """Progress of every request whose KV is sent.

    A chunk is sent once. When vLLM pre-empts a request, it recomputes the same KV into other blocks: what was sent
    stays good, and the rest is sent from the new blocks.
    """

    def __init__(self, block_size: int, chunks_per_send: int = 1) -> None:
        self._block_size = block_size
        self._chunks_per_send = chunks_per_send
        self._requests: dict[str, _Progress] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def __len__(self) -> int:
        return len(self._requests)

    def admit(self, request_id: str, transfer_id: str, num_prompt_tokens: int) -> None:
        """A request was given blocks; again after a pre-emption."""
        self._requests.setdefault(request_id, _Progress(transfer_id, num_prompt_tokens))

    def replace_blocks(self, request_id: str, block_ids: Sequence[int]) -> None:
        """All blocks of a request that is new or resumed."""
        self._requests[request_id].block_ids = list(block_ids)

    def add_blocks(self, request_id: str, block_ids: Sequence[int]) -> None:
        """Further blocks of a running request."""
        self._requests[request_id].block_ids += block_ids

    def advance(self, request_id: str, num_computed: int) -> tuple[Send, ...]:
        """What to send in the step after which ``num_computed`` tokens of the request are computed."""
        request = self._requests[request_id]
        complete = complete_chunks(num_computed, request.num_prompt_tokens)
        first, request.num_sent = request.num_sent, max(request.num_sent, complete)
        steps = range(first, complete, self._chunks_per_send)
        return tuple(self._send(request, chunk, min(chunk + self._chunks_per_send, complete)) for chunk in steps)

    def drop(self, request_id: str) -> None:
        """The request is over, or was never sent."""
        self._requests.pop(request_id, None)

    def _send(self, request: _Progress, chunk: int, end: int) -> Send:
        start, stop = chunk * CHUNK_TOKENS, min(end * CHUNK_TOKENS, request.num_prompt_tokens)
        first, last = start // self._block_size, -(-stop // self._block_size)
        return Send(
            transfer_id=request.transfer_id,
            chunk=chunk,
            block_ids=tuple(request.block_ids[first:last]),
            skip=start - first * self._block_size,
            num_tokens=stop - start,
        )
