"""Stream an answer over the OpenAI-compatible API: ``python examples/http_stream.py [URL] [PROMPT]``."""

import asyncio
import json
import os
import sys

import httpx


async def main(url: str = "http://127.0.0.1:8000", prompt: str = "What is the capital of France?") -> None:
    """Server-sent events, one a token: ``data: {...}``, and ``data: [DONE]`` after the last one."""
    key = os.environ.get("HEXGEN2_API_KEY", "")
    async with httpx.AsyncClient(base_url=url, headers={"authorization": f"Bearer {key}"} if key else {}) as http:
        body = {
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": 32,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        async with http.stream("POST", "/v1/chat/completions", json=body, timeout=60) as answer:
            if answer.is_error:
                await answer.aread()
                raise SystemExit(f"{answer.status_code}: {answer.json()['error']['message']}")
            async for line in answer.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                for choice in chunk["choices"]:
                    print(choice["delta"].get("content") or "", end="", flush=True)
                if chunk.get("usage"):
                    print(f"\n{chunk['usage']['completion_tokens']} tokens")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
