"""KV over TCP with TLS: who may read, and certificates that change while reads go on."""

from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
import torch

from hexgen2.kv.tcp import TcpTransport
from hexgen2.kv.transport import Span, TransportError
from hexgen2.security import certs
from hexgen2.security.tls import TlsFiles
from tests.certificates import Authority
from tests.kv.test_tcp import outcome

SIZE = 9 << 20
DATA = torch.arange(SIZE, dtype=torch.int32).to(torch.uint8)


def serving(tls: TlsFiles | None) -> TcpTransport:
    transport = TcpTransport("127.0.0.1", tls)
    transport.register(DATA, None)
    return transport


def reading(tls: TlsFiles | None) -> tuple[TcpTransport, torch.Tensor]:
    landing = torch.zeros(SIZE, dtype=torch.uint8)
    transport = TcpTransport("127.0.0.1", tls)
    transport.register(None, landing)
    return transport, landing


@pytest.fixture
def server(authority: Authority) -> Iterator[TcpTransport]:
    with closing(serving(authority.files("worker"))) as server:
        yield server


def read(reader: TcpTransport, server: TcpTransport, spans: list[Span]) -> TransportError | None:
    try:
        reader.read(server.endpoint(), spans)
    except TransportError as error:
        return error
    return outcome(reader, server)


def test_what_is_read_is_what_is_served(authority: Authority, server: TcpTransport) -> None:
    reader, landing = reading(authority.files("worker"))
    with closing(reader):
        assert (reader.name, server.describe()) == ("tcp+tls", "tcp+tls")
        # More than one turn, then many small pieces of no regular size.
        assert read(reader, server, [Span(0, 0, SIZE)]) is None
        assert torch.equal(landing, DATA)
        landing.zero_()
        spans = [Span(at, at, min(9973, SIZE - at)) for at in range(0, SIZE, 20_011)]
        assert read(reader, server, spans) is None
        for span in spans:
            part = slice(span.local_offset, span.local_offset + span.num_bytes)
            assert torch.equal(landing[part], DATA[part])
        assert int(landing.count_nonzero()) < SIZE // 2


def test_a_server_that_is_known_by_name_is_found_by_address_and_trusted_by_name(authority: Authority) -> None:
    """As containers are, whose addresses nobody knows beforehand."""
    named = authority.issue("named", "worker", hosts=["localhost"])
    reader, landing = reading(authority.files("worker"))
    with closing(TcpTransport("localhost", named)) as server, closing(reader):
        server.register(DATA, None)
        assert read(reader, server, [Span(0, 0, SIZE)]) is None
        assert torch.equal(landing, DATA)
    with closing(serving(named)) as server:
        reader, _ = reading(authority.files("worker"))
        with closing(reader):
            assert "certificate is not valid for '127.0.0.1'" in str(read(reader, server, [Span(0, 0, SIZE)]))


@pytest.mark.parametrize("who", ["stranger", "expired", "client", "plain"])
def test_who_is_no_worker_of_this_fleet_reads_nothing(
    who: str, authority: Authority, stranger: Authority, server: TcpTransport
) -> None:
    files = {
        "stranger": stranger.files("worker"),
        "expired": authority.files("expired"),
        "client": authority.files("client"),
        "plain": None,
    }
    good, _ = reading(authority.files("worker"))
    bad, landing = reading(files[who])
    with closing(good), closing(bad):
        assert read(good, server, [Span(0, 0, 4)]) is None
        assert read(bad, server, [Span(0, 0, SIZE)]) is not None
        assert not landing.any()
        assert read(good, server, [Span(0, 0, SIZE)]) is None
    assert (server.failed_handshakes(), server.failed_handshakes()) == (1, 0), "counted once"


@pytest.mark.parametrize("who", ["stranger", "expired", "client", "elsewhere", "plain"])
def test_nothing_is_read_from_who_is_no_worker_of_this_fleet(
    who: str, authority: Authority, stranger: Authority
) -> None:
    files = {
        "stranger": stranger.files("worker"),
        "plain": None,
        **{each: authority.files(each) for each in ("expired", "client", "elsewhere")},
    }
    reader, landing = reading(authority.files("worker"))
    with closing(reader), closing(serving(files[who])) as bad:
        if who == "plain":
            # It takes our hello for one that it does not know, and hangs up or waits for more: not for our secrets.
            reader.read(bad.endpoint(), [Span(0, 0, 4)])
            for _ in range(50):
                bad.poll()
                reader.poll()
        else:
            assert read(reader, bad, [Span(0, 0, SIZE)]) is not None
        assert not landing.any()


def test_new_connections_use_new_certificates(authority: Authority, tmp_path: Path) -> None:
    mine = authority.copied(tmp_path / "certs")
    with ExitStack() as stack:
        server = stack.enter_context(closing(serving(mine.files("worker"))))
        old, _ = reading(mine.files("worker"))
        stack.callback(old.close)
        assert read(old, server, [Span(0, 0, SIZE)]) is None
        for _ in range(3):
            certs.renew(mine.folder, days=1)
            fresh, landing = reading(mine.files("worker"))
            stack.callback(fresh.close)
            # A connection that stands goes on; one that is made now uses the new ones, here and there.
            assert read(old, server, [Span(0, 0, SIZE)]) is None
            assert read(fresh, server, [Span(0, 0, SIZE)]) is None
            assert torch.equal(landing, DATA)
            old._connections[server.endpoint()].close()
            assert read(old, server, [Span(0, 0, SIZE)]) is None
