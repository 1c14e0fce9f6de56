"""A client that leaves, at each step, over both APIs: everything behind it is cancelled."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from hexgen2.address import parse_address
from hexgen2.v1 import gateway_pb2, types_pb2
from tests.eventually import eventually
from tests.gateway.house import House, Worker, first_token, house, rest, silent

Prepare = Callable[[House], None]


def nothing_yet(made: House) -> None:
    """Prefill has not made its first token."""


def after_first_token(made: House) -> None:
    """The KV is on its way."""
    made.prefills[0].script = first_token(made.ids("o")[0])


def after_verified(made: House) -> None:
    """Tokens flow."""
    after_first_token(made)
    made.decodes[0].script = rest(made.ids("k"), hold=True)


STEPS = [nothing_yet, after_first_token, after_verified]


@asynccontextmanager
async def connection(made: House, request: bytes) -> AsyncIterator[asyncio.StreamReader]:
    """A plain connection that has sent ``request``; closed at the end, whatever was answered."""
    host, port = parse_address(made.http_address)
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(request)
        await writer.drain()
        yield reader
    finally:
        writer.close()
        await writer.wait_closed()


def post(body: bytes, length: int | None = None) -> bytes:
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body) if length is None else length}\r\n\r\n"
    )
    return head.encode() + body


async def all_cancelled(made: House) -> None:
    """Both workers' calls are over, cancelled from outside."""

    def called(worker: Worker) -> bool:
        return bool(worker.calls)

    for worker in (*made.prefills, *made.decodes):
        assert called(worker)
        assert await worker.calls[0].ended()
    await eventually(lambda: made.gateway.num_running == 0)


async def both_called(made: House) -> None:
    for worker in (*made.prefills, *made.decodes):
        await worker.called.wait()


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("streamed", ["true", "false"])
async def test_over_http(folder: Path, step: Prepare, streamed: str) -> None:
    async with house(folder) as made:
        step(made)
        body = f'{{"prompt": "x", "max_tokens": 20, "stream": {streamed}}}'.encode()
        async with connection(made, post(body)) as reader:
            await both_called(made)
            if streamed == "true" and step is not nothing_yet:
                async with asyncio.timeout(10):
                    await reader.readuntil(b'"text":"k"' if step is after_verified else b'"text":"o"')
        await all_cancelled(made)


async def text(call: "grpc.aio.UnaryStreamCall[Any, gateway_pb2.GenerateResponse]") -> str:
    """Of the next message."""
    message = await call.read()
    assert isinstance(message, gateway_pb2.GenerateResponse)
    return message.text


@pytest.mark.parametrize("step", STEPS)
async def test_over_grpc(folder: Path, step: Prepare) -> None:
    async with house(folder) as made:
        step(made)
        request = gateway_pb2.GenerateRequest(prompt="x", sampling=types_pb2.SamplingParams(max_tokens=20))
        call = made.stub.Generate(request, timeout=30)
        await both_called(made)
        if step is not nothing_yet:
            assert await text(call) == "o"
        if step is after_verified:
            assert await text(call) == "k"
        call.cancel()
        await all_cancelled(made)


async def test_before_its_body_was_whole(folder: Path) -> None:
    async with house(folder) as made:
        async with connection(made, post(b'{"prompt": "x"', length=1000)):
            await eventually(lambda: made.gateway.num_running == 1)
        await eventually(lambda: made.gateway.num_running == 0)
        assert made.prefills[0].calls == []


async def test_one_token_that_prefill_still_makes(folder: Path) -> None:
    async with house(folder) as made:
        made.prefills[0].script = silent
        async with connection(made, post(b'{"prompt": "x", "max_tokens": 1}')):
            await made.prefills[0].called.wait()
        assert await made.prefills[0].calls[0].ended()
