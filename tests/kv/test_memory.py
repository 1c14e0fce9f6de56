"""The faults that the memory transport can be told to have."""

import pytest
import torch

from hexgen2.kv.memory import MemoryNetwork, MemoryTransport
from hexgen2.kv.transport import Span, TransportError

SPANS = [Span(0, 0, 8), Span(8, 8, 8)]


class Pair:
    def __init__(self) -> None:
        self.network = MemoryNetwork()
        self.sender, self.reader = MemoryTransport(self.network), MemoryTransport(self.network)
        self.send = torch.arange(1, 17, dtype=torch.uint8)
        self.landing = torch.zeros(16, dtype=torch.uint8)
        self.sender.register(self.send, None)
        self.reader.register(None, self.landing)

    def read(self) -> int:
        return self.reader.read(self.sender.endpoint(), SPANS)


@pytest.fixture
def pair() -> Pair:
    return Pair()


def test_bytes_are_those_of_the_time_of_the_poll(pair: Pair) -> None:
    handle = pair.read()
    pair.send.fill_(7)
    assert not pair.landing.any()
    assert list(pair.reader.poll()) == [(handle, None)]
    assert torch.equal(pair.landing, pair.send)
    assert not pair.reader.needs_poll()


def test_a_delayed_read_takes_more_polls(pair: Pair) -> None:
    pair.network.delay_polls = 2
    handle = pair.read()
    assert [list(pair.reader.poll()) for _ in range(3)] == [[], [], [(handle, None)]]


def test_a_dropped_read_stays_open_until_it_is_released(pair: Pair) -> None:
    pair.network.drop = 1
    dropped, fine = pair.read(), pair.read()
    assert list(pair.reader.poll()) == [(fine, None)]
    assert list(pair.reader.poll()) == []
    assert pair.reader.needs_poll()
    pair.network.release()
    assert list(pair.reader.poll()) == [(dropped, None)]


def test_a_failing_read_has_written_half(pair: Pair) -> None:
    pair.network.fail = 1
    handle = pair.read()
    ((over, error),) = pair.reader.poll()
    assert (over, type(error)) == (handle, TransportError)
    assert pair.landing.tolist() == [*range(1, 9), *[0] * 8]


def test_a_corrupted_read_differs_in_one_bit(pair: Pair) -> None:
    pair.network.corrupt = 1
    handle = pair.read()
    assert list(pair.reader.poll()) == [(handle, None)]
    changed = pair.landing ^ pair.send
    assert sorted(changed.tolist()) == [0] * 15 + [0x10]


def test_reads_from_one_that_left_fail(pair: Pair) -> None:
    handle = pair.read()
    pair.sender.close()
    pair.sender.close()
    ((over, error),) = pair.reader.poll()
    assert (over, type(error)) == (handle, TransportError)
    with pytest.raises(TransportError, match="no peer"):
        pair.read()
