"""Short ways to ask a house for a completion."""

import asyncio
from typing import Any

from tests.gateway.house import House
from tests.gateway.sse import events, text_of

PATH = "/v1/completions"
BODY = {"prompt": "x", "max_tokens": 20}


async def ask(made: House, **changes: Any) -> tuple[int, dict[str, Any]]:
    response = await made.http.post(PATH, json=BODY | changes)
    return response.status_code, response.json()


async def ask_stream(made: House, heard: asyncio.Event | None = None) -> tuple[str, bool, dict[str, Any] | None]:
    """The text, whether it ended well, and the error it ended with: in the stream, or as a status before its first.

    ``heard`` is set once something of the answer is here.
    """
    async with made.http.stream("POST", PATH, json=BODY | {"stream": True}) as response:
        if response.status_code != 200:
            await response.aread()
            return "", False, response.json()["error"]
        body = ""
        async for part in response.aiter_text():
            body += part
            if heard is not None and "data: " in body:
                heard.set()
    chunks, done = events(body)
    error = chunks.pop()["error"] if "error" in chunks[-1] else None
    return text_of(chunks), done, error


def answer_of(body: dict[str, Any]) -> str:
    return str(body["choices"][0]["text"])
