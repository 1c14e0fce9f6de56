"""Prefill and decode workers over real sockets: right tokens, and nothing left behind whichever way a call ends."""

import asyncio
from contextlib import suppress
from random import Random

import grpc
import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from hexgen2.config import KvConfig
from hexgen2.engine.base import Sampling
from hexgen2.kv.codecs import transfer_bytes
from hexgen2.v1 import prefill_pb2, prefill_pb2_grpc, types_pb2
from tests.eventually import eventually
from tests.worker.pair import CONFIG, DEADLINE_S, expected_tokens, pair


def prompt_of(num_tokens: int, seed: int = 0) -> list[int]:
    return [Random(seed + i).randrange(3, CONFIG.vocab_size) for i in range(num_tokens)]


def small(**changes: object) -> KvConfig:
    return KvConfig.model_validate({"transport": "tcp", "send_bytes": 1 << 20, "staging_bytes": 1 << 20} | changes)


@pytest.mark.parametrize("num_tokens", [1, 5, 127, 128, 129, 1000])
async def test_tokens_after_a_hand_over_are_those_of_the_model(num_tokens: int) -> None:
    prompt = prompt_of(num_tokens)
    async with pair() as fleet:
        handed = await fleet.generate(prompt, Sampling(max_tokens=8))
        assert handed.tokens == expected_tokens(CONFIG, prompt, 8)
        assert handed.finish_reason == types_pb2.FINISH_REASON_LENGTH
        # Decode took the whole prompt from KV and computed the first token alone.
        assert handed.cached_tokens == num_tokens
        assert handed.kv is not None
        shape = fleet.prefill.engine.model.kv_shape
        assert handed.kv.bytes == shape.bytes_per_token * num_tokens
        assert handed.kv.transport.startswith("tcp")
        await fleet.settled()


@pytest.mark.parametrize(("prefill_tp", "decode_tp"), [(1, 2), (2, 1), (2, 2), (4, 2)])
async def test_prefill_and_decode_may_differ_in_ranks(prefill_tp: int, decode_tp: int) -> None:
    prompt = prompt_of(200)
    async with pair(
        CONFIG.model_copy(update={"tensor_parallel_size": prefill_tp}),
        CONFIG.model_copy(update={"tensor_parallel_size": decode_tp}),
    ) as fleet:
        handed = await fleet.generate(prompt, Sampling(max_tokens=4))
        assert handed.tokens == expected_tokens(CONFIG, prompt, 4)
        await fleet.settled()


@pytest.mark.parametrize("codec", ["int8", "fp8", "int4"])
async def test_kv_travels_in_the_codec_of_the_transfer(codec: str) -> None:
    """The emulated model's values survive every codec, so its tokens prove that none was lost or mistaken."""
    prompt = prompt_of(300)
    async with pair(
        CONFIG.model_copy(update={"tensor_parallel_size": 2}), CONFIG.model_copy(update={"dtype": "bfloat16"})
    ) as fleet:
        handed = await fleet.generate(prompt, Sampling(max_tokens=4), codec)
        assert handed.tokens == expected_tokens(CONFIG, prompt, 4)
        assert handed.kv is not None
        assert handed.kv.codec == codec
        assert handed.kv.bytes == transfer_bytes(codec, fleet.prefill.engine.model.kv_shape, 300)
        await fleet.settled()


@pytest.mark.parametrize(
    ("prefill_dtype", "decode_dtype"), [("float32", "bfloat16"), ("bfloat16", "float16"), ("float16", "float32")]
)
async def test_prefill_and_decode_may_differ_in_dtype(prefill_dtype: str, decode_dtype: str) -> None:
    prompt = prompt_of(300)
    async with pair(
        CONFIG.model_copy(update={"dtype": prefill_dtype, "tensor_parallel_size": 2}),
        CONFIG.model_copy(update={"dtype": decode_dtype, "tensor_parallel_size": 1}),
    ) as fleet:
        handed = await fleet.generate(prompt, Sampling(max_tokens=4))
        assert handed.tokens == expected_tokens(CONFIG, prompt, 4)
        assert handed.kv is not None
        assert handed.kv.bytes == fleet.prefill.engine.model.kv_shape.bytes_per_token * 300
        await fleet.settled()


