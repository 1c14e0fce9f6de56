"""Short ways to ask a house for a completion."""

from typing import Any

from tests.gateway.house import House
from tests.gateway.sse import events, text_of

PATH = "/v1/completions"
BODY = {"prompt": "x", "max_tokens": 20}


async def ask(made: House, **changes: Any) -> tuple[int, dict[str, Any]]:
    response = await made.http.post(PATH, json=BODY | changes)
    return response.status_code, response.json()


async def ask_stream(made: House) -> tuple[str, bool, dict[str, Any] | None]:
    """The text, whether it ended well, and the error it ended with: in the stream, or as a status before its first."""
    response = await made.http.post(PATH, json=BODY | {"stream": True})
    if response.status_code != 200:
        return "", False, response.json()["error"]
    chunks, done = events(response.text)
    error = chunks.pop()["error"] if "error" in chunks[-1] else None
    return text_of(chunks), done, error


def answer_of(body: dict[str, Any]) -> str:
    return str(body["choices"][0]["text"])
