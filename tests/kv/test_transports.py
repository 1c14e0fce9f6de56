"""What every transport must do, done by all of them: TCP and UCX between processes, the memory twin within one."""

import random
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from time import monotonic, sleep

import pytest
import torch

from hexgen2.kv.choose import make_transports
from hexgen2.kv.memory import MemoryNetwork, MemoryTransport
from hexgen2.kv.transport import Span, Transport, TransportError
from hexgen2.kv.ucx import NIXL_MODULES, UcxTransport
from tests.kv.serving_peer import Peer, contents, serving_peer

MIB = 1 << 20
SEND_BYTES = 4 * MIB
LIMIT_S = 30.0

needs_nixl = pytest.mark.skipif(not any(map(find_spec, NIXL_MODULES)), reason="NIXL is not installed")
#: UCX as it comes (shared memory between these processes), and as between hosts without RDMA.
UCX = [pytest.param("ucx", marks=needs_nixl), pytest.param("ucx-tcp", marks=needs_nixl)]
#: Where a read needs the peer's process to run.
COOPERATIVE = ["tcp", pytest.param("ucx-tcp", marks=needs_nixl)]


@pytest.fixture(scope="module", params=["memory", "tcp", *UCX])
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "ucx-tcp":
            patch.setenv("UCX_TLS", "tcp")
        yield request.param


class Rig:
    """A reader in this process and the peer it reads from."""

    def __init__(self, kind: str, stack: ExitStack) -> None:
        self.landing = torch.zeros(SEND_BYTES, dtype=torch.uint8)
        self.process: Peer | None = None
        self.reader: Transport
        if kind == "memory":
            network = MemoryNetwork()
            sender = MemoryTransport(network)
            self.send = contents(SEND_BYTES, 1)
            sender.register(self.send, None)
            self.endpoint = sender.endpoint()
            self.reader = MemoryTransport(network)
        else:
            self.process = stack.enter_context(serving_peer(kind.split("-")[0], SEND_BYTES))
            self.endpoint, self.send = self.process.endpoint, self.process.send
            self.reader = make_transports(kind.split("-")[0], "127.0.0.1")[0]
        stack.callback(self.reader.close)
        self.reader.register(None, self.landing)

    def finish(self, handles: Sequence[int]) -> dict[int, TransportError | None]:
        return finish(self.reader, handles)


def finish(reader: Transport, handles: Sequence[int]) -> dict[int, TransportError | None]:
    """Poll until all are over."""
    over: dict[int, TransportError | None] = {}
    end = monotonic() + LIMIT_S
    while not over.keys() >= set(handles):
        assert monotonic() < end, f"reads {set(handles) - over.keys()} are not over after {LIMIT_S} s"
        for handle, error in reader.poll():
            assert handle not in over, "a read was over twice"
            over[handle] = error
        sleep(1e-4)
    return over


def stays_open(reader: Transport, polls: int = 300) -> bool:
    for _ in range(polls):
        if reader.poll():
            return False
        sleep(1e-3)
    return True


@pytest.fixture(scope="module")
def rig(kind: str) -> Iterator[Rig]:
    with ExitStack() as stack:
        yield Rig(kind, stack)


def test_bytes_land_where_they_belong_and_nowhere_else(rig: Rig) -> None:
    rng = random.Random(1)
    for _ in range(20):
        rig.landing.zero_()
        expected = torch.zeros_like(rig.landing)
        spans, at = [], 0
        for _ in range(rng.randint(1, 200)):
            size = rng.choice([0, 1, 3, 64, rng.randint(1, 20_000)])
            remote = rng.randint(0, SEND_BYTES - size)
            at += rng.choice([0, 0, 1, 100])
            spans.append(Span(remote, at, size))
            expected[at : at + size] = rig.send[remote : remote + size]
            at += size
        rng.shuffle(spans)
        assert set(rig.finish([rig.reader.read(rig.endpoint, spans)]).values()) == {None}
        assert torch.equal(rig.landing, expected)


def test_the_whole_buffer_in_one_read(rig: Rig) -> None:
    rig.landing.zero_()
    assert set(rig.finish([rig.reader.read(rig.endpoint, [Span(0, 0, SEND_BYTES)])]).values()) == {None}
    assert torch.equal(rig.landing, rig.send)