async def test_an_unknown_codec_and_one_that_was_not_agreed_are_refused() -> None:
    prompt = prompt_of(20)
    async with pair() as fleet:
        for start in (fleet.start_prefill, fleet.start_decode):
            status, message = await status_of(start(fleet.transfer("zip"), prompt, Sampling(max_tokens=4)))
            assert status is grpc.StatusCode.INVALID_ARGUMENT
            assert "transfer.codec: 'zip' is not one of none, int8, fp8, int4" in message
        transfer = fleet.transfer("int8")
        made = fleet.start_prefill(transfer, prompt, Sampling(max_tokens=4))
        transfer.codec = "int4"
        status, message = await status_of(fleet.start_decode(transfer, prompt, Sampling(max_tokens=4)))
        assert status is grpc.StatusCode.FAILED_PRECONDITION
        assert "codec differs: offered int8, expected int4" in message
        made.cancel()
        await fleet.settled()


async def test_many_at_once_share_small_pools_and_all_are_right() -> None:
    pools = small(send_bytes=8 * 65536, staging_bytes=8 * 65536, landing_bytes=65536)
    prompts = [prompt_of(40 + 37 * i, seed=1000 * i) for i in range(24)]
    async with pair(prefill_kv=pools, decode_kv=pools) as fleet:
        assert fleet.prefill.memory.bytes_total < sum(map(len, prompts)) * 512
        answers = await asyncio.gather(*(fleet.generate(p, Sampling(max_tokens=6)) for p in prompts))
        assert [a.tokens for a in answers] == [expected_tokens(CONFIG, p, 6) for p in prompts]
        await fleet.settled()


async def test_a_request_without_a_transfer_is_served_colocated() -> None:
    prompt = prompt_of(50)
    async with pair() as fleet:
        tokens = [
            token.token_id
            async for response in fleet.start_decode(None, prompt, Sampling(max_tokens=5))
            for token in response.tokens.tokens
        ]
        assert tokens == expected_tokens(CONFIG, prompt, 5)


async def test_a_final_first_token_ends_both_calls_without_decoding() -> None:
    prompt = prompt_of(20)
    stop = expected_tokens(CONFIG, prompt, 1)[0]
    async with pair() as fleet:
        handed = await fleet.generate(prompt, Sampling(max_tokens=9, stop_token_ids=(stop,)))
        assert (handed.tokens, handed.kv) == ([stop], None)
        assert handed.finish_reason == types_pb2.FINISH_REASON_STOP
        await fleet.settled()


async def test_min_tokens_counts_the_first_token_once() -> None:
    prompt = prompt_of(20)
    answer = expected_tokens(CONFIG, prompt, 6)
    async with pair() as fleet:
        handed = await fleet.generate(prompt, Sampling(max_tokens=6, min_tokens=3, stop_token_ids=tuple(answer)))
        # The first three may not stop; the fourth does.
        assert handed.tokens == answer[:4]


async def test_an_answer_of_one_token_holds_no_memory() -> None:
    prompt = prompt_of(20)
    async with pair() as fleet:
        call = fleet.start_prefill(fleet.transfer(), prompt, Sampling(max_tokens=1), hand_over=False)
        tokens = [r.first_token.token.token_id async for r in call if r.HasField("first_token")]
        assert tokens == expected_tokens(CONFIG, prompt, 1)
        await fleet.settled()


async def status_of(call: object) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:  # type: ignore[attr-defined]
            pass
    return caught.value.code(), caught.value.details() or ""


async def first_token(call: object) -> int:
    async for response in call:  # type: ignore[attr-defined]
        if response.HasField("first_token"):
            return int(response.first_token.token.token_id)
    raise AssertionError("no first token")


