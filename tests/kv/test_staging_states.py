"""The memory that KV arrives in, under any order of announcements, reads that finish late or never, damage and ends:
nothing is staged that was not sent, and in the end no slot, no page and no quarantine is left."""

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hexgen2.kv.codec import to_wire
from hexgen2.kv.codecs import NONE
from hexgen2.kv.memory import MemoryNetwork, MemoryTransport
from hexgen2.kv.messages import Failed, Fetched, OpenRecv, Piece, Source
from hexgen2.kv.send_buffer import SendBuffer
from hexgen2.kv.staging import Staging
from hexgen2.kv.wire import CHUNK_TOKENS, KvShape, PageLayout, RankSlice, chunk_span, num_chunks
from tests.kv.fleet import random_kv

SHAPE = KvShape(num_layers=2, num_kv_heads=1, head_dim=2, dtype="float32")
SLICE = RankSlice(0, 0, 2, 0, 1)
LAYOUT = PageLayout(SHAPE, SLICE)
CPU = torch.device("cpu")
PAGES = 4
SLOTS = 3
INDEX = st.integers(0, 1000)


class Transfer:
    """One hand-off; its token is its own."""

    def __init__(self, number: int, num_tokens: int, pages: tuple[int, ...]) -> None:
        self.id = f"t{number}"
        self.token = number.to_bytes(16, "little")
        self.num_tokens = num_tokens
        self.pages = pages
        self.kv = random_kv(SHAPE, num_tokens, seed=number)
        self.announced: list[Piece] = []
        self.waiting = [(layer, chunk) for chunk in range(num_chunks(num_tokens)) for layer in range(2)]
        self.send_pages: tuple[int, ...] = ()
        self.sending = True
        self.told: list[Fetched | Failed] = []
        self.pinned = False
        self.closing = False