def test_many_reads_at_once_are_each_over_once(rig: Rig) -> None:
    rig.landing.zero_()
    size = SEND_BYTES // 256
    order = list(range(256))
    random.Random(2).shuffle(order)
    handles = [rig.reader.read(rig.endpoint, [Span(i * size, i * size, size)]) for i in order]
    assert rig.reader.needs_poll() or rig.reader.selectable()
    assert rig.finish(handles) == dict.fromkeys(handles)
    assert len(set(handles)) == 256
    assert torch.equal(rig.landing, rig.send)


@pytest.mark.parametrize("spans", [[], [Span(0, 0, 0)]])
def test_a_read_of_nothing_is_over_too(rig: Rig, spans: list[Span]) -> None:
    assert set(rig.finish([rig.reader.read(rig.endpoint, spans)]).values()) == {None}


@pytest.mark.parametrize(
    ("span", "message"),
    [
        (Span(SEND_BYTES - 1, 0, 2), "outside the peer's send buffer"),
        (Span(0, SEND_BYTES - 1, 2), "outside our landing buffer"),
        (Span(-1, 0, 2), "negative"),
        (Span(0, 0, -2), "negative"),
    ],
)
def test_spans_out_of_bounds_are_refused_and_the_next_read_works(rig: Rig, span: Span, message: str) -> None:
    with pytest.raises(TransportError, match=message):
        rig.reader.read(rig.endpoint, [Span(0, 0, 1), span])
    assert set(rig.finish([rig.reader.read(rig.endpoint, [Span(0, 0, 1)])]).values()) == {None}


@pytest.mark.parametrize("endpoint", [b"", b"?", b"\x95" * 40, bytes(200)])
def test_what_is_no_endpoint_is_refused(rig: Rig, endpoint: bytes) -> None:
    with pytest.raises(TransportError):
        rig.reader.read(endpoint, [Span(0, 0, 1)])


def test_an_idle_reader_need_not_be_polled(rig: Rig) -> None:
    assert not rig.reader.needs_poll()


def test_says_what_it_is(kind: str, rig: Rig) -> None:
    rig.finish([rig.reader.read(rig.endpoint, [Span(0, 0, 1)])])
    said = rig.reader.describe()
    assert said.startswith(rig.reader.name)
    if kind == "ucx-tcp":
        # UCX itself says what carried the read.
        assert said == "ucx (tcp/lo)"


def test_reads_are_direct_where_no_peer_can_delay_them(kind: str) -> None:
    with ExitStack() as stack:
        rig = Rig(kind, stack)
        if isinstance(rig.reader, UcxTransport):
            # How this process has read by other contexts counts, too.
            assert rig.reader._log._file is not None
            rig.reader._log._file.paths.clear()
            assert not rig.reader.is_direct(rig.endpoint), "UCX tells after the first read"
        handle = rig.reader.read(rig.endpoint, [Span(0, 0, 1)])
        rig.finish([handle])
        assert rig.reader.is_direct(rig.endpoint) is (kind in ("tcp", "ucx"))
        assert not rig.reader.revoke(handle), "it is over"


def test_a_read_that_is_revoked_writes_nothing_more_and_the_next_one_does() -> None:
    with ExitStack() as stack:
        rig = Rig("tcp", stack)
        assert rig.process is not None
        rig.finish([rig.reader.read(rig.endpoint, [Span(0, 0, 1)])])
        rig.process.signal(signal.SIGSTOP)
        half = SEND_BYTES // 2
        given_up, kept = (rig.reader.read(rig.endpoint, [Span(0, at, half)]) for at in (0, half))
        assert stays_open(rig.reader, polls=3)
        rig.landing.zero_()
        assert rig.reader.revoke(given_up)
        rig.process.signal(signal.SIGCONT)
        assert rig.finish([given_up, kept]) == {given_up: None, kept: None}
        assert not rig.landing[:half].any()
        assert torch.equal(rig.landing[half:], rig.send[:half])