async def test_swapped_transfers_are_refused_by_the_prompt_that_they_carry() -> None:
    a, b = prompt_of(60, seed=1), prompt_of(60, seed=2)
    async with pair() as fleet:
        for_a, for_b = fleet.transfer(), fleet.transfer()
        calls = [fleet.start_prefill(for_a, a, Sampling(max_tokens=4))]
        calls.append(fleet.start_prefill(for_b, b, Sampling(max_tokens=4)))
        swapped = [fleet.start_decode(for_b, a, Sampling(max_tokens=4), suffix="x")]
        swapped.append(fleet.start_decode(for_a, b, Sampling(max_tokens=4), suffix="x"))
        for code, details in await asyncio.gather(*map(status_of, swapped)):
            assert code is grpc.StatusCode.FAILED_PRECONDITION
            assert details.startswith("prompt differs")
        for call in calls:
            call.cancel()
        await fleet.settled()


async def test_another_model_of_the_same_shape_is_refused() -> None:
    prompt = prompt_of(10)
    async with pair(decode=CONFIG.model_copy(update={"name": "other"})) as fleet:
        transfer = fleet.transfer()
        prefill = fleet.start_prefill(transfer, prompt, Sampling(max_tokens=4))
        code, details = await status_of(fleet.start_decode(transfer, prompt, Sampling(max_tokens=4)))
        assert (code, details.split(":")[0]) == (grpc.StatusCode.FAILED_PRECONDITION, "model differs")
        prefill.cancel()
        await fleet.settled()


async def test_kv_is_served_only_to_the_holder_of_the_token() -> None:
    async with pair() as fleet:
        transfer = fleet.transfer()
        prefill = fleet.start_prefill(transfer, prompt_of(10), Sampling(max_tokens=4))
        await first_token(prefill)
        stub = prefill_pb2_grpc.PrefillStub(fleet.prefill.channel)
        stolen = prefill_pb2.FetchKvRequest(transfer_id=transfer.transfer_id, token=bytes(32))
        code, _ = await status_of(stub.FetchKv(stolen, timeout=DEADLINE_S))
        assert code is grpc.StatusCode.NOT_FOUND
        prefill.cancel()
        await fleet.settled()


async def test_kv_can_be_fetched_twice_while_the_prefill_call_lasts() -> None:
    """A decode replica lost before it verified costs no prefill."""
    prompt = prompt_of(300)
    async with pair() as fleet:
        transfer = fleet.transfer()
        prefill = fleet.start_prefill(transfer, prompt, Sampling(max_tokens=5))
        tokens = [await first_token(prefill)]
        lost = fleet.start_decode(transfer, prompt, Sampling(max_tokens=5))
        async for response in lost:
            assert response.HasField("kv_verified")
            break
        lost.cancel()
        async for response in fleet.start_decode(transfer, prompt, Sampling(max_tokens=5), suffix="again"):
            tokens += [token.token_id for token in response.tokens.tokens]
        prefill.cancel()
        assert tokens == expected_tokens(CONFIG, prompt, 5)
        await fleet.settled()


async def test_when_prefill_leaves_decode_is_told_and_everything_is_free() -> None:
    slow = CONFIG.model_copy(update={"prefill_tokens_per_s": 500.0, "max_num_batched_tokens": 64})
    async with pair(prefill=slow) as fleet:
        transfer = fleet.transfer()
        prefill = fleet.start_prefill(transfer, prompt_of(900), Sampling(max_tokens=4))
        async for response in prefill:
            assert response.HasField("admitted")
            break
        decode = asyncio.create_task(status_of(fleet.start_decode(transfer, prompt_of(900), Sampling(max_tokens=4))))
        await eventually(lambda: bool(fleet.decode.memory.bytes_used))
        prefill.cancel()
        code, details = await decode
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert "ended before all of it was sent" in details
        await fleet.settled()


