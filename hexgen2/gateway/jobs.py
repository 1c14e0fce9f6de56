"""From a client's request, by either API, to a ``Job``: limits checked, prompt tokenised."""

from collections.abc import Mapping
from uuid import uuid4

from hexgen2.engine.base import Sampling
from hexgen2.errors import InvalidRequest
from hexgen2.gateway.gateway import Gateway
from hexgen2.gateway.job import Job, Operation
from hexgen2.gateway.limits import DEFAULT_MAX_TOKENS, Wishes, check_prompt, check_stops, resolve
from hexgen2.gateway.openai_request import ROLES, ChatRequest, CompletionRequest
from hexgen2.v1 import gateway_pb2, types_pb2


async def from_completion(gateway: Gateway, request: CompletionRequest) -> Job:
    """Raises HexgenError when it cannot be served as asked."""
    gateway.check_model(request.model)
    prompt = request.plain_prompt()
    token_ids = await gateway.encode(prompt, "prompt") if isinstance(prompt, str) else prompt
    return _job(
        gateway,
        Operation.TEXT_COMPLETION,
        token_ids,
        request.wishes(),
        request.stops,
        request_id=f"cmpl-{uuid4().hex}",
        prompt_field="prompt",
        names=request.names,
    )


async def from_chat(gateway: Gateway, request: ChatRequest) -> Job:
    """Raises HexgenError when it cannot be served as asked."""
    gateway.check_model(request.model)
    return _job(
        gateway,
        Operation.CHAT,
        await gateway.encode_chat([message.plain() for message in request.messages]),
        request.wishes(),
        request.stops,
        request_id=f"chatcmpl-{uuid4().hex}",
        prompt_field="messages",
        names=request.names,
    )


async def from_grpc(gateway: Gateway, request: gateway_pb2.GenerateRequest) -> Job:
    """Raises HexgenError when it cannot be served as asked."""
    gateway.check_model(request.model)
    kind = request.WhichOneof("input")
    operation = Operation.CHAT if kind == "chat" else Operation.TEXT_COMPLETION
    match kind:
        case "prompt":
            token_ids = await gateway.encode(request.prompt, "prompt")
        case "chat":
            token_ids = await gateway.encode_chat(_messages(request.chat))
        case "prompt_token_ids":
            token_ids = tuple(request.prompt_token_ids.ids)
        case _:
            raise InvalidRequest("input", "one of prompt, chat and prompt_token_ids is required")
    return _job(
        gateway,
        operation,
        token_ids,
        wishes_from_proto(request.sampling),
        tuple(request.stop),
        request_id=f"gen-{uuid4().hex}",
        prompt_field=kind,
        prefix="sampling.",
    )


def wishes_from_proto(message: types_pb2.SamplingParams) -> Wishes:
    """Sampling as asked; a field that is not set is None."""
    asked = {field.name for field, _ in message.ListFields()}
    return Wishes(
        max_tokens=message.max_tokens if "max_tokens" in asked else None,
        min_tokens=message.min_tokens,
        temperature=message.temperature if "temperature" in asked else None,
        top_p=message.top_p if "top_p" in asked else None,
        top_k=message.top_k if "top_k" in asked else None,
        seed=message.seed if "seed" in asked else None,
        ignore_eos=message.ignore_eos,
        stop_token_ids=tuple(message.stop_token_ids),
        logprobs=message.logprobs if "logprobs" in asked else None,
        min_p=message.min_p if "min_p" in asked else None,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        repetition_penalty=message.repetition_penalty if "repetition_penalty" in asked else None,
        json_schema=message.json_schema if "json_schema" in asked else None,
    )


def _messages(chat: gateway_pb2.Chat) -> list[dict[str, str]]:
    if not chat.messages:
        raise InvalidRequest("chat.messages", "must not be empty")
    for index, message in enumerate(chat.messages):
        if message.role not in ROLES:
            raise InvalidRequest(
                f"chat.messages[{index}].role", f"must be one of {', '.join(ROLES)}, not {message.role[:60]!r}"
            )
    return [{"role": message.role, "content": message.content} for message in chat.messages]


def _job(
    gateway: Gateway,
    operation: Operation,
    token_ids: tuple[int, ...],
    wishes: Wishes,
    stops: tuple[str, ...],
    *,
    request_id: str,
    prompt_field: str,
    prefix: str = "",
    names: Mapping[str, str] | None = None,
) -> Job:
    model = gateway.limits()
    check_prompt(token_ids, model, prompt_field)
    sampling: Sampling = resolve(
        wishes,
        model,
        prompt_tokens=len(token_ids),
        default_max_tokens=None if operation is Operation.CHAT else DEFAULT_MAX_TOKENS,
        prefix=prefix,
        names=names,
    )
    return Job(request_id, operation, gateway.model_name, token_ids, sampling, check_stops(stops))
