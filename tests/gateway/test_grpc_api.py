"""The same life over gRPC."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from hexgen2.errors import Overloaded, Unavailable
from hexgen2.plan import Role
from hexgen2.v1 import gateway_pb2 as pb
from hexgen2.v1 import types_pb2
from tests.gateway.house import LENGTH, STOP, House, fails, first_token, house, rest


async def ask(made: House, timeout: float = 30, **fields: Any) -> list[pb.GenerateResponse]:
    call = made.stub.Generate(pb.GenerateRequest(**fields), timeout=timeout)
    return [response async for response in call]


async def refused(made: House, **fields: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ask(made, **fields)
    return caught.value


async def test_an_answer_with_its_usage_and_timing(folder: Path) -> None:
    async with house(folder) as made:
        made.answers("Paris.", cached=4)
        chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="hi")])
        *parts, last = await ask(made, chat=chat)
        assert "".join(part.text for part in (*parts, last)) == "Paris."
        assert [part.finish_reason for part in parts] == [0] * len(parts)
        assert last.finish_reason == STOP
        assert last.usage.completion_tokens == 7
        assert last.usage.cached_tokens == 4
        assert (last.timing.prefill_replica_id, last.timing.decode_replica_id) == ("prefill-0", "decode-0")
        assert last.timing.kv.bytes == 1000
        assert 0 < last.timing.ttft_s <= last.timing.e2e_s
        assert len({part.request_id for part in (*parts, last)}) == 1


async def test_token_ids_and_a_stop_text(folder: Path) -> None:
    async with house(folder) as made:
        made.answers("abcd")
        *parts, last = await ask(made, prompt_token_ids=pb.TokenIds(ids=made.ids("x")), stop=["bc"])
        assert "".join(part.text for part in (*parts, last)) == "a"
        assert (last.finish_reason, last.stop_text) == (STOP, "bc")
        tokens = [token.token_id for part in (*parts, last) for token in part.tokens]
        assert tokens == made.ids("abc")


async def test_one_token_has_no_decode_replica(folder: Path) -> None:
    async with house(folder) as made:
        made.answers("a")
        (only,) = await ask(made, prompt="x", sampling=types_pb2.SamplingParams(max_tokens=1))
        assert (only.text, only.finish_reason) == ("a", LENGTH)
        assert only.timing.tpot_s == 0
        assert only.timing.decode_replica_id == ""
        assert not only.timing.HasField("kv")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, "input"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "x" * 64}, "prompt"),
        ({"prompt_token_ids": pb.TokenIds()}, "prompt_token_ids"),
        ({"prompt_token_ids": pb.TokenIds(ids=[259])}, "prompt_token_ids"),
        ({"chat": pb.Chat()}, "chat.messages"),
        ({"chat": pb.Chat(messages=[pb.ChatMessage(role="wizard")])}, "chat.messages[0].role"),
        ({"prompt": "x", "stop": [""]}, "stop"),
        ({"prompt": "x", "sampling": {"max_tokens": 0}}, "sampling.max_tokens"),
        ({"prompt": "x", "sampling": {"max_tokens": 64}}, "sampling.max_tokens"),
        ({"prompt": "x", "sampling": {"temperature": float("nan")}}, "sampling.temperature"),
        ({"prompt": "x", "sampling": {"top_p": float("inf")}}, "sampling.top_p"),
        ({"prompt": "x", "sampling": {"seed": 2**64 - 1}}, "sampling.seed"),
        ({"prompt": "x", "sampling": {"presence_penalty": float("nan")}}, "sampling.presence_penalty"),
        ({"prompt": "x", "sampling": {"repetition_penalty": 0.0}}, "sampling.repetition_penalty"),
        ({"prompt": "x", "sampling": {"logprobs": 21}}, "sampling.logprobs"),
        ({"prompt": "x", "sampling": {"json_schema": "{"}}, "sampling.json_schema"),
    ],
)
async def test_bad_values_are_refused_by_name(folder: Path, fields: dict[str, Any], named: str) -> None:
    async with house(folder) as made:
        sampling = types_pb2.SamplingParams(**fields.pop("sampling", {}))
        error = await refused(made, sampling=sampling, **fields)
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert (error.details() or "").startswith(f"{named}: ")
        assert made.prefills[0].calls == []


async def test_a_prompt_that_no_hand_over_has_memory_for_is_refused(folder: Path) -> None:
    async with house(folder) as made:
        made.answers("ok")
        prefill, decode = made.plans.plan.replicas
        for told, limit in (
            ((replace(prefill, send_tokens=40), replace(decode, staging_tokens=30)), 30),
            ((replace(prefill, send_tokens=20), replace(decode, staging_tokens=30)), 20),
            # What its role does not need says nothing of a replica.
            ((replace(prefill, staging_tokens=9), replace(decode, send_tokens=9, staging_tokens=30)), 30),
            # Prefill's context holds the prompt and the first token.
            ((replace(prefill, max_model_len=26, send_tokens=40), decode), 25),
        ):
            # Who hands nothing over limits nobody.
            whole = replace(prefill, replica_id="whole", role=Role.COLOCATED, send_tokens=5, staging_tokens=5)
            made.plans.plan = replace(made.plans.plan, replicas=(*told, whole))
            error = await refused(made, prompt="x" * (limit + 1))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            want = f"prompt: has {limit + 1} tokens; the limit is {limit}, which is what"
            assert (error.details() or "").startswith(want)
            num_calls = len(made.prefills[0].calls)
            await ask(made, prompt="x" * limit)
            assert len(made.prefills[0].calls) == num_calls + 1


async def test_statuses_of_failures(folder: Path) -> None:
    async with house(folder) as made:
        assert (await refused(made, prompt="x", model="other")).code() is grpc.StatusCode.NOT_FOUND
        made.prefills[0].script = fails(Overloaded("full", 2.0))
        error = await refused(made, prompt="x")
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert ("retry-after-s", "2") in tuple(error.trailing_metadata() or ())
        made.prefills[0].script = first_token(made.ids("o")[0])
        made.decodes[0].script = rest(made.ids("k"), then=Unavailable("gone"))
        assert (await refused(made, prompt="x")).code() is grpc.StatusCode.UNAVAILABLE


async def test_the_clients_deadline_is_every_calls_deadline(folder: Path) -> None:
    async with house(folder) as made:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(made, timeout=2.0, prompt="x")
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        for worker in (*made.prefills, *made.decodes):
            assert await worker.calls[0].ended()


async def test_a_client_that_does_not_read_gets_all_of_it_later(folder: Path) -> None:
    async with house(folder) as made:
        made.answers("a" * 40)
        request = pb.GenerateRequest(prompt="x", sampling=types_pb2.SamplingParams(max_tokens=60))
        call = made.stub.Generate(request, timeout=30)
        await asyncio.sleep(0.2)
        assert "".join([response.text async for response in call]) == "a" * 40
