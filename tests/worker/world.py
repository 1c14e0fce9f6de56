"""A world of one prefill and two decode workers in which a test decides what happens next, and when.

The workers are the real ones, with their state machines and queues, on an event loop whose clock the test moves.
Around them all is modelled: KV agents with memory that is overwritten as soon as it is reused, engines that go a step
when told, FetchKv streams whose messages are delivered, repeated, reordered or cut off, reads that finish late.
"""

import asyncio
import secrets
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from hexgen2.engine.base import EngineOutput, EngineRequest, FinishReason, SampledToken, Sampling
from hexgen2.errors import EngineFailed, HexgenError, Unavailable
from hexgen2.kv.handoff import FetchMessage, FirstToken
from hexgen2.kv.messages import Failed, Fetched, Hello, Loaded, Piece, Ready, Source
from hexgen2.kv.pool import PagePool
from hexgen2.kv.ranks import Event, Listener, Ranks
from hexgen2.kv.wire import KvShape, RankSlice, chunk_span, num_chunks
from hexgen2.worker.aio import PageQueue
from hexgen2.worker.decode import DecodeJob, DecodeWorker
from hexgen2.worker.prefill import PrefillJob, PrefillWorker
from hexgen2.worker.receive import KvSummary, RemoteKv

SHAPE = KvShape(num_layers=2, num_kv_heads=1, head_dim=2, dtype="float32")
#: One layer per rank, on both sides.
SLICES = (RankSlice(0, 0, 1, 0, 1), RankSlice(1, 1, 1, 0, 1))
MODEL = SimpleNamespace(sha256=b"m" * 32)
PAGES = 3
MAX_QUEUED = 2

Prompt = tuple[int, ...]
#: What a piece's bytes are: a function of the tokens up to the chunk's end, the layer and the chunk.
Value = tuple[Prompt, int, int]


def value_of(prompt: Prompt, layer: int, chunk: int) -> Value:
    return prompt[: chunk_span(chunk, len(prompt))[1]], layer, chunk


def digest_of(token: bytes, value: Value | None) -> int:
    return hash((token, value)) & (1 << 63) - 1


def answer_of(prompt: Prompt, number: int) -> int:
    """The model's output token at this position."""
    return sum(prompt) + number


class TestLoop(asyncio.SelectorEventLoop):
    """Time stands still until it is moved."""

    __test__ = False
    now = 1000.0

    def time(self) -> float:
        return self.now

    def settle(self) -> None:
        """Run everything that can run now."""
        while True:
            self.call_soon(self.stop)
            self.run_forever()
            if not self._ready:  # type: ignore[attr-defined]
                return


@dataclass
class Read:
    """A read in flight, at the receiving agent."""

    key: str
    rank: int
    piece: Piece
    page: int
    peer: "Agent"


@dataclass
class Recv:
    """Staging of one transfer at the receiving agent."""

    token: bytes
    num_tokens: int
    sources: tuple[Source, ...]
    missing: dict[int, int]
    asked: list[Piece] = field(default_factory=list)
    staged: dict[tuple[int, int], Value | None] = field(default_factory=dict)
    failed: bool = False


