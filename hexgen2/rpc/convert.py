"""Wire <-> domain, and the limits of what clients may ask for. Bad values raise InvalidRequest naming the field."""

import json
from collections.abc import Mapping
from math import isfinite

from hexgen2.engine.base import FinishReason, Logprob, SampledToken, Sampling
from hexgen2.errors import InvalidRequest
from hexgen2.kv.codecs import CODECS, NONE
from hexgen2.v1 import types_pb2 as pb

#: vLLM's own default and limit.
DEFAULT_MAX_TOKENS = 16
MAX_LOGPROBS = 20

_FINISH: Mapping[FinishReason | None, "pb.FinishReason.ValueType"] = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}
_FINISH_BACK = {value: key for key, value in _FINISH.items()}


def sampling_to_proto(sampling: Sampling) -> pb.SamplingParams:
    """Every value explicit."""
    return pb.SamplingParams(
        max_tokens=sampling.max_tokens,
        min_tokens=sampling.min_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=sampling.seed,
        ignore_eos=sampling.ignore_eos,
        stop_token_ids=sampling.stop_token_ids,
        logprobs=sampling.logprobs,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        json_schema=sampling.json_schema,
    )


def sampling_from_proto(message: pb.SamplingParams, default_max_tokens: int = DEFAULT_MAX_TOKENS) -> Sampling:
    """Defaults resolved and limits checked (``check_sampling``)."""
    return check_sampling(
        Sampling(
            max_tokens=message.max_tokens if message.HasField("max_tokens") else default_max_tokens,
            min_tokens=message.min_tokens,
            temperature=message.temperature if message.HasField("temperature") else 1.0,
            top_p=message.top_p if message.HasField("top_p") else 1.0,
            top_k=message.top_k,
            seed=message.seed if message.HasField("seed") else None,
            ignore_eos=message.ignore_eos,
            stop_token_ids=tuple(message.stop_token_ids),
            logprobs=message.logprobs if message.HasField("logprobs") else None,
            min_p=message.min_p,
            presence_penalty=message.presence_penalty,
            frequency_penalty=message.frequency_penalty,
            repetition_penalty=message.repetition_penalty if message.HasField("repetition_penalty") else 1.0,
            json_schema=message.json_schema if message.HasField("json_schema") else None,
        )
    )


def check_sampling(sampling: Sampling, prefix: str = "sampling.") -> Sampling:
    """The same sampling, once it is within vLLM's limits. ``prefix`` goes before the field in errors.

    Raises:
        InvalidRequest: the first field outside its limits.
    """

    def require(valid: bool, field: str, limit: str) -> None:
        if not valid:
            raise InvalidRequest(prefix + field, f"{getattr(sampling, field)!r} is not {limit}")

    require(1 <= sampling.max_tokens < 1 << 31, "max_tokens", "from 1 to 2147483647")
    require(sampling.min_tokens >= 0, "min_tokens", "at least 0")
    require(
        sampling.min_tokens <= sampling.max_tokens, "min_tokens", f"at most max_tokens, which is {sampling.max_tokens}"
    )
    require(isfinite(sampling.temperature) and sampling.temperature >= 0, "temperature", "a number of at least 0")
    require(0 < sampling.top_p <= 1, "top_p", "in (0, 1]")
    require(-1 <= sampling.top_k < 1 << 31, "top_k", "from 1 to 2147483647, or 0 or -1 for all tokens")
    require(sampling.seed is None or 0 <= sampling.seed < 1 << 63, "seed", "from 0 to 2**63 - 1")
    require(all(0 <= each < 1 << 32 for each in sampling.stop_token_ids), "stop_token_ids", "a list of token ids")
    require(
        sampling.logprobs is None or 0 <= sampling.logprobs <= MAX_LOGPROBS,
        "logprobs",
        f"from 0 to {MAX_LOGPROBS}",
    )
    require(0 <= sampling.min_p <= 1, "min_p", "in [0, 1]")
    require(-2 <= sampling.presence_penalty <= 2, "presence_penalty", "in [-2, 2]")
    require(-2 <= sampling.frequency_penalty <= 2, "frequency_penalty", "in [-2, 2]")
    require(
        isfinite(sampling.repetition_penalty) and sampling.repetition_penalty > 0,
        "repetition_penalty",
        "a number above 0",
    )
    if sampling.json_schema is not None and not _is_json_object(sampling.json_schema):
        raise InvalidRequest(prefix + "json_schema", "is not a JSON object")
    return sampling


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def token_to_proto(token: SampledToken) -> pb.Token:
    """One sampled token."""
    return pb.Token(
        token_id=token.token_id,
        logprob=token.logprob,
        top_logprobs=[pb.TokenLogprob(token_id=t.token_id, logprob=t.logprob, rank=t.rank) for t in token.top],
    )


def token_from_proto(message: pb.Token) -> SampledToken:
    """One sampled token."""
    return SampledToken(
        token_id=message.token_id,
        logprob=message.logprob if message.HasField("logprob") else None,
        top=tuple(Logprob(t.token_id, t.logprob, t.rank) for t in message.top_logprobs),
    )


def finish_to_proto(reason: FinishReason | None) -> "pb.FinishReason.ValueType":
    """None is UNSPECIFIED: the answer goes on."""
    return _FINISH[reason]


def finish_from_proto(value: "pb.FinishReason.ValueType") -> FinishReason | None:
    """UNSPECIFIED is None."""
    if value not in _FINISH_BACK:
        raise InvalidRequest("finish_reason", f"unknown value {value}")
    return _FINISH_BACK[value]


def codec_from_proto(name: str, field: str) -> str:
    """A known codec; "none" where the sender has said nothing."""
    if name and name not in CODECS:
        raise InvalidRequest(field, f"{name[:80]!r} is not one of {', '.join(CODECS)}")
    return name or NONE
