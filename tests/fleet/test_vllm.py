"""The proof with a real model: SmolLM2 in fp32 through four services, over UCX and TCP, against one vLLM engine."""

import asyncio
import signal
from collections.abc import AsyncIterator
from dataclasses import replace
from random import Random
from typing import Any

import grpc
import httpx
import pytest
import pytest_asyncio

from hexgen2.cli.fleet_config import FleetConfig
from hexgen2.engine.base import Sampling
from hexgen2.rpc.server import GrpcServer
from hexgen2.v1 import prefill_pb2, prefill_pb2_grpc
from tests.certificates import Authority
from tests.fleet.harness import DEADLINE_S, GREEDY, LENGTH, STOP, Running, running, smollm2
from tests.worker.pair import Pair

pytestmark = pytest.mark.vllm

#: 30 layers, K and V, 3 KV heads of 64 values of 4 bytes.
BYTES_PER_TOKEN = 30 * 2 * 3 * 64 * 4


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["ucx", "tcp"])
async def fleet(request: pytest.FixtureRequest, authority: Authority) -> AsyncIterator[Running]:
    """Over TCP everything speaks TLS, the KV plane too."""
    engine = {"kind": "vllm", "model": smollm2(), "max_model_len": 1536, "kv_cache_bytes": 512 << 20}
    tls = authority.folder if request.param == "tcp" else None
    config = FleetConfig.model_validate({"engine": engine, "kv": {"transport": request.param}, "tls": tls})
    async with running(config) as up:
        yield up


#: For what does not depend on the transport.
over_ucx = pytest.mark.parametrize("fleet", ["ucx"], indirect=True)


def prompt_of(num_tokens: int, seed: int) -> list[int]:
    """Common words of its vocabulary in random order: real enough for a tie to be unlikely."""
    return [Random(f"{seed}/{i}").randrange(300, 9000) for i in range(num_tokens)]


@pytest.mark.parametrize("num_tokens", [5, 17, 128, 129, 256, 400, 700, 1000])
async def test_tokens_equal_those_of_one_engine_and_every_byte_moved(fleet: Running, num_tokens: int) -> None:
    prompt = prompt_of(num_tokens, seed=num_tokens)
    alone = await fleet.colocated(prompt, GREEDY)
    handed = await fleet.pair.generate(prompt, GREEDY)
    assert handed.tokens == alone
    assert len(alone) == GREEDY.max_tokens
    assert handed.kv is not None
    assert handed.kv.bytes == BYTES_PER_TOKEN * num_tokens
    # Of prompt and first token decode computed one position: the first token.
    assert handed.cached_tokens == num_tokens
    answer = await fleet.ask(prompt, GREEDY)
    assert answer.tokens == alone
    assert answer.last.usage.completion_tokens == GREEDY.max_tokens
    assert answer.last.timing.kv.transport.startswith(fleet.fleet.config.kv.transport)


async def test_layers_leave_while_prefill_computes(fleet: Running) -> None:
    prompt = prompt_of(1000, seed=3)
    transfer = fleet.pair.transfer()
    prefill = fleet.pair.start_prefill(transfer, prompt, GREEDY)
    stub = prefill_pb2_grpc.PrefillStub(fleet.workers["prefill-0"].worker_channel)
    request = prefill_pb2.FetchKvRequest(transfer_id=transfer.transfer_id, token=transfer.token)
    # One digest per chunk, layer and KV head.
    before, after, a_chunk = 0, 0, 30 * 3
    first_token = False
    async for response in stub.FetchKv(request, timeout=DEADLINE_S):
        first_token = first_token or response.HasField("first_token")
        num_digests = sum(len(piece.digests) for piece in response.pieces.pieces)
        if first_token:
            after += num_digests
        else:
            before += num_digests
        if first_token and before + after == 8 * a_chunk:
            break
    prefill.cancel()
    # Of 8 chunks in 4 steps, those of the first 3 steps are there well before the last step has made a token.
    assert before >= 6 * a_chunk
    assert before + after == 8 * a_chunk
    await fleet.settled()


async def test_eight_at_once_equal_one_by_one(fleet: Running) -> None:
    prompts = [prompt_of(30 + 61 * i, seed=100 + i) for i in range(8)]
    alone = [await fleet.colocated(prompt, GREEDY) for prompt in prompts]
    together = await asyncio.gather(*(fleet.ask(prompt, GREEDY) for prompt in prompts))
    assert [answer.tokens for answer in together] == alone
    await fleet.settled()


