"""What an engine is to the services. Two implementations: ``vllm.VllmEngine`` and ``emulated.EmulatedEngine``.

An engine speaks tokens only. Its KV agents (one per rank) live where its memory lives and talk to the service
over a local socket (``kv.ranks``); the engine learns of a transfer by its id alone.
"""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, runtime_checkable

from hexgen2.batching import Limits
from hexgen2.model import ModelSpec


class FinishReason(StrEnum):
    """Why an answer ended, in OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen; every default resolved. Field names and meaning are vLLM's."""

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    json_schema: str | None = None

    @property
    def needs_history(self) -> bool:
        """Whether the choice of a token depends on output tokens before it, so that the request is served colocated."""
        return bool(
            self.presence_penalty
            or self.frequency_penalty
            or self.repetition_penalty != 1.0
            or self.json_schema is not None
        )


@dataclass(frozen=True, slots=True)
class Logprob:
    """One candidate for a token; ``rank`` 1 is the most likely."""

    token_id: int
    logprob: float
    rank: int


@dataclass(frozen=True, slots=True)
class SampledToken:
    """One output token; ``logprob`` and ``top`` are set when logprobs were asked for."""

    token_id: int
    logprob: float | None = None
    top: tuple[Logprob, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One request to one engine.

    ``send_transfer``: copy the prompt's KV to the send buffer of this transfer, layer by layer, as it is made.
    ``load_transfer``: before the first step, load the KV of the first ``len(prompt_token_ids) - 1`` tokens
    from this transfer's staging. Never both.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: Sampling
    send_transfer: str | None = None
    load_transfer: str | None = None
    trace_headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class EngineOutput:
    """New tokens of a request; the last output has a ``finish_reason``."""

    tokens: tuple[SampledToken, ...]
    finish_reason: FinishReason | None = None
    #: Prompt tokens taken from KV that was there (prefix cache or loaded), not computed.
    cached_tokens: int = 0


class Engine(Protocol):
    """See the module. ``start`` returns when requests can be served and every rank's agent has said hello."""

    model: ModelSpec
    max_model_len: int

    async def start(self) -> None:
        """Load the model. Raises EngineFailed with the reason in one line."""

    def generate(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        """Run one request. Closing the iterator aborts it in the engine.

        Raises:
            InvalidRequest: a parameter the engine cannot serve.
            EngineFailed: the engine died or failed this request.
        """

    async def check_health(self) -> None:
        """Raise EngineFailed when the engine is dead."""

    def num_requests(self) -> tuple[int, int]:
        """Requests running and waiting."""

    async def stop(self) -> None:
        """Free everything. Idempotent."""


@runtime_checkable
class Adaptable(Protocol):
    """An engine whose limits may change while it runs."""

    @property
    def bounds(self) -> tuple[Limits, Limits]:
        """The least that is of any use, and what it was built for."""

    def limit(self, limits: Limits) -> None:
        """From the next step on work on no more than this at once; what runs already goes on."""

    def num_requests(self) -> tuple[int, int]:
        """Requests running and waiting."""
