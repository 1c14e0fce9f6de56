"""What a worker accepts at its edge, whoever calls: prompts and transfers of sane form."""

from collections.abc import Sequence

from hexgen2.errors import InvalidRequest
from hexgen2.v1 import types_pb2

MIN_TOKEN_BYTES = 16
MAX_ID_CHARS = 128
#: A call whose caller set no deadline ends after this.
MAX_CALL_S = 3600.0


def check_prompt(token_ids: Sequence[int], max_model_len: int, vocab_size: int) -> tuple[int, ...]:
    """The prompt, at least one token and room for one more, every id of the vocabulary."""
    if not token_ids:
        raise InvalidRequest("prompt_token_ids", "the prompt is empty")
    if len(token_ids) >= max_model_len:
        raise InvalidRequest(
            "prompt_token_ids", f"{len(token_ids)} tokens; with one output token the limit is {max_model_len}"
        )
    if max(token_ids) >= vocab_size:
        raise InvalidRequest("prompt_token_ids", f"id {max(token_ids)} is outside the vocabulary of {vocab_size}")
    return tuple(token_ids)


def check_transfer(transfer: types_pb2.Transfer) -> None:
    """An id that fits a log line and a token that cannot be guessed."""
    if not 0 < len(transfer.transfer_id) <= MAX_ID_CHARS:
        raise InvalidRequest("transfer.transfer_id", f"must have 1 to {MAX_ID_CHARS} characters")
    if len(transfer.token) < MIN_TOKEN_BYTES:
        raise InvalidRequest("transfer.token", f"{len(transfer.token)} bytes; at least {MIN_TOKEN_BYTES} are needed")


def call_timeout_s(time_remaining_s: float | None) -> float:
    """How long a call may take, by what gRPC says is left of it (None: its caller has set no deadline)."""
    return MAX_CALL_S if time_remaining_s is None else min(time_remaining_s, MAX_CALL_S)