class StagingMachine(RuleBasedStateMachine):
    """One sender, one receiver, pages given to one transfer after another. A sender's pages are reused at once when
    it is cut off, while reads of them may still run."""

    direct, revocable = False, True

    def __init__(self) -> None:
        super().__init__()
        self.network = MemoryNetwork()
        ours = MemoryTransport(self.network, direct=self.direct, revocable=self.revocable)
        theirs = MemoryTransport(self.network)
        self.send = SendBuffer(LAYOUT, PAGES * LAYOUT.page_bytes, CPU)
        self.staging = Staging(
            LAYOUT,
            (ours,),
            CPU,
            staging_bytes=PAGES * LAYOUT.page_bytes,
            landing_bytes=SLOTS * LAYOUT.slot_bytes,
            stall_s=1e6,
        )
        theirs.register(self.send.buffer, None)
        ours.register(None, self.staging.reads.landing)
        self.endpoint = theirs.endpoint()
        self.free_send = list(range(PAGES))
        self.free_staging = list(range(PAGES))
        self.live: dict[str, Transfer] = {}
        self.num_transfers = 0

    @rule(num_tokens=st.sampled_from([1, CHUNK_TOKENS, CHUNK_TOKENS + 1, 3 * CHUNK_TOKENS]))
    def begin(self, num_tokens: int) -> None:
        need = num_chunks(num_tokens)
        if min(len(self.free_send), len(self.free_staging)) < need:
            return
        self.num_transfers += 1
        theirs, ours = ([free.pop(0) for _ in range(need)] for free in (self.free_send, self.free_staging))
        transfer = Transfer(self.num_transfers, num_tokens, tuple(ours))
        self.live[transfer.id] = transfer
        self.send.open(transfer.id, transfer.token, num_tokens, NONE, tuple(theirs))
        source = Source(SLICE, (self.endpoint,), tuple(page * LAYOUT.page_bytes for page in theirs))
        self.staging.open(
            OpenRecv(transfer.id, transfer.token, num_tokens, NONE, SHAPE.dtype, transfer.pages, (source,))
        )
        transfer.send_pages = tuple(theirs)

    @precondition(lambda self: self.live)
    @rule(index=INDEX, count=st.sampled_from([1, 2, 6, 6]), step=st.integers(1, 3))
    def produce_and_announce(self, index: int, count: int, step: int) -> None:
        """A layer of up to ``step`` chunks at a time."""
        transfer = self._pick(index)
        new: list[Piece] = []
        while transfer.waiting and transfer.sending and len(new) < count:
            layer, chunk = transfer.waiting[0]
            chunks = [c for each, c in sorted(transfer.waiting) if each == layer and c < chunk + step]
            transfer.waiting = [each for each in transfer.waiting if each not in [(layer, c) for c in chunks]]
            start, stop = chunk_span(chunk, transfer.num_tokens)[0], chunk_span(chunks[-1], transfer.num_tokens)[1]
            digests = self.send.put(transfer.id, layer, chunk, transfer.kv[layer, :, :, start:stop])
            assert digests is not None
            new.append(Piece(0, layer, chunk, to_wire(digests)))
        self.staging.fetch(transfer.id, new)

    @rule(turns=st.integers(1, 5))
    def turn(self, turns: int) -> None:
        for _ in range(turns):
            for message in self.staging.turn():
                assert isinstance(message, Fetched | Failed)
                if message.transfer_id in self.live:
                    self.live[message.transfer_id].told.append(message)
                    if isinstance(message, Fetched) and not self.live[message.transfer_id].pinned:
                        self._compare(self.live[message.transfer_id])
                        self.staging.unpin(message.transfer_id)

    @rule(fault=st.sampled_from(["drop", "corrupt", "corrupt", "fail"]))
    def spoil_the_next_read(self, fault: str) -> None:
        setattr(self.network, fault, 1)

    @precondition(lambda self: self.live)
    @rule(index=INDEX, fault=st.sampled_from(["drop", "corrupt", "fail"]))
    def go_through_with_one_fault(self, index: int, fault: str) -> None:
        self.spoil_the_next_read(fault)
        self.produce_and_announce(index, 6, 2)
        self.turn(12)

    @rule()
    def let_dropped_reads_go_on(self) -> None:
        self.network.release()

    @precondition(lambda self: self.live)
    @rule(index=INDEX)
    def load(self, index: int) -> None:
        """The engine's forward thread copies what is staged."""
        transfer = self._pick(index)
        if self._compare(transfer):
            assert not transfer.closing
            assert [type(each) for each in transfer.told] == [Fetched]
            transfer.pinned = True

    @precondition(lambda self: self.live)
    @rule(index=INDEX)
    def loaded(self, index: int) -> None:
        transfer = self._pick(index)
        self.staging.unpin(transfer.id)
        transfer.pinned = False

    @precondition(lambda self: self.live)
    @rule(index=INDEX)
    def cut_off_the_sender(self, index: int) -> None:
        """Its Prefill call ends while its pages may still be read: another transfer writes there next."""
        self._cut(self._pick(index))

    @precondition(lambda self: self.live)
    @rule(index=INDEX)
    def close(self, index: int) -> None:
        self._close(self._pick(index))

    @invariant()
    def quarantine_is_no_more_than_the_slots(self) -> None:
        assert 0 <= self.staging.reads.quarantine_bytes <= SLOTS * LAYOUT.slot_bytes
        for transfer in self.live.values():
            assert len(transfer.told) <= 1, "told twice how it ended"

    def teardown(self) -> None:
        for transfer in list(self.live.values()):
            self.staging.unpin(transfer.id)
            transfer.pinned = False
            self._close(transfer)
        self.network.drop = 0
        self.network.release()
        if not self.revocable:
            for _ in range(50):
                self.staging.turn()
            for transfer in list(self.live.values()):
                self._close(transfer)
        assert not self.live
        for _ in range(50):
            self.staging.turn()
        assert self.staging.reads.quarantine_bytes == 0
        assert self.staging.reads.num_open == 0
        assert sorted(self.staging.reads._slots) == list(range(SLOTS))
        assert self.send.num_open == 0
        # All of it can be used again, without waiting for routes that rest after faults.
        for peer in self.staging.reads._peers.values():
            for route in peer.routes:
                route.rests_until = 0.0
        self.network.corrupt = self.network.fail = 0
        self.begin(3 * CHUNK_TOKENS)
        self.produce_and_announce(0, 6, 2)
        self.turn(50)
        (transfer,) = self.live.values()
        assert [type(each) for each in transfer.told] == [Fetched]
        self.load(0)

    def _compare(self, transfer: Transfer) -> bool:
        """Whether anything is staged; then it is what was sent, and pinned."""
        staged = self.staging.staged(transfer.id)
        if staged is None:
            return False
        for layer in range(2):
            assert torch.equal(staged.layer(layer), transfer.kv[layer]), "staged KV is not what was sent"
        return True

    def _pick(self, index: int) -> Transfer:
        return list(self.live.values())[index % len(self.live)]

    def _cut(self, transfer: Transfer) -> None:
        if transfer.sending:
            transfer.sending = False
            self.send.close(transfer.id)
            self.free_send = [*transfer.send_pages, *self.free_send]

    def _close(self, transfer: Transfer) -> None:
        transfer.closing = True
        self._cut(transfer)
        # False while the engine copies, or a read may write: the pages are not given back before.
        closed = self.staging.close(transfer.id)
        if self.revocable:
            assert closed is not transfer.pinned
        if closed:
            del self.live[transfer.id]
            self.free_staging = [*transfer.pages, *self.free_staging]


class DirectMachine(StagingMachine):
    """Reads go to the pages themselves; a transfer that is closed revokes its own."""

    direct = True


class IrrevocableMachine(StagingMachine):
    """They cannot be revoked: pages are not given back before they are over."""

    direct, revocable = True, False


for machine in (StagingMachine, DirectMachine, IrrevocableMachine):
    machine.TestCase.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
TestStaging = StagingMachine.TestCase
TestDirect = DirectMachine.TestCase
TestIrrevocable = IrrevocableMachine.TestCase
