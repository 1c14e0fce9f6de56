"""No sequence of messages, losses, repetitions, reorderings, restarts, cancellations and time-outs leaks memory, loads
KV that is not the prompt's, or leaves a call unfinished past its deadline."""

import asyncio

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hexgen2.errors import InvalidRequest, KvTooLarge, TransferEnded, TransferNotFound, Unavailable
from hexgen2.kv.wire import CHUNK_TOKENS
from tests.worker.world import PAGES, Agent, Call, Request, World, answer_of

INDEX = st.integers(0, 1000)
#: Tokens: one chunk, two, three, which is all pages; one more chunk than there are pages.
SIZES = st.sampled_from([1, 128, 129, 300, 384, 385])


class HandOffMachine(RuleBasedStateMachine):
    """The gateway's part is played here: a Prefill call ends when decode has verified, or when its request is over."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.too_large: list[Call] = []

    # Requests.

    @rule(num_tokens=SIZES, timeout_s=st.sampled_from([30.0, 30.0, 1.0]), number=st.integers(0, 1))
    def ask(self, num_tokens: int, timeout_s: float, number: int) -> None:
        request = self.world.ask(num_tokens, timeout_s)
        call = self.world.start_prefill(request)
        self.world.start_decode(request, number)
        if num_tokens > PAGES * CHUNK_TOKENS:
            request.harmed = True
            self.too_large.append(call)

    @rule(num_tokens=st.sampled_from([1, 300]), decode_first=st.booleans(), wait_s=st.sampled_from([0.0, 4.0, 6.0]))
    def ask_one_side_after_the_other(self, num_tokens: int, decode_first: bool, wait_s: float) -> None:
        request = self.world.ask(num_tokens, 30.0)
        if decode_first:
            self.world.start_decode(request, 1)
            request.harmed = wait_s > 5.0
        else:
            self.world.start_prefill(request)
        self.world.advance(wait_s)
        if decode_first:
            self.world.start_prefill(request)
        else:
            self.world.start_decode(request, 1)

    @precondition(lambda self: self.world.requests)
    @rule(index=INDEX, number=st.integers(0, 1))
    def move_decode(self, index: int, number: int) -> None:
        """The gateway has lost decode and asks another, or the same, with the same transfer."""
        request = self._request(index)
        for call in request.decodes:
            if not call.verified:
                call.task.cancel()
        self.world.loop.settle()
        if request.decodes and request.prefill and not any(call.verified for call in request.decodes):
            self.world.start_decode(request, number)

    @precondition(lambda self: self.world.requests)
    @rule(index=INDEX)
    def repeat_prefill(self, index: int) -> None:
        """The same Prefill call comes twice: refused, and the first is not disturbed."""
        request = self._request(index)
        known = request.prefill is not None and request.prefill.agent is self.world.prefill_agent
        if known:
            call = self.world.start_prefill(request)
            assert isinstance(call.error, InvalidRequest | TransferEnded)

    @precondition(lambda self: self.world.requests)
    @rule(index=INDEX)
    def steal(self, index: int) -> None:
        """FetchKv by somebody who knows the id, not the token."""
        request = self._request(index)
        before = len(self.world.streams)
        call = self.world.start_decode(request, 0, token=bytes(16))
        for stream in self.world.streams[before:]:
            assert all(isinstance(each, TransferNotFound) for each in stream.sent)
        call.task.cancel()

    @precondition(lambda self: self.world.requests)
    @rule(index=INDEX, prefill=st.booleans())
    def cancel(self, index: int, prefill: bool) -> None:
        request = self._request(index)
        request.harmed = True
        for call in [request.prefill] if prefill and request.prefill else request.calls:
            call.task.cancel()
        self.world.loop.settle()

    # Things go on.

    @rule(rounds=st.integers(1, 8), reads=st.booleans())
    def go_on(self, rounds: int, reads: bool) -> None:
        self.world.drive(rounds, reads=reads)

    @rule(index=INDEX, steps=st.integers(1, 8))
    def run_an_agent(self, index: int, steps: int) -> None:
        agents = list(self.world.agents.values())
        for _ in range(steps):
            agents[index % len(agents)].step()
            self.world.loop.settle()

    @rule(index=INDEX, steps=st.integers(1, 4))
    def run_an_engine(self, index: int, steps: int) -> None:
        engines = list(self.world.engines.values())
        for _ in range(steps):
            engines[index % len(engines)].step()
            self.world.loop.settle()

    @precondition(lambda self: self.world.streams)
    @rule(index=INDEX, count=st.integers(1, 4))
    def deliver(self, index: int, count: int) -> None:
        for _ in range(count):
            self.world.streams[index % len(self.world.streams)].deliver()
        self.world.loop.settle()

    @precondition(lambda self: any(agent.reads for agent in self.world.agents.values()))
    @rule(index=INDEX, fault=st.sampled_from(["", "corrupt", "lost"]))
    def finish_a_read(self, index: int, fault: str) -> None:
        agent, read = [(a, r) for a in self.world.agents.values() for r in a.reads][index % self._num_reads()]
        if fault:
            self._harm(read.key)
        agent.finish_read(read, fault=fault)

    @rule(seconds=st.sampled_from([0.1, 2.0, 10.0, 40.0]))
    def advance(self, seconds: float) -> None:
        self.world.advance(seconds)

    @rule()
    def let_everything_finish(self) -> None:
        self._check_answers()

    # Faults.

    @precondition(lambda self: self.world.streams)
    @rule(index=INDEX)
    def repeat_a_message(self, index: int) -> None:
        stream = self.world.streams[index % len(self.world.streams)]
        if stream.sent and stream.sent[0] is not None and not isinstance(stream.sent[0], Exception):
            stream.sent.appendleft(stream.sent[0])

    @precondition(lambda self: self.world.streams)
    @rule(index=INDEX)
    def swap_two_messages(self, index: int) -> None:
        """Pieces and the first token may change places; the offer is the first in any case."""
        stream = self.world.streams[index % len(self.world.streams)]
        if len(stream.sent) > 2 and not any(each is None or isinstance(each, Exception) for each in stream.sent):
            stream.sent[1], stream.sent[2] = stream.sent[2], stream.sent[1]

    @precondition(lambda self: self.world.streams)
    @rule(index=INDEX)
    def cut_a_connection(self, index: int) -> None:
        stream = self.world.streams[index % len(self.world.streams)]
        if not stream.over:
            self._harm_all(stream.decode)
            stream.cut()
            self.world.loop.settle()

    @rule(index=INDEX)
    def repeat_what_an_agent_said(self, index: int) -> None:
        agents = [agent for agent in self.world.agents.values() if agent.alive and agent.said]
        if agents:
            agent = agents[index % len(agents)]
            transfer_id, rank, event = agent.said[index % len(agent.said)]
            listener = agent.listeners.get(transfer_id)
            if listener is not None:
                listener(rank, event)
                self.world.loop.settle()

    @rule(number=st.integers(-1, 1))
    def kill(self, number: int) -> None:
        agent = self.world.prefill_agent if number < 0 else self.world.decode_agents[number]
        self._harm_all(agent)
        self.world.kill(agent)

    # What must hold.

    @invariant()
    def no_call_outlives_its_deadline(self) -> None:
        self._gateway()
        self._run_agents()
        now = self.world.loop.time()
        for call in self.world.calls:
            # Reading what an engine made needs no further wait; all else has ended by itself.
            assert call.task.done() or now < call.deadline, "a call is past its deadline"

    @invariant()
    def what_is_answered_is_right(self) -> None:
        for request in self.world.requests:
            for call in request.calls:
                first = 0 if call is request.prefill else 1
                right = [answer_of(request.prompt, position) for position in range(first, World.NUM_TOKENS)]
                assert call.tokens == right[: len(call.tokens)]
                if call in request.decodes and call.task.done() and call.error is None:
                    assert call.tokens == right
                if call.task.done() and not call.task.cancelled():
                    call.task.result()

    def teardown(self) -> None:
        world = self.world
        try:
            self._check_answers()
            world.advance(100.0)
            self._run_agents()
            world.drive()
            self.no_call_outlives_its_deadline()
            self.what_is_answered_is_right()
            assert all(
                isinstance(call.error, KvTooLarge | Unavailable | asyncio.CancelledError) for call in self.too_large
            )
            assert [memory.bytes_used for memory in world.memories] == [0] * len(world.memories)
            assert [memory.num_waiting for memory in world.memories] == [0] * len(world.memories)
            for agent in world.agents.values():
                if agent.alive:
                    assert not agent.sends
                    assert not agent.recvs
                    assert not agent.reads, "quarantine"
            assert len(world.prefill._transfers) == 0
            assert not asyncio.all_tasks(world.loop)
        finally:
            world.close()

    def _check_answers(self) -> None:
        """Let everything go on. Then who was done no harm has its answer."""
        self.world.drive()
        while self._gateway():
            self.world.drive()
        for request in self.world.requests:
            if request.harmed or request.prefill is None or not request.decodes:
                continue
            if any("max_queued" in str(c.error) or "full" in str(c.error) for c in request.calls):
                continue
            errors = [call.error for call in request.calls]
            assert any(call.task.done() and call.error is None for call in request.decodes), errors

    def _gateway(self) -> bool:
        """A request's calls end with it. Whether there was one to end."""
        left = []
        for request in self.world.requests:
            decode_over = request.decodes and all(call.task.done() for call in request.decodes)
            prefill = request.prefill
            if decode_over and prefill is not None:
                left.append(prefill)
            if prefill is not None and prefill.task.done() and prefill.error is not None and not prefill.tokens:
                left += request.decodes
        left = [call for call in left if not call.task.done()]
        for call in left:
            call.task.cancel()
        self.world.loop.settle()
        return bool(left)

    def _run_agents(self) -> None:
        """They answer from memory whatever happens elsewhere."""
        if any(not call.task.done() and call.deadline <= self.world.loop.time() for call in self.world.calls):
            for agent in self.world.agents.values():
                while agent.queue:
                    agent.step()
                    self.world.loop.settle()

    def _request(self, index: int) -> Request:
        return self.world.requests[index % len(self.world.requests)]

    def _num_reads(self) -> int:
        return sum(len(agent.reads) for agent in self.world.agents.values())

    def _harm(self, key: str) -> None:
        for request in self.world.requests:
            request.harmed |= key.startswith(request.transfer_id)

    def _harm_all(self, agent: Agent) -> None:
        for request in self.world.requests:
            request.harmed |= any(call.agent is agent and not call.task.done() for call in request.calls)


HandOffMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
TestHandOff = HandOffMachine.TestCase
