"""What changes in a request's sampling where prefill hands over to decode after the first token. Pure.

Decode's engine takes the first token for prompt, so everything it counts from the first output token is off by one
unless it is dealt with here; what cannot be dealt with (``Sampling.needs_history``) is served colocated.
"""

from dataclasses import replace
from hashlib import sha256

from hexgen2.engine.base import FinishReason, Sampling


def derive_seed(seed: int, position: int) -> int:
    """A seed for sampling from output ``position`` on; 63 bits. Both phases are then reproducible by themselves."""
    digest = sha256(seed.to_bytes(8, "little", signed=False) + position.to_bytes(4, "little")).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def for_prefill(sampling: Sampling) -> Sampling:
    """The first token only."""
    return replace(
        sampling,
        max_tokens=1,
        min_tokens=min(sampling.min_tokens, 1),
        seed=None if sampling.seed is None else derive_seed(sampling.seed, 0),
    )


def for_decode(sampling: Sampling) -> Sampling:
    """All tokens after the first."""
    return replace(
        sampling,
        max_tokens=sampling.max_tokens - 1,
        min_tokens=max(sampling.min_tokens - 1, 0),
        seed=None if sampling.seed is None else derive_seed(sampling.seed, 1),
    )


def first_token_finish(sampling: Sampling, engine_finish: FinishReason | None) -> FinishReason | None:
    """Whether the first token ends the answer, and why. The engine itself always stops there, for length."""
    if engine_finish is FinishReason.STOP:
        return FinishReason.STOP
    return FinishReason.LENGTH if sampling.max_tokens == 1 else None