@pytest.mark.parametrize("together", [False, True])
async def test_prompts_that_share_300_tokens(fleet: Running, together: bool) -> None:
    shared = prompt_of(300, seed=7 + together)
    prompts = [shared + prompt_of(50, seed=8), shared + prompt_of(90, seed=9)]
    alone = [await fleet.colocated(prompt, GREEDY) for prompt in prompts]
    if together:
        answers = list(await asyncio.gather(*(fleet.pair.generate(p, GREEDY) for p in prompts)))
    else:
        answers = [await fleet.pair.generate(p, GREEDY) for p in prompts]
        again = await fleet.ask(prompts[1], GREEDY)
        assert again.tokens == alone[1]
        assert again.last.usage.cached_tokens >= 256
    assert [answer.tokens for answer in answers] == alone
    # Blocks that prefill found in its prefix cache were sent as well.
    assert [a.kv and a.kv.bytes for a in answers] == [BYTES_PER_TOKEN * len(p) for p in prompts]


async def test_swapped_transfers_are_refused(fleet: Running) -> None:
    pair = fleet.pair
    prompts = [prompt_of(60, seed=20), prompt_of(60, seed=21)]
    transfers = [pair.transfer(), pair.transfer()]
    calls = [pair.start_prefill(t, p, GREEDY) for t, p in zip(transfers, prompts, strict=True)]
    swapped = [pair.start_decode(t, p, GREEDY) for t, p in zip(reversed(transfers), prompts, strict=True)]
    for call in swapped:
        with pytest.raises(grpc.aio.AioRpcError, match="prompt differs") as caught:
            async for _ in call:
                pass
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    for call in calls:
        call.cancel()
    await fleet.settled()


async def outcome(call: Any) -> tuple[grpc.StatusCode, str, int]:
    """Status, its message, and how many messages came before it."""
    num = 0
    try:
        async for _ in call:
            num += 1
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or "", num
    return grpc.StatusCode.OK, "", num


class Meddler(prefill_pb2_grpc.PrefillServicer):
    """Between prefill and decode on the control channel: passes FetchKv on, with one small change."""

    def __init__(self, channel: grpc.aio.Channel, change: str) -> None:
        self._stub = prefill_pb2_grpc.PrefillStub(channel)
        self._change = change

    def Prefill(self, request: Any, context: Any) -> Any:
        raise NotImplementedError("Prefill calls go to the worker itself")

    async def FetchKv(
        self, request: prefill_pb2.FetchKvRequest, context: Any
    ) -> AsyncIterator[prefill_pb2.FetchKvResponse]:
        changed = False
        async for response in self._stub.FetchKv(request, timeout=DEADLINE_S):
            if self._change == "bytes" and response.HasField("header"):
                # Bytes from one word further on: what is read is not what was digested.
                response.header.ranks[0].page_offsets[0] += 4
            if self._change == "digest" and response.HasField("pieces") and not changed:
                response.pieces.pieces[0].digests[0] ^= 1 << 17
                changed = True
            yield response


@pytest.mark.parametrize("change", ["bytes", "digest"])
async def test_kv_that_is_not_what_was_digested_is_refused_and_never_served(fleet: Running, change: str) -> None:
    prompt = prompt_of(100, seed=25)
    real = fleet.workers["prefill-0"]
    between = GrpcServer("127.0.0.1:0", tls=fleet.worker_tls)
    meddler = Meddler(real.worker_channel, change)
    between.add(prefill_pb2_grpc.add_PrefillServicer_to_server, meddler, "hexgen2.v1.Prefill")
    address = await between.start()
    try:
        transfer = fleet.pair.transfer()
        prefill = fleet.pair.start_prefill(transfer, prompt, GREEDY)
        deceived = Pair(replace(real, address=address), fleet.workers["decode-0"])
        code, details, served = await outcome(deceived.start_decode(transfer, prompt, GREEDY))
        assert (code, served) == (grpc.StatusCode.DATA_LOSS, 0)
        assert "digest mismatch" in details
        prefill.cancel()
    finally:
        await between.stop(0.0)
    await fleet.settled()


@over_ucx
async def test_ends_that_need_no_decode(fleet: Running) -> None:
    prompt = prompt_of(40, seed=30)
    first, second = (await fleet.colocated(prompt, GREEDY))[:2]
    one = await fleet.ask(prompt, replace(GREEDY, max_tokens=1))
    assert (one.tokens, one.last.finish_reason) == ([first], LENGTH)
    ended = await fleet.ask(prompt, replace(GREEDY, ignore_eos=False, stop_token_ids=(first,)))
    assert (ended.tokens, ended.last.finish_reason) == ([first], STOP)
    for answer in (one, ended):
        assert not answer.last.timing.HasField("kv")
    two = await fleet.ask(prompt, replace(GREEDY, ignore_eos=False, stop_token_ids=(second,)))
    assert (two.tokens, two.last.finish_reason) == ([first, second], STOP)
    await fleet.settled()


