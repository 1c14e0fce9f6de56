"""Bodies of OpenAI-compatible answers, whole and in chunks, and of errors. Pure."""

import math
from collections.abc import Sequence
from typing import Any

from hexgen2.engine.base import SampledToken
from hexgen2.errors import HexgenError, InvalidRequest, LimitExceeded, ModelNotFound, Overloaded, Unauthenticated
from hexgen2.gateway.job import Job, Operation, Piece, Usage
from hexgen2.text.tokenizer import TextModel

#: JSON has no minus infinity; vLLM's stand-in.
_LOWEST_LOGPROB = -9999.0

_HTTP_STATUS = {
    "INVALID_ARGUMENT": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "FAILED_PRECONDITION": 400,
    "NOT_FOUND": 404,
    "RESOURCE_EXHAUSTED": 503,
    "UNAVAILABLE": 503,
    "ABORTED": 503,
    "DEADLINE_EXCEEDED": 504,
}
_TYPES = {
    **dict.fromkeys((400, 413), "invalid_request_error"),
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    504: "timeout_error",
}
_CODES = {ModelNotFound: "model_not_found", Unauthenticated: "invalid_api_key", LimitExceeded: "rate_limit_exceeded"}


class BodyTooLarge(HexgenError):
    """More bytes than ``max_body_bytes``."""

    status = "INVALID_ARGUMENT"


class Format:
    """Writes one answer. ``created`` is seconds since the epoch."""

    def __init__(self, job: Job, text: TextModel, created: int, *, include_usage: bool = False) -> None:
        self._job = job
        self._text = text
        self._created = created
        self._include_usage = include_usage
        self._chat = job.operation is Operation.CHAT
        self._offset = 0
        self._begun = False

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> dict[str, Any]:
        """The answer in one body."""
        text = "".join(piece.text for piece in pieces)
        tokens = tuple(token for piece in pieces for token in piece.tokens)
        content = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        kind = "chat.completion" if self._chat else "text_completion"
        return self._body(kind, [self._choice(content, tokens, pieces[-1])]) | {"usage": usage_body(usage)}

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """The next part of a stream."""
        content: dict[str, Any] = {"text": piece.text}
        if self._chat:
            # One chunk per step of the engine, the first included: clients measure gaps between chunks.
            role = {} if self._begun else {"role": "assistant"}
            content = {"delta": role | {"content": piece.text}}
        self._begun = True
        return self._part([self._choice(content, piece.tokens, piece)])

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """The last part of a stream whose client asked for it."""
        return self._part([]) | {"usage": usage_body(usage)}

    def _part(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        body = self._body("chat.completion.chunk" if self._chat else "text_completion", choices)
        return body | {"usage": None} if self._include_usage else body

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._job.request_id,
            "object": kind,
            "created": self._created,
            "model": self._job.model,
            "choices": choices,
        }

    def _choice(self, content: dict[str, Any], tokens: Sequence[SampledToken], last: Piece) -> dict[str, Any]:
        logprobs = None
        if self._job.sampling.logprobs is not None:
            logprobs = self._chat_logprobs(tokens) if self._chat else self._completion_logprobs(tokens)
        return {
            "index": 0,
            **content,
            "logprobs": logprobs,
            "finish_reason": last.finish_reason,
            # vLLM's addition: which stop text it was.
            "stop_reason": last.stop_text,
        }

    def _chat_logprobs(self, tokens: Sequence[SampledToken]) -> dict[str, Any]:
        return {
            "content": [
                self._entry(token.token_id, token.logprob)
                | {"top_logprobs": [self._entry(token_id, logprob) for token_id, logprob in self._top(token)]}
                for token in tokens
            ]
        }

    def _entry(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        text = self._text.token_bytes(token_id)
        return {"token": _decoded(text), "logprob": _finite(logprob), "bytes": list(text)}

    def _completion_logprobs(self, tokens: Sequence[SampledToken]) -> dict[str, Any]:
        names = [self._name(token.token_id) for token in tokens]
        offsets = []
        for name in names:
            offsets.append(self._offset)
            self._offset += len(name)
        return {
            "tokens": names,
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            "top_logprobs": [
                {self._name(token.token_id): _finite(token.logprob)}
                | {self._name(token_id): _finite(logprob) for token_id, logprob in self._top(token)}
                for token in tokens
            ],
            "text_offset": offsets,
        }

    def _name(self, token_id: int) -> str:
        return _decoded(self._text.token_bytes(token_id))

    def _top(self, token: SampledToken) -> list[tuple[int, float]]:
        """The most likely alternatives, as many as asked for; engines may add the sampled token to theirs."""
        best = sorted(token.top, key=lambda each: each.rank)
        return [(each.token_id, each.logprob) for each in best[: self._job.sampling.logprobs or 0]]


def _decoded(text: bytes) -> str:
    return text.decode("utf-8", errors="replace")


def _finite(logprob: float | None) -> float:
    return max(logprob, _LOWEST_LOGPROB) if logprob is not None and not math.isnan(logprob) else _LOWEST_LOGPROB


def usage_body(usage: Usage) -> dict[str, Any]:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def http_status(error: HexgenError) -> int:
    """The HTTP status of an error."""
    if isinstance(error, LimitExceeded):
        return 429
    return 413 if isinstance(error, BodyTooLarge) else _HTTP_STATUS.get(error.status, 500)


def retry_after_s(error: HexgenError) -> int | None:
    """Whole seconds for Retry-After, where trying again later may help."""
    if isinstance(error, Overloaded):
        return max(1, math.ceil(error.retry_after_s))
    return 1 if http_status(error) == 503 else None


def error_body(error: HexgenError) -> dict[str, Any]:
    """OpenAI's error object."""
    status = http_status(error)
    default = "service_unavailable_error" if status == 503 else "server_error"
    return {
        "error": {
            "message": str(error),
            "type": _TYPES.get(status, default),
            "param": error.field if isinstance(error, InvalidRequest) else None,
            "code": _CODES.get(type(error)),
        }
    }
