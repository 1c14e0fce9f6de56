"""Clients that say nothing, little or too slowly, and many of them: others are served meanwhile."""

import asyncio
from pathlib import Path

from hexgen2 import metrics
from tests.eventually import eventually
from tests.gateway.asking import ask
from tests.gateway.house import House, house

HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"


def closed(reason: str) -> float:
    return float(metrics.HTTP_CONNECTIONS_CLOSED.labels(reason)._value.get())


async def connect(made: House) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = made.http_address.partition(":")
    return await asyncio.open_connection(host, int(port))


async def ended(reader: asyncio.StreamReader) -> bytes:
    """What came until the server hung up."""
    data = b""
    async with asyncio.timeout(20):
        try:
            while part := await reader.read(1 << 16):
                data += part
        except ConnectionResetError:
            pass
    return data


async def test_who_brings_no_head_in_time_is_hung_up_on(folder: Path) -> None:
    async with house(folder, head_timeout_s=1.0) as made:
        made.answers("abc")
        before = closed("slow")
        silent, slow, again = await connect(made), await connect(made), await connect(made)
        again[1].write(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await again[0].readuntil(b"\r\n")).startswith(b"HTTP/1.1 200")
        # The next head of a connection that was served before has no more time than a first one.
        again[1].write(HEAD)
        slow[1].write(HEAD)

        async def drip() -> None:
            while True:
                slow[1].write(b"x")
                await asyncio.sleep(0.02)

        dripping = asyncio.create_task(drip())
        assert (await ask(made))[0] == 200
        assert [await ended(each[0]) for each in (silent, slow)] == [b"", b""]
        await ended(again[0])
        dripping.cancel()
        assert closed("slow") == before + 3
        assert (await ask(made))[0] == 200
        for _, writer in (silent, slow, again):
            writer.close()


async def test_who_brings_no_body_in_time_is_told(folder: Path) -> None:
    async with house(folder, request_timeout_s=0.3) as made:
        reader, writer = await connect(made)
        writer.write(HEAD + b"content-length: 100\r\nconnection: close\r\n\r\n{")
        assert (await ended(reader)).startswith(b"HTTP/1.1 504")
        assert made.gateway.num_running == 0
        writer.close()


async def test_who_takes_nothing_of_its_answer_is_hung_up_on(folder: Path) -> None:
    async with house(folder, unread_timeout_s=1.0) as made:
        before = closed("unread")
        _, writer = await connect(made)
        # Not until all is written: the answers to these are more than all buffers on the way can hold.
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        asking = asyncio.create_task(write_all(writer, b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n" * 2000))
        await eventually(lambda: closed("unread") > before)
        made.answers("abc")
        assert (await ask(made))[0] == 200
        asking.cancel()
        await asyncio.wait((asking,))
        writer.close()


async def write_all(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(data)
    await writer.drain()


async def test_a_long_answer_is_no_slow_head(folder: Path) -> None:
    async with house(folder, head_timeout_s=1.0) as made:
        asking = asyncio.create_task(ask(made))
        await made.prefills[0].first_call()
        await asyncio.sleep(1.5)
        assert not asking.done()
        asking.cancel()
        await asyncio.wait((asking,))


async def test_a_flood_of_connections_keeps_nobody_out(folder: Path) -> None:
    async with house(folder, max_http_connections=8) as made:
        made.answers("abc")
        before = closed("too_many")
        flood = [await connect(made) for _ in range(40)]
        assert (await ask(made))[0] == 200
        assert closed("too_many") >= before + 32
        # The oldest had to go.
        assert [await ended(reader) for reader, _ in flood[:32]] == [b""] * 32
        assert (await ask(made))[0] == 200
        for _, writer in flood:
            writer.close()
