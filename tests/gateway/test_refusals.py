"""Bad input over HTTP: a clear error that names the field, nothing reaches a worker, and the next request works."""

import json
from pathlib import Path
from typing import Any

from tests.gateway.house import MODEL, house

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": MODEL, "prompt": "hi"}
HUGE = 10**400

BAD_SAMPLING: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 63}, "max_tokens"),
    ({"max_tokens": HUGE}, "max_tokens"),
    ({"max_tokens": 5.5}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": HUGE}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.01}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": HUGE}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**63}, "seed"),
    ({"presence_penalty": 2.5}, "presence_penalty"),
    ({"frequency_penalty": -2.5}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", ""]}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": "a" * 1025}, "stop"),
    ({"stop": 7}, "stop"),
    ({"stop": ["a", 7]}, "stop[1]"),
    ({"stop_token_ids": [259]}, "stop_token_ids"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"stop_token_ids": [1] * 129}, "stop_token_ids"),
    ({"ignore_eos": "yes"}, "ignore_eos"),
    ({"n": 2}, "n"),
    ({"n": True}, "n"),
    ({"best_of": 2}, "best_of"),
    ({"echo": True}, "echo"),
    ({"suffix": "x"}, "suffix"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"prompt_logprobs": 1}, "prompt_logprobs"),
    ({"max_token": 5}, "max_token"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usages": True}}, "stream_options.include_usages"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}}, "response_format.json_schema.schema"),
]
BAD_TEXT: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [""]}, "prompt"),
    ({"prompt": ["a", "b"]}, "prompt"),
    ({"prompt": [[1], [2]]}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [1, True]}, "prompt"),
    ({"prompt": [1, -1]}, "prompt"),
    ({"prompt": [1, 259]}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": "x" * 64}, "prompt"),
    ({"prompt": "x" * 100_000}, "prompt"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"add_special_tokens": False}, "add_special_tokens"),
]
BAD_CHAT: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content[0].type",
    ),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
    ({"messages": [{"role": "user", "content": "x" * 100}]}, "messages"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_completion_tokens": 100}, "max_completion_tokens"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
    ({"top_logprobs": 1}, "top_logprobs"),
    ({"logprobs": 1}, "logprobs"),
    ({"add_special_tokens": True}, "add_special_tokens"),
]


async def test_values_outside_their_limits_are_refused_by_name(folder: Path) -> None:
    cases = [("/v1/completions", TEXT | bad, field) for bad, field in BAD_SAMPLING + BAD_TEXT]
    cases += [("/v1/chat/completions", CHAT | bad, field) for bad, field in BAD_SAMPLING + BAD_CHAT]
    async with house(folder) as made:
        made.answers("ok")
        wrong: list[tuple[object, ...]] = []
        for path, body, field in cases:
            response = await made.http.post(path, content=json.dumps(body))
            error = response.json().get("error", {})
            if (response.status_code, error.get("param"), error.get("type")) != (400, field, "invalid_request_error"):
                wrong.append((path, str(body)[:120], response.status_code, error))
            elif len(error["message"]) > 500 or field not in error["message"]:
                wrong.append((path, str(body)[:120], "message", error))
        assert wrong == []
        assert made.prefills[0].calls == made.decodes[0].calls == []
        assert (await made.http.post("/v1/completions", json=TEXT)).status_code == 200


MALFORMED = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'"x"',
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "x", "temperature": NaN}',
    b'{"prompt": "x", "temperature": 1e999}',
    b'{"prompt": "x", "user": ' + b"9" * 5000 + b"}",
]


async def test_malformed_json_is_refused(folder: Path) -> None:
    async with house(folder) as made:
        for path in ("/v1/completions", "/v1/chat/completions"):
            for content in MALFORMED:
                response = await made.http.post(path, content=content)
                assert response.status_code == 400, content[:40]
                assert response.json()["error"]["type"] == "invalid_request_error"
        assert made.prefills[0].calls == []


async def test_an_unknown_model_is_404(folder: Path) -> None:
    async with house(folder) as made:
        for path, body in (("/v1/completions", TEXT), ("/v1/chat/completions", CHAT)):
            response = await made.http.post(path, json=body | {"model": "gpt-9"})
            assert response.status_code == 404
            assert response.json()["error"]["code"] == "model_not_found"
            assert "'tiny'" in response.json()["error"]["message"]


async def test_a_body_that_is_too_large_is_413_announced_or_not(folder: Path) -> None:
    async with house(folder, max_body_bytes=2048) as made:
        body = json.dumps(TEXT | {"user": "x" * 5000}).encode()

        async def in_parts() -> Any:
            for start in range(0, len(body), 1000):
                yield body[start : start + 1000]

        for content in (body, in_parts()):
            response = await made.http.post("/v1/completions", content=content)
            assert response.status_code == 413
            assert "2048" in response.json()["error"]["message"]


async def test_paths_and_methods_that_are_not_served(folder: Path) -> None:
    async with house(folder) as made:
        for method, path, status in (("GET", "/v1/completions", 405), ("POST", "/v1/embeddings", 404)):
            response = await made.http.request(method, path)
            assert response.status_code == status
            assert path in response.json()["error"]["message"]


async def test_harmless_and_neutral_fields_are_accepted(folder: Path) -> None:
    harmless: dict[str, Any] = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "n": 1,
        "logit_bias": None,
        "tools": [],
        "tool_choice": "none",
        "parallel_tool_calls": True,
        "response_format": {"type": "text"},
        "length_penalty": 1.0,
        "service_tier": "auto",
        "stop": None,
        "seed": None,
    }
    async with house(folder) as made:
        made.answers("ok")
        response = await made.http.post("/v1/chat/completions", json=CHAT | harmless)
        assert response.status_code == 200, response.text


async def test_an_absurd_request_id_is_replaced(folder: Path) -> None:
    async with house(folder) as made:
        made.answers("ok")
        response = await made.http.post("/v1/completions", json=TEXT, headers={"x-request-id": "a b" * 100})
        assert len(response.headers["x-request-id"]) == 32
