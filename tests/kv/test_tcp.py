"""TcpTransport against peers that do not play by the rules, and how it sleeps."""

import select
import socket
from collections.abc import Iterator
from contextlib import closing
from time import monotonic

import pytest
import torch

from hexgen2.errors import ConfigError
from hexgen2.kv import tcp_server
from hexgen2.kv import tcp_wire as wire
from hexgen2.kv.tcp import TcpTransport
from hexgen2.kv.transport import Span, TransportError

SIZE = 1 << 20
LIMIT_S = 20.0


@pytest.fixture
def server() -> Iterator[TcpTransport]:
    transport = TcpTransport("127.0.0.1")
    transport.register(torch.arange(SIZE, dtype=torch.int32).to(torch.uint8), None)
    with closing(transport):
        yield transport


@pytest.fixture
def reader() -> Iterator[TcpTransport]:
    transport = TcpTransport("127.0.0.1")
    transport.register(None, torch.zeros(SIZE, dtype=torch.uint8))
    with closing(transport):
        yield transport


def connect(server: TcpTransport) -> socket.socket:
    endpoint = wire.Endpoint.unpack(server.endpoint())
    return socket.create_connection((endpoint.host, endpoint.port), timeout=LIMIT_S)


def answer(server: TcpTransport, client: socket.socket, num_bytes: int) -> bytes:
    """The first bytes that a raw client is sent; fewer when the server hung up."""
    client.setblocking(False)
    data = b""
    end = monotonic() + LIMIT_S
    while len(data) < num_bytes and monotonic() < end:
        server.poll()
        if select.select([client], [], [], 0.001)[0]:
            try:
                part = client.recv(num_bytes - len(data))
            except ConnectionResetError:
                break
            if not part:
                break
            data += part
    return data


def outcome(reader: TcpTransport, *others: TcpTransport) -> TransportError | None:
    """Of the one read that is open."""
    end = monotonic() + LIMIT_S
    while monotonic() < end:
        for other in others:
            other.poll()
        select.select(reader.selectable(), [], [], 0 if others else 0.1)
        for _, error in reader.poll():
            return error
    raise AssertionError("the read is not over")


def read_now(reader: TcpTransport, endpoint: bytes) -> None:
    """Raises why the read failed, be it at once or by poll, as the kernel likes."""
    reader.read(endpoint, [Span(0, 0, 4)])
    if (error := outcome(reader)) is not None:
        raise error


def test_sleepers_wake_by_their_descriptor_and_idle_ones_stay_asleep(
    server: TcpTransport, reader: TcpTransport
) -> None:
    for transport in (server, reader):
        assert not transport.needs_poll()
        assert select.select(transport.selectable(), [], [], 0)[0] == []
    reader.read(server.endpoint(), [Span(0, 0, SIZE)])
    woken: list[str] = []
    while not woken or woken[-1] != "over":
        ready = select.select([*server.selectable(), *reader.selectable()], [], [], LIMIT_S)[0]
        assert ready, "nobody is woken"
        if server.selectable()[0] in ready:
            server.poll()
        if reader.selectable()[0] in ready:
            woken.append("over" if reader.poll() else "some")
    assert not reader.needs_poll()
    assert select.select([*server.selectable(), *reader.selectable()], [], [], 0)[0] == []


def test_a_wrong_nonce_ends_all_reads_with_the_reason_and_harms_nobody_else(
    server: TcpTransport, reader: TcpTransport
) -> None:
    good = wire.Endpoint.unpack(server.endpoint())
    stale = wire.Endpoint(good.host, good.port, bytes(wire.NONCE_BYTES), good.num_bytes).pack()
    handles = {reader.read(stale, [Span(0, 0, 4)]) for _ in range(3)}
    end = monotonic() + LIMIT_S
    over: dict[int, TransportError | None] = {}
    while len(over) < 3 and monotonic() < end:
        server.poll()
        over.update(reader.poll())
    assert over.keys() == handles
    assert all("not served here (any more)" in str(error) for error in over.values())
    reader.read(server.endpoint(), [Span(0, 0, SIZE)])
    assert outcome(reader, server) is None


def test_the_server_checks_bounds_itself(server: TcpTransport) -> None:
    nonce = wire.Endpoint.unpack(server.endpoint()).nonce
    with connect(server) as client:
        client.sendall(wire.pack_hello(nonce) + wire.pack_request(7, [Span(0, 0, 4), Span(SIZE - 1, 0, 2)]))
        read_id, status, length = wire.ANSWER.unpack(answer(server, client, wire.ANSWER.size))
        assert (read_id, status) == (7, wire.REFUSED)
        assert b"outside the send buffer" in answer(server, client, length)
        client.setblocking(True)
        client.sendall(wire.pack_request(8, [Span(0, 0, 4)]))
        assert answer(server, client, wire.ANSWER.size + 4) == wire.ANSWER.pack(8, wire.OK, 4) + bytes((0, 1, 2, 3))


