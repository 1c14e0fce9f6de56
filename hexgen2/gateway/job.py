"""One request, checked and tokenised, and what comes back for it. Frozen data."""

from dataclasses import dataclass
from enum import StrEnum

from hexgen2.engine.base import FinishReason, SampledToken, Sampling


class Operation(StrEnum):
    """As OpenTelemetry's GenAI conventions name them."""

    CHAT = "chat"
    TEXT_COMPLETION = "text_completion"


@dataclass(frozen=True, slots=True)
class Job:
    """A request that is known to be right. ``stop`` texts are the gateway's to find; engines know tokens only."""

    request_id: str
    operation: Operation
    model: str
    prompt_token_ids: tuple[int, ...]
    sampling: Sampling
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of the answer. ``text`` may lag behind ``tokens``; the last piece has a ``finish_reason``."""

    text: str
    tokens: tuple[SampledToken, ...]
    finish_reason: FinishReason | None = None
    #: The stop text that was met.
    stop_text: str | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """As OpenAI counts: an end-of-sequence token is a completion token."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class KvMoved:
    """One finished hand-off, as decode reported it."""

    num_bytes: int
    pieces: int
    transport: str
    codec: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Summary:
    """Of a whole answer. ``kv`` is None when nothing was handed over."""

    usage: Usage
    trace_id: str
    ttft_s: float
    tpot_s: float
    e2e_s: float
    prefill_replica_id: str
    decode_replica_id: str
    kv: KvMoved | None
