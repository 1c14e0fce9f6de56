"""One HTTP exchange over ASGI: a bounded body in, JSON or a stream of events out, and whether the client is there."""

import asyncio
import json
from collections.abc import Coroutine, Mapping
from typing import Any

from starlette.types import Message, Receive, Send

from hexgen2.errors import HexgenError, Unauthenticated
from hexgen2.gateway.openai_response import BodyTooLarge, error_body, http_status, retry_after_s


class Reply:
    """Answers one request. ``headers`` go out with the first byte."""

    def __init__(self, send: Send, headers: Mapping[str, str]) -> None:
        self.headers = dict(headers)
        self._send = send
        self._streaming = False
        self._done = False

    async def json(self, body: Mapping[str, Any], status: int = 200) -> None:
        """The whole answer."""
        content = _dump(body)
        await self._start(status, {"content-type": "application/json", "content-length": str(len(content))})
        await self._body(content, more=False)

    async def event(self, body: Mapping[str, Any]) -> None:
        """The next server-sent event; the first one starts the stream."""
        if not self._streaming:
            self._streaming = True
            # Proxies (nginx) would hold a stream back.
            headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
            await self._start(200, {"content-type": "text/event-stream; charset=utf-8"} | headers)
        await self._body(b"data: " + _dump(body) + b"\n\n", more=True)

    async def done(self) -> None:
        """The end of a stream that is complete."""
        await self._body(b"data: [DONE]\n\n", more=False)

    async def fail(self, error: HexgenError) -> None:
        """A status while there is still one to give; else an event, and an end without ``[DONE]``."""
        if self._done:
            return
        if self._streaming:
            await self._body(b"data: " + _dump(error_body(error)) + b"\n\n", more=False)
            return
        if (seconds := retry_after_s(error)) is not None:
            self.headers["retry-after"] = str(seconds)
        self.headers |= challenge(error)
        await self.json(error_body(error), http_status(error))

    async def _start(self, status: int, headers: dict[str, str]) -> None:
        raw = [(name.encode(), value.encode("latin-1")) for name, value in (self.headers | headers).items()]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})

    async def _body(self, content: bytes, *, more: bool) -> None:
        self._done = not more
        await self._send({"type": "http.response.body", "body": content, "more_body": more})


def challenge(error: HexgenError) -> dict[str, str]:
    """The header that goes with a 401."""
    return {"www-authenticate": "Bearer"} if isinstance(error, Unauthenticated) else {}


def _dump(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


async def read_body(receive: Receive, max_bytes: int) -> bytes | None:
    """The request's body; None when the client left before its end.

    Raises:
        BodyTooLarge: as soon as there are more bytes than that; the rest is not read.
    """
    parts, num_bytes = [], 0
    while True:
        message: Message = await receive()
        if message["type"] == "http.disconnect":
            return None
        part = message.get("body", b"")
        num_bytes += len(part)
        if num_bytes > max_bytes:
            raise BodyTooLarge(f"the body has more than {max_bytes} bytes, which is the limit")
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, None]) -> bool:
    """Do the work, but cancel it when the client leaves; whether it was done. The body must have been read."""
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
            return True
        return False
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.wait((working, watching))


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
