"""A gRPC server with what every service here has: health, reflection, keepalive, limits and a two-stage stop."""

import asyncio
import math
import signal
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from hexgen2.address import check_free, format_address, parse_address, port_in_use
from hexgen2.rpc.client import MAX_MESSAGE_BYTES
from hexgen2.rpc.interceptors import ServerInterceptor
from hexgen2.rpc.tls import server_credentials
from hexgen2.security.tls import TlsFiles

_OPTIONS: tuple[tuple[str, int], ...] = (
    # Two servers on one port would share its calls at random.
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Clients ping every 10 s; by default a server hangs up on pings less than five minutes apart, and so on every call
    # that is silent for a while.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    # And a client that is gone without a word must not hold memory.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.ping_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.http2.max_pings_without_data", 0),
)

#: For the last answers to leave once their handlers have returned.
_FLUSH_S = 0.5
#: People take longer to press Ctrl-C twice.
SAME_SIGNAL_S = 0.2

log = structlog.get_logger(__name__)


class GrpcServer:
    """Life: ``add`` each service, ``start``, ``set_serving(True)`` once ready, ``stop``.

    ``interceptors`` run inside the one that traces and translates errors; ``untraced`` methods get no span.
    Of more than ``max_connections`` the last ones are closed at once, before they shake hands.
    With ``tls`` only TLS is spoken; with ``client_certs`` too only to peers with a certificate, whose roles decide what
    they may call (``hexgen2.security.callers``).
    """

    def __init__(
        self,
        listen: str,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
        *,
        untraced: frozenset[str] = frozenset(),
        tls: TlsFiles | None = None,
        client_certs: bool = True,
        max_connections: int = 1024,
    ) -> None:
        self._listen = listen
        self._tls = tls
        self._client_certs = client_certs
        self._options = (*_OPTIONS, ("grpc.max_allowed_incoming_connections", max_connections))
        self._extra = tuple(interceptors)
        self._untraced = untraced
        self._services: dict[str, Callable[[grpc.aio.Server], None]] = {}
        self._server: grpc.aio.Server | None = None
        self._stopping: asyncio.Task[None] | None = None

    def add(self, add_fn: Callable[[Any, grpc.aio.Server], None], servicer: Any, full_service_name: str) -> None:
        """Serve ``servicer``: ``add(add_GatewayServicer_to_server, servicer, "hexgen2.v1.Gateway")``."""
        self._services[full_service_name] = lambda server: add_fn(servicer, server)

    async def start(self) -> str:
        """Listen, and return host:port as really bound. Not serving by its health until ``set_serving(True)``.

        Raises:
            ConfigError: the address cannot be bound; one line with the remedy.
        """
        host, port = parse_address(self._listen, what="listen")
        if port:
            check_free(self._listen)
        certified = self._tls is not None and self._client_certs
        self._calls = ServerInterceptor(self._untraced, certified=certified)
        server = grpc.aio.server(interceptors=(self._calls, *self._extra), options=self._options)
        for add in self._services.values():
            add(server)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (*self._services, "grpc.health.v1.Health", reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        try:
            if self._tls is None:
                bound = server.add_insecure_port(self._listen)
            else:
                credentials = server_credentials(self._tls, client_certs=self._client_certs)
                bound = server.add_secure_port(self._listen, credentials)
        except RuntimeError:
            # Taken between the check and here.
            raise port_in_use(self._listen) from None
        self._server = server
        await self.set_serving(False)
        await server.start()
        return format_address(host, bound)

    async def set_serving(self, serving: bool) -> None:
        """Tell ``grpc.health.v1``, for each service and overall."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", *self._services):
            await self._health.set(name, status)

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, give running ones ``grace_s``, cancel the rest. Idempotent.

        A second call may shorten the grace of the first, also after that was cancelled.
        """
        if self._server is None:
            return
        await self._health.enter_graceful_shutdown()
        self._calls.refuse()
        flush_s: float | None = _FLUSH_S
        try:
            async with asyncio.timeout(grace_s):
                await self._calls.wait_idle()
        except TimeoutError:
            flush_s = None
        # gRPC's own stop crashes the process when it is called twice at once, and health watches would last its
        # whole grace: hence our own grace above, and one task here that every caller waits for.
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._server.stop(flush_s))
        await asyncio.shield(self._stopping)


async def run_until_signal(start: Callable[[], Awaitable[object]], drain: Callable[[], Awaitable[object]]) -> None:
    """Await ``start()``, wait for SIGTERM or SIGINT, then await ``drain()`` and return.

    A signal during ``start`` cancels it and returns; a second one during ``drain`` cancels that and returns, so
    that the caller's ``finally`` frees everything at once. After the return signals act as by default. Signals
    within ``SAME_SIGNAL_S`` of the first are the first: ``timeout`` and shells send it to the process and to its group.
    """
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None
    signalled = asyncio.Event()
    first_s = -math.inf
    stage: asyncio.Task[object] | None = None

    def on_signal(number: signal.Signals) -> None:
        nonlocal first_s
        if loop.time() - first_s < SAME_SIGNAL_S:
            return
        if not signalled.is_set():
            first_s = loop.time()
        log.info("stopping", signal=number.name, at_once=stage is not None)
        signalled.set()
        if stage is not None:
            stage.cancel()

    async def run(step: Callable[[], Awaitable[object]]) -> object:
        return await step()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    try:
        for step in (start, drain):
            stage = asyncio.create_task(run(step))
            try:
                await stage
            except asyncio.CancelledError:
                if task.cancelling():
                    raise
                return
            finally:
                stage = None
            if step is start:
                await signalled.wait()
    finally:

        def restore() -> None:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

        # The first signal's echo must not kill a process that drained faster than that.
        loop.call_later(max(0.0, first_s + SAME_SIGNAL_S - loop.time()), restore)