class Agent(Ranks):
    """The KV agents of one incarnation of one worker, all ranks; what the worker believes to be its ``Ranks``."""

    def __init__(self, world: "World", name: str) -> None:
        self.world = world
        self.name = name
        self.alive = True
        self.memory: dict[tuple[int, int], Value] = {}
        self.sends: dict[str, tuple[bytes, tuple[int, ...]]] = {}
        self.recvs: dict[str, Recv] = {}
        self.reads: list[Read] = []
        self.listeners: dict[str, Listener] = {}
        #: Messages between service and agents, in order; a test lets them through.
        self.queue: deque[Callable[[], None]] = deque()
        self.said: list[tuple[str, int, Event]] = []

    @property
    def hellos(self) -> tuple[Hello, ...]:
        return tuple(
            Hello(s, SHAPE, PAGES, PAGES, 1, (self.name.encode(),), "memory", "memory", pid=s.rank) for s in SLICES
        )

    async def open_send(
        self, transfer_id: str, token: bytes, num_tokens: int, codec: str, pages: tuple[int, ...], listener: Listener
    ) -> None:
        self.listeners[transfer_id] = listener
        await self._ask(lambda: self.sends.update({transfer_id: (token, pages)}))

    async def open_recv(
        self,
        transfer_id: str,
        token: bytes,
        num_tokens: int,
        codec: str,
        dtype: str,
        pages: tuple[int, ...],
        sources: tuple[Source, ...],
        listener: Listener,
    ) -> None:
        self.listeners[transfer_id] = listener
        recv = Recv(token, num_tokens, sources, {s.rank: num_chunks(num_tokens) for s in SLICES})
        await self._ask(lambda: self.recvs.update({transfer_id: recv}))

    def fetch(self, transfer_id: str, pieces: tuple[Piece, ...]) -> None:
        self.queue.append(lambda: self._fetch(transfer_id, pieces))

    async def close(self, transfer_id: str) -> None:
        self.listeners.pop(transfer_id, None)

        def close() -> None:
            self.sends.pop(transfer_id, None)
            self.recvs.pop(transfer_id, None)

        await self._ask(close)

    async def _ask(self, act: Callable[[], None]) -> None:  # type: ignore[override]
        done: asyncio.Future[None] = self.world.loop.create_future()

        def answer() -> None:
            act()
            if not done.done():
                done.set_result(None)

        self.queue.append(answer)
        await done

    def _fetch(self, key: str, pieces: tuple[Piece, ...]) -> None:
        recv = self.recvs.get(key)
        if recv is None:
            return
        for piece in pieces:
            assert piece not in recv.asked, "a piece is read twice"
            recv.asked.append(piece)
            peer = self.world.agents[recv.sources[piece.rank].endpoints[0].decode()]
            page = recv.sources[piece.rank].page_offsets[piece.chunk]
            self.reads.append(Read(key, piece.layer, piece, page, peer))

    def tell(self, transfer_id: str, rank: int, event: Event) -> None:
        """Agent to service, behind what is on its way."""
        self.said.append((transfer_id, rank, event))

        def hear() -> None:
            listener = self.listeners.get(transfer_id)
            if listener is not None:
                listener(rank, event)

        self.queue.append(hear)

    # What a test lets happen.

    def step(self) -> None:
        if self.queue:
            self.queue.popleft()()

    def put(self, transfer_id: str, prompt: Prompt, chunk: int) -> None:
        """The engine has made a chunk."""
        if transfer_id not in self.sends:
            return
        token, pages = self.sends[transfer_id]
        for part in SLICES:
            value = value_of(prompt, part.first_layer, chunk)
            self.memory[part.rank, pages[chunk]] = value
            piece = Piece(part.rank, part.first_layer, chunk, (digest_of(token, value),))
            self.tell(transfer_id, part.rank, Ready(transfer_id, (piece,)))

    def finish_read(self, read: Read, *, fault: str = "") -> None:
        """What is read is what is there now, whosever it is."""
        self.reads.remove(read)
        recv = self.recvs.get(read.key)
        if recv is None or recv.failed:
            return
        if fault == "lost" or not read.peer.alive:
            recv.failed = True
            self.tell(read.key, read.rank, Failed(read.key, "lost", "the peer is gone"))
            return
        value = read.peer.memory.get((read.piece.rank, read.page)) if fault != "corrupt" else None
        if digest_of(recv.token, value) != read.piece.digests[0]:
            recv.failed = True
            self.tell(read.key, read.rank, Failed(read.key, "corrupt", "digest mismatch"))
            return
        recv.staged[read.piece.layer, read.piece.chunk] = value
        recv.missing[read.rank] -= 1
        if not recv.missing[read.rank]:
            self.tell(read.key, read.rank, Fetched(read.key, 8, 1, 0.0, "memory"))


class StepEngine:
    """Goes a step for each ``step``: a chunk of a prompt, or a token."""

    def __init__(self, world: "World", agent: Agent) -> None:
        self.model = MODEL
        self.max_model_len = 4096
        self.world = world
        self.agent = agent
        self.turns: deque[asyncio.Future[None]] = deque()

    def step(self) -> None:
        while self.turns:
            turn = self.turns.popleft()
            if not turn.done():
                turn.set_result(None)
                return

    async def _turn(self) -> None:
        turn = self.world.loop.create_future()
        self.turns.append(turn)
        await turn

    async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        prompt, number = request.prompt_token_ids, 0
        if request.send_transfer is not None:
            for chunk in range(num_chunks(len(prompt))):
                await self._turn()
                self.agent.put(request.send_transfer, prompt, chunk)
        if request.load_transfer is not None:
            await self._turn()
            recv = self.agent.recvs.get(request.load_transfer)
            if recv is None or recv.failed or any(recv.missing.values()):
                raise EngineFailed("the KV to load is not there")
            prompt, number = prompt[:-1], 1
            want = {
                (s.first_layer, c): value_of(prompt, s.first_layer, c)
                for s in SLICES
                for c in range(num_chunks(len(prompt)))
            }
            assert recv.staged == want, "the engine was given KV that is not the prompt's"
            for part in SLICES:
                self.agent.tell(request.load_transfer, part.rank, Loaded(request.load_transfer))
        for position in range(request.sampling.max_tokens):
            await self._turn()
            finish = FinishReason.LENGTH if position == request.sampling.max_tokens - 1 else None
            yield EngineOutput((SampledToken(answer_of(prompt, number + position)),), finish)


