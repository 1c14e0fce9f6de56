"""Peers that are stopped, not dead: over real sockets, from processes of their own."""

import signal
from collections.abc import Sequence
from contextlib import ExitStack
from time import monotonic, sleep

import pytest
import torch

from hexgen2.kv.choose import make_transports
from hexgen2.kv.reads import Claim, Reads
from tests.kv.read_job import Job
from tests.kv.serving_peer import Peer, serving_peer

MIB = 1 << 20
SLOT = 64 << 10
SEND_BYTES = 16 * MIB
LIMIT_S = 30.0
STALL_S = 1.0


class Rig:
    """Reads everything once; ``peers`` hold the same bytes, as two network cards of one rank do."""

    def __init__(self, stack: ExitStack, num_routes: int) -> None:
        self.peers: list[Peer] = [
            stack.enter_context(serving_peer("tcp", SEND_BYTES, seed=1)) for _ in range(num_routes)
        ]
        transports = make_transports("tcp", ",".join(f"127.0.0.{1 + n}" for n in range(num_routes)))
        self.reads: Reads[Job] = Reads(transports, 64 * SLOT, SLOT, torch.device("cpu"), STALL_S)
        for transport in transports:
            stack.callback(transport.close)
            transport.register(None, self.reads.landing)
        self.claim = Claim()
        self.landed: set[int] = set()
        self.lost: dict[int, str] = {}

    def add(self, numbers: Sequence[int]) -> None:
        endpoints = tuple(peer.endpoint for peer in self.peers)
        for number in numbers:
            self.reads.add(Job(number, self.claim, endpoints, SLOT))

    def turn(self) -> None:
        for bundle in self.reads.poll():
            for job, slots in bundle.pieces:
                (at,), send = self.reads.offsets(job, slots), self.peers[0].send
                assert torch.equal(self.reads.landing[at : at + SLOT], send[job.number * SLOT :][:SLOT])
                assert job.number not in self.landed
                self.landed.add(job.number)
            self.reads.free(bundle)
        self.lost |= {job.number: why for job, why in self.reads.pump()}
        sleep(1e-4)

    def run(self) -> None:
        end = monotonic() + LIMIT_S
        while self.reads.busy:
            assert monotonic() < end
            self.turn()


@pytest.fixture
def rig(request: pytest.FixtureRequest) -> Rig:
    stack = ExitStack()
    request.addfinalizer(stack.close)  # noqa: PT021, the number of routes is the test's
    return Rig(stack, request.param)


@pytest.mark.parametrize("rig", [2], indirect=True)
def test_the_pieces_of_a_stopped_peer_come_over_the_other_route(rig: Rig) -> None:
    rig.add(range(16))
    rig.run()
    rig.peers[1].signal(signal.SIGSTOP)
    rig.add(range(16, 256))
    rig.run()
    assert rig.landed == set(range(256))
    assert not rig.lost
    assert rig.reads.quarantine_bytes == 0, "a closed connection writes nothing"


@pytest.mark.parametrize("rig", [1], indirect=True)
def test_a_stopped_peer_without_another_route_loses_its_pieces_and_works_again_later(rig: Rig) -> None:
    rig.peers[0].signal(signal.SIGSTOP)
    rig.add(range(256))
    rig.run()
    assert rig.lost[255] == "no byte for 1 s"
    assert rig.reads.quarantine_bytes == 0
    rig.peers[0].signal(signal.SIGCONT)
    rig.claim = Claim()
    end = monotonic() + LIMIT_S
    while 7 not in rig.landed and monotonic() < end:  # it rests first
        rig.add([7])
        rig.run()
        sleep(0.1)
    assert 7 in rig.landed