@pytest.mark.parametrize("greeting", [b"GET / HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n", bytes(4096)])
def test_strangers_are_told_nothing_but_that(server: TcpTransport, greeting: bytes) -> None:
    with connect(server) as client:
        client.sendall(greeting)
        _, status, length = wire.ANSWER.unpack(answer(server, client, wire.ANSWER.size))
        assert status == wire.REFUSED
        assert length <= wire.MAX_REFUSAL_BYTES


def test_absurd_requests_end_the_connection(server: TcpTransport) -> None:
    with connect(server) as client:
        client.sendall(
            wire.pack_hello(wire.Endpoint.unpack(server.endpoint()).nonce) + wire.REQUEST.pack(1, wire.MAX_SPANS + 1)
        )
        assert answer(server, client, 1) == b""


def test_a_hello_may_come_byte_by_byte(server: TcpTransport) -> None:
    with connect(server) as client:
        for byte in wire.pack_hello(wire.Endpoint.unpack(server.endpoint()).nonce) + wire.pack_request(1, []):
            client.setblocking(True)
            client.sendall(bytes([byte]))
            server.poll()
        assert answer(server, client, wire.ANSWER.size) == wire.ANSWER.pack(1, wire.OK, 0)


def test_connections_are_bounded_and_silent_ones_go_first(
    server: TcpTransport, reader: TcpTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcp_server, "_MAX_PEERS", 3)
    reader.read(server.endpoint(), [Span(0, 0, 1)])
    assert outcome(reader, server) is None
    strangers = [connect(server) for _ in range(5)]
    try:
        for _ in range(20):
            server.poll()
        assert server._server is not None
        assert len(server._server.peers) == 3
        reader.read(server.endpoint(), [Span(0, 0, 1)])
        assert outcome(reader, server) is None
    finally:
        for stranger in strangers:
            stranger.close()


@pytest.mark.parametrize(
    ("says", "message"),
    [
        (b"", "closed the connection"),
        (wire.ANSWER.pack(1, wire.OK, 4)[:5], "closed the connection"),
        (wire.ANSWER.pack(1, wire.OK, 4) + b"ab", "closed the connection"),
        (wire.ANSWER.pack(1, wire.OK, 5), "what was not asked"),
        (wire.ANSWER.pack(2, wire.OK, 4), "what was not asked"),
        (wire.ANSWER.pack(1, 9, 4), "what was not asked"),
        (wire.ANSWER.pack(1, wire.REFUSED, 1 << 40), "what was not asked"),
        (wire.ANSWER.pack(1, wire.REFUSED, 2) + b"no", "refused: no"),
    ],
)
def test_a_peer_that_answers_wrongly_fails_the_read(reader: TcpTransport, says: bytes, message: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(LIMIT_S)
        endpoint = wire.Endpoint("127.0.0.1", listening.getsockname()[1], bytes(wire.NONCE_BYTES), SIZE)
        reader.read(endpoint.pack(), [Span(0, 0, 4)])
        reader.poll()
        accepted, _ = listening.accept()
        with accepted:
            accepted.settimeout(LIMIT_S)
            expected = wire.HELLO.size + wire.REQUEST.size + wire.SPAN.size
            while expected:
                reader.poll()
                expected -= len(accepted.recv(expected))
            accepted.sendall(says)
        error = outcome(reader)
    assert isinstance(error, TransportError)
    assert message in str(error)


def test_nobody_listening_fails_the_read(reader: TcpTransport) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    endpoint = wire.Endpoint("127.0.0.1", port, bytes(wire.NONCE_BYTES), SIZE).pack()
    with pytest.raises(TransportError, match="cannot connect"):
        read_now(reader, endpoint)


def test_idle_connections_are_bounded(reader: TcpTransport, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hexgen2.kv.tcp._MAX_CONNECTIONS", 2)
    for _ in range(4):
        server = TcpTransport("127.0.0.1")
        with closing(server):
            server.register(torch.zeros(4, dtype=torch.uint8), None)
            reader.read(server.endpoint(), [Span(0, 0, 4)])
            assert outcome(reader, server) is None
            assert len(reader._connections) <= 2


@pytest.mark.parametrize("host", ["", "0.0.0.0", "::"])
def test_a_host_that_peers_cannot_reach_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match=r"kv\.host"):
        TcpTransport(host)


def test_a_host_that_is_not_ours_is_refused() -> None:
    with closing(TcpTransport("192.0.2.77")) as transport, pytest.raises(ConfigError, match=r"kv\.host: cannot listen"):
        transport.register(torch.zeros(4, dtype=torch.uint8), None)


def test_device_memory_is_refused() -> None:
    with closing(TcpTransport("127.0.0.1")) as transport, pytest.raises(ConfigError, match="host memory only"):
        transport.register(None, torch.zeros(4, dtype=torch.uint8, device="meta"))


def test_serves_on_ipv6(reader: TcpTransport) -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    with closing(TcpTransport("::1")) as server:
        server.register(torch.full((4,), 9, dtype=torch.uint8), None)
        reader.read(server.endpoint(), [Span(0, 0, 4)])
        assert outcome(reader, server) is None