@pytest.mark.parametrize("leave", ["queued", "producing", "first_token", "decoding"])
async def test_a_client_may_leave_at_each_step(leave: str) -> None:
    slow = CONFIG.model_copy(update={"prefill_tokens_per_s": 2000.0, "max_num_batched_tokens": 64})
    slow_decode = CONFIG.model_copy(update={"decode_step_base_s": 0.01})
    pools = small(send_bytes=4 * 65536)
    async with pair(prefill=slow, decode=slow_decode, prefill_kv=pools) as fleet:
        prompt, sampling = prompt_of(400), Sampling(max_tokens=500)
        others = [fleet.start_prefill(fleet.transfer(), prompt_of(400), sampling) for _ in range(3)]
        if leave != "queued":
            for call in others:
                call.cancel()
            await fleet.settled()
        transfer = fleet.transfer()
        prefill = fleet.start_prefill(transfer, prompt, sampling)
        decode = fleet.start_decode(transfer, prompt, sampling)
        if leave == "producing":
            async for response in prefill:
                assert response.HasField("admitted")
                break
        elif leave == "first_token":
            await first_token(prefill)
        elif leave == "decoding":
            async for response in decode:
                if response.HasField("tokens"):
                    break
        else:
            await eventually(lambda: bool(fleet.prefill.memory.num_waiting))
        for call in (prefill, decode, *others):
            call.cancel()
        await fleet.settled()
        handed = await fleet.generate(prompt_of(30), Sampling(max_tokens=3))
        assert handed.tokens == expected_tokens(CONFIG, prompt_of(30), 3)


async def test_full_pools_and_lines_say_so() -> None:
    pools = small(send_bytes=70_000, max_queued=1)
    async with pair(prefill_kv=pools) as fleet:
        sampling = Sampling(max_tokens=4)
        holding = fleet.start_prefill(fleet.transfer(), prompt_of(100), sampling)
        await first_token(holding)
        waiting = fleet.start_prefill(fleet.transfer(), prompt_of(100), sampling)
        await eventually(lambda: bool(fleet.prefill.memory.num_waiting))
        refused = fleet.start_prefill(fleet.transfer(), prompt_of(100), sampling)
        code, details = await status_of(refused)
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "send is full" in details
        assert dict(await refused.trailing_metadata())["retry-after-s"]
        code, details = await status_of(fleet.start_prefill(fleet.transfer(), prompt_of(3000), sampling))
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert "pages" in details
        for call in (holding, waiting):
            call.cancel()
        await fleet.settled()


async def test_a_waiting_request_keeps_its_deadline() -> None:
    pools = small(send_bytes=70_000)
    async with pair(prefill_kv=pools) as fleet:
        holding = fleet.start_prefill(fleet.transfer(), prompt_of(100), Sampling(max_tokens=4))
        await first_token(holding)
        transfer = fleet.transfer()
        call = prefill_pb2_grpc.PrefillStub(fleet.prefill.channel).Prefill(
            prefill_pb2.PrefillRequest(
                request_id="r",
                transfer=transfer,
                prompt_token_ids=[5],
                sampling=types_pb2.SamplingParams(max_tokens=2),
                hand_over=True,
            ),
            timeout=0.2,
        )
        code, _ = await status_of(call)
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        await eventually(lambda: fleet.prefill.memory.num_waiting == 0)
        holding.cancel()
        await fleet.settled()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"request_id": ""}, "request_id"),
        ({"prompt_token_ids": []}, "prompt_token_ids"),
        ({"prompt_token_ids": [5] * 9000}, "prompt_token_ids"),
        ({"prompt_token_ids": [512]}, "prompt_token_ids"),
        ({"transfer": types_pb2.Transfer(transfer_id="x", token=b"short")}, "transfer.token"),
        ({"transfer": types_pb2.Transfer(token=bytes(32))}, "transfer.transfer_id"),
        ({"sampling": types_pb2.SamplingParams(max_tokens=4, top_p=1.5)}, "sampling.top_p"),
        ({"sampling": types_pb2.SamplingParams(max_tokens=4, presence_penalty=1.0)}, "sampling"),
    ],
    ids=str,
)
async def test_bad_input_is_refused_by_field_and_the_next_request_works(changes: dict[str, object], field: str) -> None:
    async with pair() as fleet:
        good: dict[str, object] = {
            "request_id": "r",
            "transfer": fleet.transfer(),
            "prompt_token_ids": [5, 6],
            "sampling": types_pb2.SamplingParams(max_tokens=4),
            "hand_over": True,
        }
        stub = prefill_pb2_grpc.PrefillStub(fleet.prefill.channel)
        request = prefill_pb2.PrefillRequest(**(good | changes))  # type: ignore[arg-type]
        code, details = await status_of(stub.Prefill(request, timeout=DEADLINE_S))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert details.startswith(f"{field}:")
        handed = await fleet.generate([5, 6], Sampling(max_tokens=3))
        assert handed.tokens == expected_tokens(CONFIG, [5, 6], 3)
        await fleet.settled()