@over_ucx
async def test_a_stop_text_in_the_first_token(fleet: Running) -> None:
    prompt = prompt_of(40, seed=31)
    whole = await fleet.ask(prompt, replace(GREEDY, max_tokens=1))
    assert whole.text
    cut = await fleet.ask(prompt, GREEDY, stop=[whole.text[:3]])
    assert (cut.text, cut.last.finish_reason) == ("", STOP)
    await fleet.settled()


@over_ucx
async def test_min_tokens_holds_the_end_back_across_the_hand_over(fleet: Running) -> None:
    prompt = prompt_of(40, seed=32)
    stops = tuple(dict.fromkeys(await fleet.colocated(prompt, GREEDY)))
    sampling = Sampling(max_tokens=16, min_tokens=5, temperature=0.0, stop_token_ids=stops)
    answer = await fleet.ask(prompt, sampling)
    assert len(answer.tokens) >= 5
    assert answer.tokens == await fleet.colocated(prompt, sampling)


@over_ucx
async def test_penalties_are_served_by_one_engine(fleet: Running) -> None:
    prompt = prompt_of(40, seed=33)
    sampling = replace(GREEDY, repetition_penalty=1.3)
    answer = await fleet.ask(prompt, sampling)
    assert answer.tokens == await fleet.colocated(prompt, sampling)
    assert answer.last.timing.prefill_replica_id == ""
    assert answer.last.timing.decode_replica_id == "decode-0"


@over_ucx
async def test_logprobs_of_all_tokens_are_those_of_one_engine(fleet: Running) -> None:
    prompt = prompt_of(40, seed=34)
    sampling = replace(GREEDY, max_tokens=4, logprobs=2)

    def told(tokens: Any) -> list[tuple[int, float, list[int]]]:
        return [(t.token_id, round(t.logprob, 3), [each.token_id for each in t.top_logprobs]) for t in tokens]

    handed = [t async for response in fleet.start(prompt, sampling) for t in response.tokens]
    alone = [t async for r in fleet.pair.start_decode(None, prompt, sampling) for t in r.tokens.tokens]
    assert told(handed) == told(alone)


@over_ucx
@pytest.mark.parametrize("leave", ["at once", "first token", "decoding"])
async def test_a_client_that_leaves_frees_everything(fleet: Running, leave: str) -> None:
    call = fleet.start(prompt_of(900, seed=40), replace(GREEDY, max_tokens=400))
    if leave == "at once":
        await asyncio.sleep(0.3)
    else:
        wanted = 1 if leave == "first token" else 3
        async for response in call:
            wanted -= len(response.tokens)
            if wanted <= 0:
                break
    call.cancel()
    await fleet.settled()
    prompt = prompt_of(20, seed=41)
    assert (await fleet.ask(prompt, GREEDY)).tokens == await fleet.colocated(prompt, GREEDY)


@over_ucx
async def test_paris_over_http(fleet: Running) -> None:
    async with httpx.AsyncClient(base_url=f"http://{fleet.fleet.http_address}", timeout=60.0) as client:
        body = {
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "max_tokens": 32,
            "temperature": 0,
        }
        answer = (await client.post("/v1/chat/completions", json=body)).json()
        assert "Paris" in answer["choices"][0]["message"]["content"]
        assert answer["choices"][0]["finish_reason"] == "stop"


@over_ucx
async def test_a_killed_coordinator_fails_no_request(fleet: Running) -> None:
    prompts = [prompt_of(200, seed=50 + i) for i in range(4)]
    alone = [await fleet.colocated(prompt, GREEDY) for prompt in prompts]
    asked = [asyncio.create_task(fleet.ask(prompt, GREEDY)) for prompt in prompts[:2]]
    coordinator = fleet.fleet["coordinator"]
    coordinator.send(signal.SIGKILL)
    await coordinator.wait()
    # What was running goes on, and what comes now is served by the plan that the gateway holds.
    asked += [asyncio.create_task(fleet.ask(prompt, GREEDY)) for prompt in prompts[2:]]
    assert [answer.tokens for answer in await asyncio.gather(*asked)] == alone
    await coordinator.start()
    await fleet.settled()
    assert (await fleet.ask(prompts[0], GREEDY)).tokens == alone[0]


@over_ucx
async def test_a_killed_prefill_or_decode_is_told_to_the_client(fleet: Running) -> None:
    """Last: the fleet is broken afterwards."""
    prompt = prompt_of(300, seed=60)
    call = fleet.start(prompt, replace(GREEDY, max_tokens=600))

    async def read_and_kill() -> None:
        got = 0
        async for response in call:
            got += len(response.tokens)
            if got >= 3:
                fleet.fleet["decode-0"].send(signal.SIGKILL)

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read_and_kill()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    fleet.fleet["prefill-0"].send(signal.SIGKILL)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await fleet.ask(prompt, GREEDY)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
