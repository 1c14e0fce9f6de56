"""uvicorn in the event loop of the process, which keeps its signals to itself."""

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from hexgen2.address import check_free, format_address, parse_address, port_in_use
from hexgen2.security.handshakes import counted
from hexgen2.security.tls import TlsFiles
from hexgen2.security.tls_context import https_context
from hexgen2.web.guard import Doorway, Guard, Limits, guarded


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals stop the whole process, in order; see ``rpc.server.run_until_signal``."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Tell when connections are served."""
        await super().startup(sockets)
        self.up.set()


class HttpServer:
    """Life: ``start``, then ``stop``. Use as the owner of one app's listening socket.

    With ``tls`` it speaks HTTPS; with ``client_certs`` too only to clients with a certificate. ``what`` is the field
    that ``listen`` comes from.
    """

    def __init__(
        self,
        app: ASGIApp,
        listen: str,
        tls: TlsFiles | None = None,
        *,
        client_certs: bool = False,
        limits: Limits = Limits(),  # noqa: B008, it is frozen
        what: str = "http_listen",
    ) -> None:
        self._app = app
        self._listen = listen
        self._what = what
        self._tls = tls
        self._client_certs = client_certs
        self._limits = limits
        self._server: _Server | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> str:
        """Listen, and return host:port as really bound.

        Raises:
            ConfigError: the address cannot be bound; one line with the remedy.
        """
        host, port = parse_address(self._listen, what=self._what)
        if port:
            check_free(self._listen, what=self._what)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = Doorway(family, socket.SOCK_STREAM)
        guard = listening.guard = Guard(self._limits)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((host, port))
            listening.listen(1024)
        except OSError:
            listening.close()
            # Taken between the check and here.
            raise port_in_use(self._listen) from None
        config = uvicorn.Config(
            self._app,
            http=guarded(guard),
            lifespan="off",
            log_config=None,
            access_log=False,
            log_level="warning",
            server_header=False,
            timeout_graceful_shutdown=1,
        )
        config.load()
        if self._tls is not None:
            context = https_context(self._tls, client_certs=self._client_certs)
            config.ssl = counted(context, "https", self._limits.head_timeout_s)
        server = self._server = _Server(config)
        self._task = asyncio.create_task(server.serve([listening]))
        await server.up.wait()
        return format_address(host, listening.getsockname()[1])

    async def stop(self) -> None:
        """Close connections that are idle at once, others after a second. Idempotent."""
        if self._server is None or self._task is None:
            return
        self._server.should_exit = True
        await self._task
        self._server = self._task = None
