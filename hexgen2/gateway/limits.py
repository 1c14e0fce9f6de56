"""What a request may ask for: one set of limits for gRPC and HTTP. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from hexgen2.engine.base import Sampling
from hexgen2.errors import InvalidRequest
from hexgen2.plan import Replica, Role
from hexgen2.rpc.convert import DEFAULT_MAX_TOKENS, check_sampling

MAX_TEMPERATURE = 2.0
#: OpenAI allows 4 and vLLM any number.
MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 128
#: An absurdly long number is cut short.
MAX_MESSAGE_CHARS = 300

__all__ = ["DEFAULT_MAX_TOKENS", "ModelLimits", "Wishes", "check_prompt", "check_stops", "resolve"]


@dataclass(frozen=True, slots=True)
class Wishes:
    """Sampling as the client asked for it; None where it did not."""

    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    json_schema: str | None = None


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What the served model brings. ``max_model_len`` bounds prompt and answer together, ``max_prompt_tokens`` a prompt
    that may be handed over; 0: nothing else does.
    """

    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    sampling_defaults: Mapping[str, float]
    max_prompt_tokens: int = 0


def max_prompt_tokens(replica: Replica) -> int:
    """Of a prompt that this replica can hand over, or take; 0: any."""
    if replica.role is Role.COLOCATED:
        return 0
    if replica.role is Role.DECODE:
        return replica.staging_tokens
    # It makes the first token of the answer, and no more of it.
    return min(replica.max_model_len - 1, replica.send_tokens or replica.max_model_len)


def check_prompt(token_ids: tuple[int, ...], model: ModelLimits, field: str) -> None:
    """Raise InvalidRequest unless the prompt has tokens, all of the vocabulary, and leaves room for an answer."""
    if not token_ids:
        raise InvalidRequest(field, "must not be empty")
    if len(token_ids) >= model.max_model_len:
        raise InvalidRequest(
            field,
            f"has {len(token_ids)} tokens; the limit is {model.max_model_len - 1}, "
            f"one less than the context of {model.max_model_len} tokens that prompt and answer share",
        )
    if 0 < model.max_prompt_tokens < len(token_ids):
        raise InvalidRequest(
            field,
            f"has {len(token_ids)} tokens; the limit is {model.max_prompt_tokens}, "
            "which is what the replicas' memory for KV holds of one that is handed over",
        )
    bad = next((i for i in token_ids if not 0 <= i < model.vocab_size), None)
    if bad is not None:
        raise InvalidRequest(field, f"token id {bad} is not in 0..{model.vocab_size - 1}")


def check_stops(stops: tuple[str, ...]) -> tuple[str, ...]:
    """The stop texts. Raises InvalidRequest when there are too many, or one is empty or too long."""
    if len(stops) > MAX_STOPS:
        raise InvalidRequest("stop", f"has {len(stops)} texts; the limit is {MAX_STOPS}")
    for stop in stops:
        if not 1 <= len(stop) <= MAX_STOP_CHARS:
            raise InvalidRequest("stop", f"each text has 1 to {MAX_STOP_CHARS} characters, one has {len(stop)}")
    return stops


def resolve(
    wishes: Wishes,
    model: ModelLimits,
    *,
    prompt_tokens: int,
    default_max_tokens: int | None,
    prefix: str = "",
    names: Mapping[str, str] | None = None,
) -> Sampling:
    """Every default filled in and every limit checked.

    Args:
        wishes: what the client asked for.
        model: what the model brings.
        prompt_tokens: length of the prompt, already checked.
        default_max_tokens: None for all that the context leaves.
        prefix: of field names in errors, e.g. ``sampling.``.
        names: of fields that the client wrote by another name.

    Raises:
        InvalidRequest: naming field, value and limit.
    """
    room = model.max_model_len - prompt_tokens
    sampling = _filled_in(wishes, model, room if default_max_tokens is None else min(default_max_tokens, room))
    try:
        check_sampling(sampling, prefix="")
        _check_model(sampling, model, room, prompt_tokens)
    except InvalidRequest as error:
        field, message = error.field, str(error).removeprefix(f"{error.field}: ")
        raise InvalidRequest(prefix + (names or {}).get(field, field), message[:MAX_MESSAGE_CHARS]) from None
    # 0 and -1 both mean all tokens; the model's own ends come after the client's.
    eos_token_ids = () if wishes.ignore_eos else model.eos_token_ids
    stop_token_ids = tuple(dict.fromkeys(sampling.stop_token_ids + eos_token_ids))
    return replace(sampling, top_k=max(sampling.top_k, 0), stop_token_ids=stop_token_ids)


def _filled_in(wishes: Wishes, model: ModelLimits, max_tokens: int) -> Sampling:
    def default(value: float | None, field: str, neutral: float) -> float:
        return model.sampling_defaults.get(field, neutral) if value is None else value

    return Sampling(
        max_tokens=max_tokens if wishes.max_tokens is None else wishes.max_tokens,
        min_tokens=wishes.min_tokens or 0,
        temperature=default(wishes.temperature, "temperature", 1.0),
        top_p=default(wishes.top_p, "top_p", 1.0),
        top_k=int(default(wishes.top_k, "top_k", 0)),
        seed=wishes.seed,
        ignore_eos=wishes.ignore_eos,
        stop_token_ids=wishes.stop_token_ids,
        logprobs=wishes.logprobs,
        min_p=default(wishes.min_p, "min_p", 0.0),
        presence_penalty=wishes.presence_penalty or 0.0,
        frequency_penalty=wishes.frequency_penalty or 0.0,
        repetition_penalty=default(wishes.repetition_penalty, "repetition_penalty", 1.0),
        json_schema=wishes.json_schema,
    )


def _check_model(sampling: Sampling, model: ModelLimits, room: int, prompt_tokens: int) -> None:
    if sampling.temperature > MAX_TEMPERATURE:
        raise InvalidRequest("temperature", f"{sampling.temperature:g} is not in [0, {MAX_TEMPERATURE:g}]")
    if sampling.max_tokens > room:
        raise InvalidRequest(
            "max_tokens",
            f"{sampling.max_tokens} and a prompt of {prompt_tokens} tokens exceed the context of "
            f"{model.max_model_len} tokens; at most {room} fit",
        )
    ids = sampling.stop_token_ids
    if len(ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequest("stop_token_ids", f"has {len(ids)} ids; the limit is {MAX_STOP_TOKEN_IDS}")
    bad = next((i for i in ids if i >= model.vocab_size), None)
    if bad is not None:
        raise InvalidRequest("stop_token_ids", f"token id {bad} is not in 0..{model.vocab_size - 1}")
