"""Bodies of OpenAI-compatible requests: the shape by pydantic, the meaning by ``limits`` and ``fields``. Pure."""

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hexgen2.errors import InvalidRequest
from hexgen2.gateway import fields
from hexgen2.gateway.limits import Wishes

#: Of messages. Tools are not served, so neither are their answers.
ROLES = ("system", "developer", "user", "assistant")


class _Body(BaseModel):
    # JSON types are meant: "5" is no number, true is no 1. What is not declared is for fields.check_others.
    model_config = ConfigDict(strict=True, extra="allow", frozen=True, allow_inf_nan=False)


class _Part(_Body):
    model_config = ConfigDict(extra="forbid")


class StreamOptions(_Part):
    """Options of ``stream: true``."""

    include_usage: bool | None = None
    #: Padding against traffic analysis: none is sent.
    include_obfuscation: bool | None = None
    continuous_usage_stats: Literal[False] | None = None


class TextPart(_Part):
    """A part of a message's content; no other kind is served."""

    type: Literal["text"]
    text: str


class Message(_Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | tuple[TextPart, ...]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates take it; text parts are joined by newlines, as vLLM joins them."""
        content = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        return {"role": self.role, "content": content} | ({"name": self.name} if self.name else {})


class JsonSchema(_Part):
    """The schema that an answer must match."""

    name: str | None = None
    description: str | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(_Part):
    """What the answer must look like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class _Request(_Body):
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | tuple[str, ...] | None = None
    stop_token_ids: tuple[int, ...] | None = None
    ignore_eos: bool | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    response_format: ResponseFormat | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop texts as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else self.stop or ()

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that has the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def wishes(self) -> Wishes:
        """Sampling as asked."""
        return Wishes(
            max_tokens=self.num_tokens,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            ignore_eos=bool(self.ignore_eos),
            stop_token_ids=self.stop_token_ids or (),
            logprobs=self.num_logprobs,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            json_schema=_json_schema(self.response_format),
        )

    @property
    def num_tokens(self) -> int | None:
        """How long the answer may be."""
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives per token; None for no logprobs."""
        raise NotImplementedError

    @property
    def names(self) -> dict[str, str]:
        """Fields that this API calls otherwise than ``Wishes`` does."""
        return {}


class CompletionRequest(_Request):
    """``POST /v1/completions``."""

    prompt: Any
    logprobs: int | None = None

    @property
    def num_logprobs(self) -> int | None:
        """See the base."""
        return self.logprobs

    def plain_prompt(self) -> str | tuple[int, ...]:
        """The prompt: text, one text in a list, token ids, or one list of token ids in a list."""
        prompt = self.prompt
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
            if len(prompt) > 1:
                raise InvalidRequest("prompt", f"has {len(prompt)} prompts; send one per request")
            prompt = prompt[0]
        if isinstance(prompt, str):
            return prompt
        if isinstance(prompt, list) and all(type(each) is int for each in prompt):
            return tuple(prompt)
        raise InvalidRequest("prompt", "must be a text or a list of token ids")


class ChatRequest(_Request):
    """``POST /v1/chat/completions``."""

    messages: Annotated[tuple[Message, ...], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    @property
    def num_logprobs(self) -> int | None:
        """See the base."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def names(self) -> dict[str, str]:
        """See the base."""
        own = {"logprobs": "top_logprobs"}
        return own if self.max_completion_tokens is None else own | {"max_tokens": "max_completion_tokens"}

    @property
    def num_tokens(self) -> int | None:
        """See the base; ``max_completion_tokens`` is the newer name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


_MESSAGE_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "reasoning": (),
    "reasoning_content": (),
    "refusal": (),
    "tool_calls": ([],),
}

_R = TypeVar("_R", bound=_Request)


def parse_completion(body: bytes) -> CompletionRequest:
    """Read a body. Raises InvalidRequest naming the field."""
    # A BOS token, where the model has one, is wanted here; in a chat the template writes it.
    return _parse(CompletionRequest, body, add_special_tokens=True)


def parse_chat(body: bytes) -> ChatRequest:
    """Read a body. Raises InvalidRequest naming the field."""
    request = _parse(ChatRequest, body, add_special_tokens=False)
    if request.top_logprobs and not request.logprobs:
        raise InvalidRequest("top_logprobs", "needs logprobs: true")
    for index, message in enumerate(request.messages):
        fields.check_others(message.model_extra or {}, _MESSAGE_NEUTRAL, f"messages[{index}].")
    return request


def _parse(model: type[_R], body: bytes, *, add_special_tokens: bool) -> _R:
    try:
        request = model.model_validate_json(body)
    except ValidationError as error:
        raise _explain(error) from None
    fields.check_others(request.model_extra or {}, fields.NEUTRAL | {"add_special_tokens": (add_special_tokens,)})
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("stream_options", "needs stream: true")
    return request


def _explain(error: ValidationError) -> InvalidRequest:
    """The most specific of pydantic's complaints, in the client's words."""
    worst = max(error.errors(include_url=False, include_context=False), key=lambda each: len(each["loc"]))
    if worst["type"] == "json_invalid":
        return InvalidRequest("body", worst["msg"])
    path = ""
    for part in worst["loc"]:
        if isinstance(part, int):
            path += f"[{part}]"
        # Pydantic also names the branch of a union.
        elif part != "str" and not part.startswith("tuple["):
            path += f".{part}" if path else part
    message = worst["msg"].replace("Input should be", "must be").replace("Field required", "is required")
    seen = "" if worst["type"] == "missing" else f", not {_shown(worst['input'])}"
    return InvalidRequest(path[:200] or "body", message + seen)


def _shown(value: Any) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."


def _json_schema(wanted: ResponseFormat | None) -> str | None:
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return "{}"
    if wanted.json_schema is None:
        raise InvalidRequest("response_format.json_schema", "is required with type json_schema")
    return json.dumps(wanted.json_schema.json_schema, separators=(",", ":"))