@pytest.mark.parametrize("kind", COOPERATIVE, indirect=True, scope="function")
def test_a_stopped_peer_keeps_its_read_open_until_it_goes_on(kind: str) -> None:
    with ExitStack() as stack:
        rig = Rig(kind, stack)
        assert rig.process is not None
        rig.finish([rig.reader.read(rig.endpoint, [Span(0, 0, 1)])])
        rig.process.signal(signal.SIGSTOP)
        handle = rig.reader.read(rig.endpoint, [Span(0, 0, SEND_BYTES)])
        assert stays_open(rig.reader)
        rig.process.signal(signal.SIGCONT)
        assert rig.finish([handle]) == {handle: None}
        assert torch.equal(rig.landing, rig.send)


@pytest.mark.parametrize("kind", COOPERATIVE, indirect=True, scope="function")
def test_a_peer_killed_in_mid_read_ends_all_its_reads_and_no_others(kind: str) -> None:
    with ExitStack() as stack:
        rig = Rig(kind, stack)
        other = stack.enter_context(serving_peer(rig.reader.name, SEND_BYTES, seed=2))
        assert rig.process is not None
        rig.finish([rig.reader.read(endpoint, [Span(0, 0, 1)]) for endpoint in (rig.endpoint, other.endpoint)])
        rig.process.signal(signal.SIGSTOP)
        half = SEND_BYTES // 2
        doomed = [rig.reader.read(rig.endpoint, [Span(0, 0, half)]) for _ in range(3)]
        fine = rig.reader.read(other.endpoint, [Span(half, half, half)])
        assert rig.finish([fine]) == {fine: None}
        rig.process.kill()
        over = rig.finish(doomed)
        assert all(isinstance(over[handle], TransportError) for handle in doomed)
        landed = rig.landing.clone()
        assert torch.equal(landed[half:], other.send[half:])
        assert stays_open(rig.reader)
        assert torch.equal(rig.landing, landed), "bytes landed after the read was over"
        assert not rig.reader.needs_poll()


@pytest.mark.parametrize("kind", ["tcp", *UCX], indirect=True, scope="function")
def test_a_peer_that_came_back_is_read_by_its_new_endpoint_only(kind: str) -> None:
    with ExitStack() as stack:
        rig = Rig(kind, stack)
        assert rig.process is not None
        rig.finish([rig.reader.read(rig.endpoint, [Span(0, 0, 1)])])
        rig.process.kill()
        successor = stack.enter_context(serving_peer(rig.reader.name, SEND_BYTES, seed=3))
        for _ in range(2):  # once it finds the old connection, once it makes a new one
            with pytest.raises(TransportError):  # posted or not
                raise next(filter(None, rig.finish([rig.reader.read(rig.endpoint, [Span(0, 0, 9)])]).values()))
        handle = rig.reader.read(successor.endpoint, [Span(0, 0, SEND_BYTES)])
        assert rig.finish([handle]) == {handle: None}
        assert torch.equal(rig.landing, successor.send)


@pytest.mark.parametrize("kind", COOPERATIVE, indirect=True, scope="function")
def test_closing_with_a_read_in_flight_ends_it(kind: str) -> None:
    """And nothing lands later, when the peer goes on."""
    with ExitStack() as stack:
        rig = Rig(kind, stack)
        assert rig.process is not None
        rig.finish([rig.reader.read(rig.endpoint, [Span(0, 0, 1)])])
        rig.landing.zero_()
        rig.process.signal(signal.SIGSTOP)
        rig.reader.read(rig.endpoint, [Span(0, 0, SEND_BYTES)])
        assert stays_open(rig.reader, polls=50)
        rig.reader.close()
        rig.reader.close()
        rig.process.signal(signal.SIGCONT)
        sleep(0.5)
        assert not rig.landing.any()


@pytest.mark.parametrize("kind", ["tcp", *UCX], indirect=True, scope="function")
def test_a_process_that_served_ends_cleanly(kind: str) -> None:
    with ExitStack() as stack:
        rig = Rig(kind, stack)
        assert rig.process is not None
        rig.finish([rig.reader.read(rig.endpoint, [Span(0, 0, SEND_BYTES)])])
        assert rig.process.stop() == 0
