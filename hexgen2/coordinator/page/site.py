"""The page over HTTP: three files and the state, to be read and nothing else.

It is rendered at most once a second, however many look. It speaks plain HTTP without a key, as metrics do: what it
shows is no secret to who may see the fleet, and its address is the network's to guard.
"""

import asyncio
import ipaddress
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from time import monotonic

import msgspec
from starlette.types import Receive, Scope, Send

from hexgen2.address import is_loopback, parse_address
from hexgen2.coordinator.page.html import page
from hexgen2.coordinator.page.trend import EVERY_S, Trends
from hexgen2.coordinator.page.view import Fleet, view
from hexgen2.errors import ConfigError
from hexgen2.web.guard import Limits
from hexgen2.web.server import HttpServer
from hexgen2.worker.aio import owned

#: How long a rendering is given to whoever asks.
FRESH_S = 1.0
#: Of the page: people look at it, and not thousands of them.
LIMITS = Limits(max_connections=64, head_timeout_s=5.0, unread_timeout_s=10.0)

#: Nothing from elsewhere, no script or style but our two files, in nobody's frame.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}

_FOLDER = files("hexgen2.coordinator.page")
_FILES = {"/page.js": "text/javascript; charset=utf-8", "/page.css": "text/css; charset=utf-8"}


@dataclass(frozen=True, slots=True)
class Answer:
    """What one request gets."""

    status: int
    kind: str
    body: bytes
    #: Beside ``HEADERS``.
    headers: Mapping[str, str] = field(default_factory=dict)


class Site:
    """Answers of the page's paths. ``look`` says what the fleet is now, ``clock`` is for how old a rendering is.

    ``names``: only for who asks for this machine by one of these, or by an address, as its own people do. A name of
    somebody else's that leads here comes from a page elsewhere, which would read this one (DNS rebinding). None: any.
    """

    def __init__(
        self,
        look: Callable[[], Fleet],
        clock: Callable[[], float] = monotonic,
        *,
        names: frozenset[str] | None = None,
    ) -> None:
        self._look = look
        self._names = names
        self._clock = clock
        self._trends = Trends()
        self._files = {path: (_FOLDER / path.removeprefix("/")).read_bytes() for path in _FILES}
        self._rendered: dict[str, tuple[float, bytes]] = {}

    def answer(self, method: str, path: str) -> Answer:
        """To a request for ``path``. To HEAD the same as to GET; the body is the caller's to leave out."""
        if method not in ("GET", "HEAD"):
            return Answer(405, "text/plain", b"this page is read only\n", {"allow": "GET, HEAD"})
        if path == "/":
            return Answer(200, "text/html; charset=utf-8", self._fresh(path, self._page))
        if path == "/state.json":
            return Answer(200, "application/json", self._fresh(path, self._state))
        if path in self._files:
            return Answer(200, _FILES[path], self._files[path])
        return Answer(404, "text/plain", b"no such page\n")

    async def sample(self) -> None:
        """Take a point of each trend from time to time, until cancelled."""
        while True:
            self._trends.add(view(self._look()))
            await asyncio.sleep(EVERY_S)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, by ASGI."""
        if scope["type"] != "http":
            # No WebSocket is opened.
            return
        host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        if self._names is not None and not _is_among(host, self._names):
            told = f"this page answers to {', '.join(sorted(self._names))}, or an address (page_names)\n"
            found = Answer(421, "text/plain", told.encode())
        else:
            found = self.answer(scope["method"], scope["path"])
        headers = {**HEADERS, **found.headers, "content-type": found.kind, "content-length": str(len(found.body))}
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": found.status, "headers": raw})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else found.body})

    def _fresh(self, path: str, render: Callable[[], bytes]) -> bytes:
        now_s = self._clock()
        made_s, body = self._rendered.get(path, (0.0, b""))
        if not body or now_s - made_s >= FRESH_S:
            body = render()
            self._rendered[path] = now_s, body
        return body

    def _page(self) -> bytes:
        return page(view(self._look()), self._trends.all()).encode()

    def _state(self) -> bytes:
        return msgspec.json.encode(view(self._look()))


def _is_among(host: str, names: frozenset[str]) -> bool:
    """Whether a Host header (with a port or without) is one of ``names`` or an IP address."""
    try:
        name, _ = parse_address(host)
    except ConfigError:
        name = host.strip("[]")
    if name.lower() in names:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


@asynccontextmanager
async def page_served(
    listen: str, look: Callable[[], Fleet], limits: Limits = LIMITS, *, names: str = ""
) -> AsyncIterator[str]:
    """The page on ``listen`` (host:port, port 0 for any) for the length of a block; none when that is empty.
    ``names`` that it answers to, with commas between: by default ``localhost`` on loopback, and any elsewhere.

    Yields the address, or "".

    Raises:
        ConfigError: the address cannot be bound.
    """
    if not listen:
        yield ""
        return
    host, _ = parse_address(listen, what="page_listen")
    known = frozenset(name.strip().lower() for name in names.split(",") if name.strip())
    if not known and is_loopback(host):
        known = frozenset({"localhost"})
    site = Site(look, names=known or None)
    server = HttpServer(site, listen, limits=limits, what="page_listen")
    try:
        address = await server.start()
        async with owned(site.sample()):
            yield address
    finally:
        await server.stop()