@dataclass
class Stream:
    """One FetchKv call between two workers."""

    prefill: Agent
    decode: Agent
    sent: deque[FetchMessage | HexgenError | None] = field(default_factory=deque)
    arrived: asyncio.Queue[FetchMessage | HexgenError | None] = field(default_factory=asyncio.Queue)
    server: "asyncio.Task[None] | None" = None
    over: bool = False

    def deliver(self) -> None:
        if self.sent:
            self.arrived.put_nowait(self.sent.popleft())

    def cut(self) -> None:
        """The connection breaks: what was on its way is lost."""
        if self.server is not None:
            self.server.cancel()
        self.sent.clear()
        self.arrived.put_nowait(Unavailable("the connection broke"))


@dataclass
class Call:
    """One Prefill or Decode call, as its caller sees it."""

    task: "asyncio.Task[None]"
    deadline: float
    agent: Agent
    tokens: list[int] = field(default_factory=list)
    verified: bool = False
    #: None: it ended by itself and well.
    error: BaseException | None = None


@dataclass
class Request:
    """A prompt on its way, as the gateway sees it."""

    prompt: Prompt
    transfer_id: str
    token: bytes
    deadline: float
    prefill: Call | None = None
    decodes: list[Call] = field(default_factory=list)
    #: Something was done to it, or it was refused: it need not be answered.
    harmed: bool = False

    @property
    def calls(self) -> list[Call]:
        return [*([self.prefill] if self.prefill else []), *self.decodes]


