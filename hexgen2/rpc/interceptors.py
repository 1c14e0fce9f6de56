"""What every call to a server passes: one span, log context, and the one place where errors become statuses.

A streaming handler runs inside the call's own task and is closed there, so that its span and its ``finally``
blocks see the same context whichever way the call ends.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any, NoReturn, TypeAlias, cast

import grpc
import structlog
from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from hexgen2 import metrics
from hexgen2.errors import HexgenError, Overloaded, PermissionDenied, Unavailable
from hexgen2.rpc.client import ERROR_KEY, RETRY_AFTER_KEY
from hexgen2.rpc.tls import callers_in
from hexgen2.security.callers import check_call

_PROPAGATOR = TraceContextTextMapPropagator()
#: Health checks and reflection: passed through as they are.
_PLUMBING = ("/grpc.health.", "/grpc.reflection.")

_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
# Generic in the stubs only.
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

log = structlog.get_logger(__name__)


class ServerInterceptor(grpc.aio.ServerInterceptor):
    """See the module. ``untraced``: full method names (``/package.Service/Method``) that get no span.

    ``certified``: each call is checked against the roles in its peer's certificate.
    """

    def __init__(self, untraced: frozenset[str] = frozenset(), *, certified: bool = False) -> None:
        self._untraced = untraced
        self._certified = certified
        self._refusing = False
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def refuse(self) -> None:
        """From now on new calls end at once as UNAVAILABLE; health and reflection still answer."""
        self._refusing = True

    async def wait_idle(self) -> None:
        """Return when no call is running, health watches and reflection apart."""
        await self._idle.wait()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable["_Handler | None"]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "_Handler | None":
        """Wrap the handler of unary and server-stream calls."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method.startswith(_PLUMBING):
            return handler
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(
                self._unary(method, cast("Any", handler.unary_unary)),
                handler.request_deserializer,
                handler.response_serializer,
            )
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(
                self._stream(method, cast("Any", handler.unary_stream)),
                handler.request_deserializer,
                handler.response_serializer,
            )
        raise NotImplementedError(f"{method}: only unary and server-stream calls are served")

    def _unary(self, method: str, serve: Callable[[Any, _Context], Awaitable[Any]]) -> Any:
        async def handle(request: Any, context: _Context) -> Any:
            with self._counted(), self._span(method, request, context) as span:
                try:
                    self._check(method, context)
                    return await serve(request, context)
                except BaseException as error:
                    await _end(error, span, context)

        return handle

    def _stream(self, method: str, serve: Callable[[Any, _Context], AsyncIterator[Any]]) -> Any:
        # A coroutine that writes, not a generator that yields: gRPC abandons a generator whose call was cancelled
        # between two messages, and the garbage collector then closes it in another task.
        async def handle(request: Any, context: _Context) -> None:
            with self._counted(), self._span(method, request, context) as span:
                try:
                    self._check(method, context)
                    async with aclosing(cast("Any", serve(request, context))) as responses:
                        async for response in responses:
                            await _write(context, response)
                except BaseException as error:
                    await _end(error, span, context)

        return handle

    def _check(self, method: str, context: _Context) -> None:
        if self._refusing:
            raise Unavailable("this server is stopping")
        if self._certified:
            try:
                check_call(method, callers_in(context))
            except PermissionDenied as error:
                metrics.CALLS_REFUSED.labels(method).inc()
                log.warning("call_refused", peer=context.peer(), reason=str(error))
                raise

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self._running += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    @contextmanager
    def _span(self, method: str, request: Any, context: _Context) -> Iterator[Span]:
        # The call's task has a context of its own, so what is bound here ends with the call.
        request_id = getattr(request, "request_id", "")
        if request_id:
            structlog.contextvars.bind_contextvars(request_id=request_id)
        if method in self._untraced:
            yield trace.INVALID_SPAN
            return
        service, _, name = method.removeprefix("/").partition("/")
        carrier = {str(key): str(value) for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name}
        if request_id:
            attributes["hexgen2.request_id"] = request_id
        with trace.get_tracer("hexgen2").start_as_current_span(
            f"{service}/{name}",
            context=_PROPAGATOR.extract(carrier),
            kind=SpanKind.SERVER,
            attributes=attributes,
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            yield span
            span.set_attribute("rpc.grpc.status_code", grpc.StatusCode.OK.value[0])


class _CallerGone(Exception):
    """The connection broke in the middle of a message, before gRPC cancelled the call."""


async def _write(context: _Context, response: Any) -> None:
    try:
        await context.write(response)
    except grpc.aio.InternalError as error:
        raise _CallerGone from error


async def _end(error: BaseException, span: Span, context: _Context) -> NoReturn:
    """End the call as its error says. Always raises: gRPC's AbortError, or the cancellation."""
    error = _single(error)
    if isinstance(error, _CallerGone):
        # As if the cancellation had come first: there is nobody to be told.
        span.set_attribute("rpc.cancelled", True)
        span.set_attribute("rpc.grpc.status_code", grpc.StatusCode.CANCELLED.value[0])
        raise asyncio.CancelledError from error
    if isinstance(error, asyncio.CancelledError):
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            # By the client, its deadline, or a stop whose grace is over.
            span.set_attribute("rpc.cancelled", True)
            span.set_attribute("rpc.grpc.status_code", grpc.StatusCode.CANCELLED.value[0])
            raise error
    if isinstance(error, grpc.aio.AbortError) or not isinstance(error, Exception | asyncio.CancelledError):
        raise error
    if isinstance(error, HexgenError):
        code, message = grpc.StatusCode[error.status], str(error)
        trailing: tuple[tuple[str, str], ...] = ((ERROR_KEY, type(error).__name__),)
        if isinstance(error, Overloaded):
            trailing += ((RETRY_AFTER_KEY, f"{error.retry_after_s:g}"),)
        if error.is_refusal:
            log.warning("refused", status=error.status, kind=type(error).__name__, reason=message)
    else:
        log.error("call_failed", exc_info=error)
        code, message, trailing = grpc.StatusCode.INTERNAL, "internal error; the server's log has it", ()
    span.set_attribute("rpc.grpc.status_code", code.value[0])
    span.set_attribute("error.type", type(error).__name__)
    span.set_status(Status(StatusCode.ERROR, message))
    try:
        await context.abort(code, message, trailing)
    except grpc.aio.InternalError as gone:
        # The caller left while the error was on its way to it.
        raise asyncio.CancelledError from gone


def _single(error: BaseException) -> BaseException:
    """The error that a task group wraps: its only one, or the first when all are ours."""
    while isinstance(error, BaseExceptionGroup):
        inner = error.exceptions
        if len(inner) > 1 and not all(isinstance(_single(each), HexgenError) for each in inner):
            break
        error = inner[0]
    return error
