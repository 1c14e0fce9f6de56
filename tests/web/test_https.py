"""HTTPS that asks for certificates: who gets an answer, and that who gets none keeps nobody from it."""

import asyncio
import socket
import ssl
from typing import Any

import httpx
import pytest

from hexgen2 import metrics
from hexgen2.address import parse_address
from hexgen2.config import TlsConfig
from hexgen2.web.guard import Limits
from hexgen2.web.server import HttpServer
from tests.certificates import Authority
from tests.eventually import eventually


async def app(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


def context(ca: TlsConfig, own: TlsConfig | None) -> ssl.SSLContext:
    made = ssl.create_default_context(cafile=str(ca.ca))
    if own is not None:
        made.load_cert_chain(own.cert, own.key)
    return made


async def get(address: str, verify: ssl.SSLContext, scheme: str = "https") -> str:
    async with httpx.AsyncClient(verify=verify, trust_env=False) as http:
        try:
            return (await http.get(f"{scheme}://{address}/")).text
        except httpx.TransportError:
            return "no connection"


def count(kind: Any) -> float:
    return float(kind.labels("https")._value.get())


@pytest.mark.parametrize("who", ["nobody", "expired", "stranger", "plain"])
async def test_without_a_good_certificate_there_is_no_answer_and_others_have_theirs(
    who: str, authority: Authority, stranger: Authority
) -> None:
    trusted = authority.config("client")
    own = {
        "nobody": None,
        "expired": authority.config("expired"),
        "stranger": stranger.config("gateway"),
        "plain": None,
    }
    begun, failed = count(metrics.TLS_HANDSHAKES_BEGUN), count(metrics.TLS_HANDSHAKES_FAILED)
    server = HttpServer(app, "127.0.0.1:0", authority.files("gateway"), client_certs=True)
    address = await server.start()
    try:
        refused = await get(address, context(trusted, own[who]), "http" if who == "plain" else "https")
        assert refused == "no connection"
        assert await get(address, context(trusted, trusted)) == "ok"
        await eventually(lambda: count(metrics.TLS_HANDSHAKES_FAILED) == failed + 1)
        assert count(metrics.TLS_HANDSHAKES_BEGUN) == begun + 2
    finally:
        await server.stop()


async def test_a_client_that_does_not_trust_the_server_counts_as_failed(
    authority: Authority, stranger: Authority
) -> None:
    def connect(address: str) -> None:
        # As most clients do, and asyncio's do not, it says why it leaves.
        with (
            socket.create_connection(parse_address(address)) as plain,
            pytest.raises(ssl.SSLCertVerificationError),
            context(stranger.config("client"), None).wrap_socket(plain, server_hostname="127.0.0.1"),
        ):
            pass

    failed = count(metrics.TLS_HANDSHAKES_FAILED)
    server = HttpServer(app, "127.0.0.1:0", authority.files("gateway"))
    address = await server.start()
    try:
        await asyncio.to_thread(connect, address)
        await eventually(lambda: count(metrics.TLS_HANDSHAKES_FAILED) == failed + 1)
    finally:
        await server.stop()


async def test_a_flood_of_clients_that_shake_no_hands_keeps_nobody_out(authority: Authority) -> None:
    too_many = metrics.HTTP_CONNECTIONS_CLOSED.labels("too_many")._value
    before = too_many.get()
    server = HttpServer(app, "127.0.0.1:0", authority.files("gateway"), limits=Limits(max_connections=8))
    address = await server.start()
    host, port = parse_address(address)
    silent = [await asyncio.open_connection(host, port) for _ in range(40)]
    try:
        trusted = authority.config("client")
        assert await get(address, context(trusted, trusted)) == "ok"
        assert too_many.get() >= before + 32
        # The oldest had to go.
        async with asyncio.timeout(10):
            assert [await reader.read() for reader, _ in silent[:32]] == [b""] * 32
    finally:
        for _, writer in silent:
            writer.close()
        await server.stop()


async def test_a_handshake_has_the_time_of_a_head(authority: Authority) -> None:
    slow, failed = metrics.HTTP_CONNECTIONS_CLOSED.labels("slow")._value, count(metrics.TLS_HANDSHAKES_FAILED)
    before = slow.get()
    server = HttpServer(app, "127.0.0.1:0", authority.files("gateway"), limits=Limits(head_timeout_s=0.3))
    address = await server.start()
    reader, writer = await asyncio.open_connection(*parse_address(address))
    try:
        # The first three bytes of a ClientHello.
        writer.write(b"\x16\x03\x01")
        async with asyncio.timeout(10):
            assert await reader.read() == b""
        assert slow.get() == before + 1
        await eventually(lambda: count(metrics.TLS_HANDSHAKES_FAILED) == failed + 1)
    finally:
        writer.close()
        await server.stop()