class World:
    """See the module."""

    NUM_TOKENS = 3

    def __init__(self) -> None:
        self.loop = TestLoop()
        self.agents: dict[str, Agent] = {}
        self.engines: dict[str, StepEngine] = {}
        self.memories: list[PageQueue] = []
        self.streams: list[Stream] = []
        self.requests: list[Request] = []
        self.calls: list[Call] = []
        self.num_starts = 0
        self.prefill: PrefillWorker
        self.decodes: list[DecodeWorker] = []
        self.prefill_agent: Agent
        self.send_memory: PageQueue
        self.decode_agents: list[Agent] = []
        self._in_loop(self._start)

    def _in_loop(self, act: Callable[[], None]) -> None:
        """Also what makes futures or reads the clock runs in the loop."""
        failure: list[BaseException] = []

        def run() -> None:
            try:
                act()
            except BaseException as error:
                failure.append(error)

        self.loop.call_soon(run)
        self.loop.settle()
        if failure:
            raise failure[0]

    def _worker(self, pool: str) -> tuple[StepEngine, Agent, PageQueue]:
        self.num_starts += 1
        agent = Agent(self, f"{pool}-{self.num_starts}")
        engine = StepEngine(self, agent)
        self.agents[agent.name], self.engines[agent.name] = agent, engine
        memory = PageQueue(PagePool(pool, PAGES, MAX_QUEUED), 1)
        self.memories.append(memory)
        return engine, agent, memory

    def _start(self) -> None:
        self._start_prefill()
        for number in range(2):
            self._start_decode(number)

    def _start_prefill(self) -> None:
        engine, self.prefill_agent, self.send_memory = self._worker("send")
        self.prefill = PrefillWorker(engine, self.prefill_agent, self.send_memory)  # type: ignore[arg-type]

    def _start_decode(self, number: int) -> None:
        engine, agent, memory = self._worker("staging")
        worker = DecodeWorker(engine, agent, memory, lambda remote, resume: self._fetch(agent, remote, resume))  # type: ignore[arg-type]
        self.decodes[number : number + 1] = [worker]
        self.decode_agents[number : number + 1] = [agent]

    async def _fetch(self, decode: Agent, remote: RemoteKv, resume: bool) -> AsyncGenerator[FetchMessage, None]:
        stream, prefill = Stream(self.prefill_agent, decode), self.prefill
        self.streams.append(stream)

        async def serve() -> None:
            try:
                async for message in prefill.fetch(remote.transfer_id, remote.token, resume=resume):
                    stream.sent.append(message)
                stream.sent.append(None)
            except HexgenError as error:
                stream.sent.append(error)

        stream.server = self.loop.create_task(serve())
        try:
            while True:
                message = await stream.arrived.get()
                if message is None:
                    return
                if isinstance(message, HexgenError):
                    raise message
                yield message
        finally:
            stream.over = True
            stream.server.cancel()

    # What a test lets happen.

    def ask(self, num_tokens: int, timeout_s: float) -> Request:
        """A new request; its calls are started apart."""
        prompt = tuple(len(self.requests) * 1000 + i for i in range(num_tokens))
        request = Request(prompt, secrets.token_hex(4), secrets.token_bytes(16), self.loop.time() + timeout_s)
        self.requests.append(request)
        return request

    def start_prefill(self, request: Request) -> Call:
        job = PrefillJob(
            f"p{len(self.calls)}",
            request.transfer_id,
            request.token,
            request.prompt,
            Sampling(max_tokens=self.NUM_TOKENS),
            hand_over=True,
            deadline=request.deadline,
        )
        full = self.send_memory.num_waiting >= MAX_QUEUED
        call = self._call(self.prefill.run(job), request, self.prefill_agent)
        if request.prefill is None:
            request.prefill = call
            # Refused. Prefill says so, unless decode hears of it first and that ends the request.
            request.harmed |= full
        return call

    def start_decode(self, request: Request, number: int, token: bytes | None = None) -> Call:
        remote = RemoteKv(request.transfer_id, token or request.token, "")
        sampling = Sampling(max_tokens=self.NUM_TOKENS)
        job = DecodeJob(f"d{len(self.calls)}", request.prompt, sampling, remote, deadline=request.deadline)
        call = self._call(self.decodes[number].run(job), request, self.decode_agents[number])
        if token is None:
            request.decodes.append(call)
        return call

    def _call(self, events: AsyncGenerator[Any, None], request: Request, agent: Agent) -> Call:
        async def follow() -> None:
            try:
                async for event in events:
                    match event:
                        case FirstToken():
                            call.tokens.append(event.token.token_id)
                        case KvSummary():
                            call.verified = True
                            if request.prefill is not None and call in request.decodes:
                                request.prefill.task.cancel()
                        case EngineOutput():
                            call.tokens += [token.token_id for token in event.tokens]
            except (HexgenError, asyncio.CancelledError) as error:
                call.error = error
            finally:
                await events.aclose()

        call = Call(self.loop.create_task(follow()), request.deadline, agent)
        self.calls.append(call)
        self.loop.settle()
        return call

    def advance(self, seconds: float) -> None:
        self.loop.now += seconds
        for request in self.requests:
            request.harmed |= request.deadline <= self.loop.now
        self.loop.settle()

    def kill(self, agent: Agent) -> None:
        """As by SIGKILL, then a new incarnation at the same address."""
        agent.alive = False
        agent.memory.clear()
        agent.listeners.clear()
        for stream in self.streams:
            if not stream.over and agent in (stream.prefill, stream.decode):
                stream.cut()
        number = self.decode_agents.index(agent) if agent in self.decode_agents else None
        for call in self.calls:
            if call.agent is agent and not call.task.done():
                call.task.cancel()
                call.error = Unavailable("the process is gone")
        self.loop.settle()
        # What a dead process still waits for here, so that its tasks end, is answered: nobody sees it.
        while agent.queue:
            agent.step()
            self.loop.settle()
        self._in_loop(self._start_prefill if number is None else lambda: self._start_decode(number))

    def drive(self, rounds: int = 10_000, *, reads: bool = True) -> None:
        """Let everything go on, without faults, until nothing moves; the clock stands still."""
        for _ in range(rounds):
            if not self._progress():
                return
            for agent in self.agents.values():
                while agent.queue:
                    agent.step()
                    self.loop.settle()
                for read in list(agent.reads) if reads else ():
                    agent.finish_read(read)
            for engine in self.engines.values():
                engine.step()
            for stream in self.streams:
                stream.deliver()
            self.loop.settle()
        assert rounds < 10_000, "it does not come to rest"

    def _progress(self) -> bool:
        return (
            any(agent.queue or agent.reads for agent in self.agents.values())
            or any(not turn.done() for engine in self.engines.values() for turn in engine.turns)
            or any(stream.sent for stream in self.streams)
        )

    def close(self) -> None:
        while tasks := asyncio.all_tasks(self.loop):
            for task in tasks:
                task.cancel()
            self.loop.settle()
            for agent in self.agents.values():
                while agent.queue:
                    agent.step()
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.loop.close()
