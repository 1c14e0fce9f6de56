"""Server-sent events as a client reads them."""

import json
from typing import Any


def events(body: str) -> tuple[list[dict[str, Any]], bool]:
    """The JSON of each event, and whether the stream said that it is done."""
    lines = [line.removeprefix("data: ") for line in body.split("\n\n") if line]
    done = bool(lines) and lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[: -1 if done else None]], done


def text_of(chunks: list[dict[str, Any]]) -> str:
    """The answer that the chunks spell."""
    parts = []
    for chunk in chunks:
        for choice in chunk["choices"]:
            parts.append(choice["delta"]["content"] if "delta" in choice else choice["text"])
    return "".join(parts)