async def test_a_final_first_token_ends_decode_by_itself_whatever_is_still_on_its_way() -> None:
    prompt = prompt_of(1000)
    stop = expected_tokens(CONFIG, prompt, 1)[0]
    async with pair() as fleet:
        transfer = fleet.transfer()
        sampling = Sampling(max_tokens=9, stop_token_ids=(stop,))
        decode = fleet.start_decode(transfer, prompt, sampling)
        prefill = fleet.start_prefill(transfer, prompt, sampling)
        assert await first_token(prefill) == stop
        # Prefill's call is over: a fetch that comes after it is told so.
        ended = []
        with suppress(grpc.aio.AioRpcError):
            ended = [response async for response in decode if response.HasField("tokens")]
        assert ended == []
        assert await decode.code() in (grpc.StatusCode.OK, grpc.StatusCode.FAILED_PRECONDITION)
        await fleet.settled()


async def test_a_second_call_for_the_same_transfer_does_not_take_the_first_ones_memory() -> None:
    prompt = prompt_of(300)
    slow = CONFIG.model_copy(update={"prefill_tokens_per_s": 1000.0, "max_num_batched_tokens": 64})
    async with pair(prefill=slow) as fleet:
        transfer = fleet.transfer()
        prefill = fleet.start_prefill(transfer, prompt, Sampling(max_tokens=5))
        decode = fleet.start_decode(transfer, prompt, Sampling(max_tokens=5))
        await eventually(lambda: fleet.decode.memory.bytes_used > 0)
        thief = types_pb2.Transfer(transfer_id=transfer.transfer_id, token=bytes(32))
        code, _ = await status_of(fleet.start_decode(thief, prompt, Sampling(max_tokens=5)))
        assert code is grpc.StatusCode.NOT_FOUND
        tokens = [await first_token(prefill)]
        async for response in decode:
            tokens += [token.token_id for token in response.tokens.tokens]
        prefill.cancel()
        assert tokens == expected_tokens(CONFIG, prompt, 5)
        await fleet.settled()


async def test_two_addresses_are_two_routes_and_each_has_its_span(spans: InMemorySpanExporter) -> None:
    kv = KvConfig(
        transport="tcp", host="127.0.0.1,127.0.0.2", send_bytes=1 << 20, staging_bytes=1 << 20, landing_bytes=1 << 18
    )
    prompt = prompt_of(1000)
    async with pair(prefill_kv=kv, decode_kv=kv) as fleet:
        handed = await fleet.generate(prompt, Sampling(max_tokens=4))
        assert handed.tokens == expected_tokens(CONFIG, prompt, 4)
        await fleet.settled()
    ended = spans.get_finished_spans()
    fetch = next(span for span in ended if span.name == "kv.fetch")
    routes = [span for span in ended if span.name == "kv.route"]
    assert {(span.attributes or {})["hexgen2.kv.route"] for span in routes} == {"tcp/127.0.0.1", "tcp/127.0.0.2"}
    assert fetch.context is not None
    assert fetch.attributes is not None
    assert all(span.parent is not None and span.parent.span_id == fetch.context.span_id for span in routes)
    carried = [(span.attributes or {})["hexgen2.kv.bytes"] for span in routes]
    assert sum(n for n in carried if isinstance(n, int)) == fetch.attributes["hexgen2.kv.bytes"]
