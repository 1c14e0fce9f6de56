"""The OpenAI-compatible HTTP API."""

import json
import re
import time
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import Any, TypeVar
from uuid import uuid4

import structlog
from opentelemetry import trace
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from hexgen2.errors import HexgenError
from hexgen2.gateway import jobs, observe
from hexgen2.gateway.gateway import Gateway
from hexgen2.gateway.job import Job, Operation, Piece
from hexgen2.gateway.keys import max_body_bytes
from hexgen2.gateway.openai_request import ChatRequest, CompletionRequest, parse_chat, parse_completion
from hexgen2.gateway.openai_response import BodyTooLarge, Format, error_body, http_status
from services.gateway.http_exchange import Reply, challenge, read_body, unless_gone

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")

log = structlog.get_logger(__name__)

_R = TypeVar("_R", ChatRequest, CompletionRequest)


class GenerationEndpoint:
    """``POST`` of a generation: an ASGI app, so that a client that leaves is noticed at every step."""

    def __init__(
        self,
        gateway: Gateway,
        operation: Operation,
        parse: Callable[[bytes], _R],
        make_job: Callable[[Gateway, _R], Awaitable[Job]],
    ) -> None:
        self._gateway = gateway
        self._operation = operation
        self._parse: Callable[[bytes], Any] = parse
        self._make_job: Callable[[Gateway, Any], Awaitable[Job]] = make_job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request. The one place where errors become HTTP statuses."""
        headers = Headers(scope=scope)
        request_id = headers.get("x-request-id", "")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = uuid4().hex
        reply = Reply(send, {"x-request-id": request_id})
        try:
            with structlog.contextvars.bound_contextvars(request_id=request_id):
                await self._serve(headers, receive, reply)
        except HexgenError as error:
            await reply.fail(error)
        except Exception:
            log.exception("request_failed", request_id=request_id)
            await reply.fail(HexgenError("internal error; the server's log has it"))

    async def _serve(self, headers: Headers, receive: Receive, reply: Reply) -> None:
        watch = observe.Stopwatch()
        config = self._gateway.config
        with (
            observe.request_span(self._operation, headers) as span,
            self._gateway.keys.admitted(headers.get("authorization")) as key,
            self._gateway.admitted(),
        ):
            observe.describe_key(span, key)
            span.set_attribute("hexgen2.request_id", reply.headers["x-request-id"])
            if trace_id := observe.trace_id(span):
                reply.headers["x-trace-id"] = trace_id
            max_bytes = max_body_bytes(key, config.max_body_bytes)
            _check_length(headers, max_bytes)
            deadline = monotonic() + config.request_timeout_s
            async with observe.within(deadline, watch):
                body = await read_body(receive, max_bytes)
            if body is None or not await unless_gone(receive, self._answer(body, reply, watch, deadline)):
                trace.get_current_span().set_attribute("hexgen2.client_left", True)

    async def _answer(self, body: bytes, reply: Reply, watch: observe.Stopwatch, deadline: float) -> None:
        request = self._parse(body)
        job = await self._make_job(self._gateway, request)
        answer = Format(job, self._gateway.text, int(time.time()), include_usage=request.include_usage)
        if not request.stream:
            pieces: list[Piece] = []

            async def keep(piece: Piece) -> None:
                pieces.append(piece)

            summary = await self._gateway.generate(job, keep, watch, deadline)
            await reply.json(answer.whole(pieces, summary.usage))
            return

        async def send(piece: Piece) -> None:
            await reply.event(answer.chunk(piece))

        summary = await self._gateway.generate(job, send, watch, deadline)
        if request.include_usage:
            await reply.event(answer.usage_chunk(summary.usage))
        await reply.done()


def _check_length(headers: Headers, max_bytes: int) -> None:
    """Refuse by the announced length already."""
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length) > max_bytes:
        raise BodyTooLarge(f"the body has {length[:20]} bytes; the limit is {max_bytes}")


def make_app(gateway: Gateway) -> ASGIApp:
    """The whole API over a gateway."""
    created = int(time.time())

    def card() -> dict[str, Any]:
        name = gateway.model_name
        try:
            max_model_len = gateway.limits().max_model_len
        except HexgenError:
            max_model_len = None
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "hexgen2",
            "root": name,
            "max_model_len": max_model_len,
        }

    async def models(request: Request) -> Response:
        gateway.keys.check(request.headers.get("authorization"))
        return JSONResponse({"object": "list", "data": [card()]})

    async def model(request: Request) -> Response:
        gateway.keys.check(request.headers.get("authorization"))
        gateway.check_model(request.path_params["name"])
        return JSONResponse(card())

    async def health(_: Request) -> Response:
        if gateway.ready():
            return JSONResponse({"status": "ok"})
        reason = "stopping" if gateway.draining else "no replica is ready"
        return JSONResponse({"status": reason}, 503, {"retry-after": "1"})

    async def metrics(request: Request) -> Response:
        gateway.keys.check(request.headers.get("authorization"))
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    chat = GenerationEndpoint(gateway, Operation.CHAT, parse_chat, jobs.from_chat)
    completions = GenerationEndpoint(gateway, Operation.TEXT_COMPLETION, parse_completion, jobs.from_completion)
    return Starlette(
        routes=[
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/health", health),
            Route("/metrics", metrics),
        ],
        exception_handlers={HTTPException: _http_error, HexgenError: _our_error},
    )


async def _http_error(request: Request, error: Exception) -> Response:
    """No such path, or not with that method."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:200]}: {error.detail}"
    body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}
    return Response(json.dumps(body), error.status_code, error.headers, "application/json")


async def _our_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HexgenError)
    return JSONResponse(error_body(error), http_status(error), challenge(error))
