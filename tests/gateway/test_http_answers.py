"""Answers over HTTP: whole and streamed, and how they end."""

import json
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from hexgen2.rpc.convert import sampling_from_proto
from hexgen2.v1 import decode_pb2, types_pb2
from tests.gateway.house import EOS, LENGTH, MODEL, STOP, House, first_token, house, rest, verified
from tests.gateway.sse import events, text_of

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}


async def stream(made: House, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The chunks of a stream that ended well."""
    response = await made.http.post(path, json=body | {"stream": True})
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks, done = events(response.text)
    assert done
    return chunks


async def test_a_chat_is_answered_by_prefill_and_decode(folder: Path) -> None:
    async with house(folder) as made:
        made.answers("Paris.", cached=5)
        response = await made.http.post("/v1/chat/completions", json=CHAT)
        body = response.json()
        assert response.status_code == 200
        assert body["object"] == "chat.completion"
        assert body["choices"][0]["message"] == {"role": "assistant", "content": "Paris."}
        assert body["choices"][0]["finish_reason"] == "stop"
        prompt_tokens = body["usage"]["prompt_tokens"]
        assert body["usage"] == {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": 7,
            "total_tokens": prompt_tokens + 7,
            "prompt_tokens_details": {"cached_tokens": 5},
        }
        (prefill,), (decode,) = made.prefills[0].calls, made.decodes[0].calls
        # Once decode has verified the KV, prefill may free it.
        assert await prefill.ended()
        assert prefill.request.hand_over
        assert prefill.request.plan_epoch == 7
        assert prefill.request.transfer == decode.request.remote_kv.transfer
        assert len(prefill.request.transfer.token) == 32
        assert decode.request.remote_kv.prefill_address == made.prefills[0].address
        assert list(prefill.request.prompt_token_ids) == list(decode.request.prompt_token_ids)
        assert len(prefill.request.prompt_token_ids) == prompt_tokens
        assert list(decode.request.sampling.stop_token_ids) == [EOS]
        # The rest of the context is the answer's.
        assert decode.request.sampling.max_tokens == 64 - prompt_tokens


async def test_a_chat_is_streamed_one_chunk_per_token(folder: Path) -> None:
    async with house(folder) as made:
        made.answers("Paris.")
        chunks = await stream(made, "/v1/chat/completions", CHAT | {"stream_options": {"include_usage": True}})
        assert text_of(chunks) == "Paris."
        assert [chunk["choices"][0]["delta"].get("role") for chunk in chunks[:-1]] == ["assistant", *[None] * 6]
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [*[None] * 6, "stop"]
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"]["completion_tokens"] == 7
        assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
        assert len({chunk["id"] for chunk in chunks}) == 1


@pytest.mark.parametrize("prompt", ["hi", ["hi"], None])
async def test_a_completion_takes_text_or_token_ids(folder: Path, prompt: Any) -> None:
    async with house(folder) as made:
        made.answers("ok", eos=False)
        prompt = prompt or [made.ids("hi")]
        response = await made.http.post("/v1/completions", json={"prompt": prompt})
        assert response.json()["choices"][0]["text"] == "ok"
        assert response.json()["choices"][0]["finish_reason"] == "length"
        request = made.decodes[0].calls[0].request
        assert list(request.prompt_token_ids) == made.ids("hi")
        assert request.sampling.max_tokens == 16


async def test_sampling_reaches_both_workers_as_the_client_meant_it(folder: Path) -> None:
    async with house(folder) as made:
        made.answers("ok")
        asked = {
            "max_tokens": 9,
            "min_tokens": 2,
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 40,
            "seed": 11,
            "ignore_eos": True,
            "stop_token_ids": [70],
            "min_p": 0.1,
        }
        neutral = {"n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "echo": False}
        made.decodes[0].script = rest(made.ids("k"), LENGTH)
        response = await made.http.post("/v1/completions", json={"prompt": "x"} | asked | neutral | {"user": "me"})
        assert response.status_code == 200, response.text
        for worker in (*made.prefills, *made.decodes):
            sampling = sampling_from_proto(worker.calls[0].request.sampling)
            assert {name: getattr(sampling, name) for name in asked} == asked | {"stop_token_ids": (70,)}


async def test_one_token_needs_no_decode(folder: Path) -> None:
    async with house(folder) as made:
        made.answers("P")
        body = (await made.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1})).json()
        assert body["choices"][0]["text"] == "P"
        assert body["choices"][0]["finish_reason"] == "length"
        assert not made.prefills[0].calls[0].request.hand_over
        assert made.decodes[0].calls == []


async def test_an_answer_that_is_over_before_it_began(folder: Path) -> None:
    async with house(folder) as made:
        made.prefills[0].script = first_token(EOS, STOP)
        chunks = await stream(made, "/v1/chat/completions", CHAT)
        assert text_of(chunks) == ""
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
        assert await made.decodes[0].calls[0].ended()


@pytest.mark.parametrize(
    ("stop", "text", "shown"),
    [
        (["a"], "abcd", ""),
        ("cd", "abcdef", "ab"),
        (["zz", "de", "f"], "abcdef", "abc"),
        ("f", "abcdef", "abcde"),
        ("gh", "abcdefg", "abcdefg"),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
async def test_a_stop_text_ends_the_answer_and_is_not_shown(
    folder: Path, stop: Any, text: str, shown: str, streamed: bool
) -> None:
    async with house(folder) as made:
        made.answers(text)
        asked = CHAT | {"stop": stop}
        if streamed:
            chunks = await stream(made, "/v1/chat/completions", asked)
            answer, choice = text_of(chunks), chunks[-1]["choices"][0]
        else:
            choice = (await made.http.post("/v1/chat/completions", json=asked)).json()["choices"][0]
            answer = choice["message"]["content"]
        assert answer == shown
        assert choice["finish_reason"] == "stop"
        met = (
            None
            if shown == text
            else next(each for each in ([stop] if isinstance(stop, str) else stop) if text.startswith(shown + each))
        )
        assert choice["stop_reason"] == met
        for worker in (*made.prefills, *made.decodes):
            for call in worker.calls:
                await call.ended()


async def test_a_stop_text_cancels_what_decode_still_does(folder: Path) -> None:
    async with house(folder) as made:
        made.answers("ab")
        made.decodes[0].script = rest(made.ids("bcd"), hold=True)
        response = await made.http.post("/v1/completions", json={"prompt": "x", "stop": "c"})
        assert response.json()["choices"][0]["text"] == "ab"
        assert response.json()["usage"]["completion_tokens"] == 3
        assert await made.decodes[0].calls[0].ended()


async def test_a_character_split_over_prefill_and_decode_arrives_whole(folder: Path) -> None:
    async with house(folder) as made:
        made.answers("\u20ac \U0001f600\u65e5")
        chunks = await stream(made, "/v1/chat/completions", CHAT)
        parts = [chunk["choices"][0]["delta"]["content"] for chunk in chunks]
        assert "".join(parts) == "\u20ac \U0001f600\u65e5"
        assert not any("\ufffd" in part for part in parts)


async def test_decode_may_overtake_the_first_token(folder: Path) -> None:
    async with house(folder) as made:
        made.answers("Paris.")
        slow = made.prefills[0].script

        async def after_decode(request: Any) -> Any:
            await (await made.decodes[0].first_call()).ended()
            async for response in slow(request):
                yield response

        made.prefills[0].script = after_decode
        assert text_of(await stream(made, "/v1/chat/completions", CHAT)) == "Paris."


@pytest.mark.parametrize(
    "asked",
    [
        {"presence_penalty": 0.5},
        {"frequency_penalty": -1},
        {"repetition_penalty": 1.2},
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}},
    ],
)
async def test_what_needs_the_history_is_served_by_decode_alone(folder: Path, asked: dict[str, Any]) -> None:
    async with house(folder) as made:
        made.decodes[0].script = rest([*made.ids("{}"), EOS])
        response = await made.http.post("/v1/chat/completions", json=CHAT | asked)
        assert response.json()["choices"][0]["message"]["content"] == "{}"
        (call,) = made.decodes[0].calls
        assert not call.request.HasField("remote_kv")
        assert made.prefills[0].calls == []
        if "response_format" in asked:
            assert json.loads(call.request.sampling.json_schema) in ({}, {"type": "object"})


async def test_without_prefill_decode_serves_alone(folder: Path) -> None:
    async with house(folder, prefills=0) as made:
        made.decodes[0].script = rest([*made.ids("ok"), EOS])
        response = await made.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1})
        assert response.json()["choices"][0]["text"] == "ok"


def logprob_script(made: House) -> None:
    """One likely token and its rival; an impossible one among them."""

    async def script(request: Any) -> Any:
        yield verified()
        top = [
            types_pb2.TokenLogprob(token_id=made.ids("r")[0], logprob=float("-inf"), rank=2),
            types_pb2.TokenLogprob(token_id=made.ids("a")[0], logprob=-0.25, rank=1),
        ]
        token = types_pb2.Token(token_id=made.ids("a")[0], logprob=-0.25, top_logprobs=top)
        yield decode_pb2.DecodeResponse(tokens=decode_pb2.Tokens(tokens=[token], finish_reason=LENGTH))

    made.prefills[0].script = first_token(made.ids("P")[0], logprob=-1.5)
    made.decodes[0].script = script


async def test_logprobs_of_a_chat(folder: Path) -> None:
    async with house(folder) as made:
        logprob_script(made)
        body = (await made.http.post("/v1/chat/completions", json=CHAT | {"logprobs": True, "top_logprobs": 2})).json()
        first, second = body["choices"][0]["logprobs"]["content"]
        assert first == {"token": "P", "logprob": -1.5, "bytes": [80], "top_logprobs": []}
        assert (second["token"], second["logprob"]) == ("a", -0.25)
        assert [(each["token"], each["logprob"]) for each in second["top_logprobs"]] == [("a", -0.25), ("r", -9999.0)]
        assert made.prefills[0].calls[0].request.sampling.logprobs == 2


async def test_logprobs_of_a_completion(folder: Path) -> None:
    async with house(folder) as made:
        logprob_script(made)
        chunks = await stream(made, "/v1/completions", {"prompt": "x", "logprobs": 1})
        first, second = (chunk["choices"][0]["logprobs"] for chunk in chunks)
        assert first == {
            "tokens": ["P"],
            "token_logprobs": [-1.5],
            "top_logprobs": [{"P": -1.5}],
            "text_offset": [0],
        }
        assert second["text_offset"] == [1]
        assert second["top_logprobs"] == [{"a": -0.25}]


async def test_a_trace_is_continued_and_told(folder: Path, spans: InMemorySpanExporter) -> None:
    async with house(folder) as made:
        made.answers("ok")
        trace_id = "0af7651916cd43dd8448eb211c80319c"
        headers = {"traceparent": f"00-{trace_id}-b7ad6b7169203331-01", "x-request-id": "mine-1"}
        response = await made.http.post("/v1/chat/completions", json=CHAT, headers=headers)
        assert response.headers["x-trace-id"] == trace_id
        assert response.headers["x-request-id"] == "mine-1"
        for worker in (*made.prefills, *made.decodes):
            await worker.calls[0].ended()
    ended = {span.name: span for span in spans.get_finished_spans()}
    root = ended[f"chat {MODEL}"]
    assert root.kind is SpanKind.SERVER
    assert root.attributes is not None
    assert root.attributes["hexgen2.route"] == "prefill-0>decode-0"
    assert root.attributes["hexgen2.plan.epoch"] == 7
    assert root.attributes["gen_ai.usage.output_tokens"] == 3
    assert root.attributes["gen_ai.response.finish_reasons"] == ("stop",)
    assert root.context is not None
    for name in ("hexgen2.v1.Prefill/Prefill", "hexgen2.v1.Decode/Decode"):
        parent = ended[name].parent
        assert parent is not None
        assert parent.span_id == root.context.span_id


async def test_models_health_and_metrics(folder: Path) -> None:
    async with house(folder) as made:
        made.answers("ok")
        (card,) = (await made.http.get("/v1/models")).json()["data"]
        assert (card["id"], card["object"], card["max_model_len"]) == (MODEL, "model", 64)
        assert (await made.http.get(f"/v1/models/{MODEL}")).json() == card
        assert (await made.http.get("/v1/models/other")).status_code == 404
        assert (await made.http.get("/health")).status_code == 200
        await made.http.post("/v1/chat/completions", json=CHAT)
        metrics = (await made.http.get("/metrics")).text
        for name in ("time_to_first_token_seconds_count", 'request_success_total{finished_reason="stop"}'):
            assert f"hexgen2:{name}" in metrics
