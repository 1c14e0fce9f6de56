"""The receiving process of ``hexgen2 bench kv``: a real KV agent that reads from the sending process's."""

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from time import monotonic
from typing import NamedTuple

import msgspec
import torch

from hexgen2.bench import bound, kv_stages
from hexgen2.bench.kv_agent import agent_up
from hexgen2.bench.kv_talk import SHAPE, SLICE, TOKEN, Drop, FromSender, HasPut, Hold, Put, Raw, Setup, Up, line
from hexgen2.errors import Unavailable
from hexgen2.kv.host_memory import buffer
from hexgen2.kv.messages import Failed, Fetched, Piece, Ready, Source
from hexgen2.kv.ranks import Event, Ranks
from hexgen2.kv.ucx import UcxTransport
from hexgen2.kv.wire import PageLayout, num_chunks

DEADLINE_S = 120.0
#: No time is told as less.
LEAST_S = 1e-6
_LANDING_BYTES = 64 << 20
_LINE_BYTES = 16 << 20


class Taken(NamedTuple):
    """By the clock, and by the processors for both processes."""

    seconds: float
    cpu_s: float


@dataclass(slots=True)
class Rig:
    """See the module."""

    setup: Setup
    hub: Ranks
    up: Up
    process: asyncio.subprocess.Process
    peer_host: str
    landing: torch.Tensor
    #: What carried the last hand-over.
    detail: str = ""
    _numbers: "count[int]" = field(default_factory=count)
    _raw: "socket.socket | UcxTransport | None" = None
    _num_expected: int = 0
    _put_at_s: float = 0.0

    async def hand_over(self, num_tokens: int, stage: str, codec: str) -> Taken:
        """From the word to begin until every piece is here.

        ``protocol``: pieces are in the send buffer before and stay where they land. ``gather``: gathered at one end,
        copied to staging at the other. ``digest``: and digested at both, which is what always happens.
        """
        transfer_id = await self._begin(num_tokens, codec, digest=stage == "digest")
        kv_stages.unpack(stage != "protocol")
        done: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        pieces: tuple[Piece, ...] = ()
        if stage == "protocol":
            self._write(line(Put(transfer_id)))
            async for more in self._pieces():
                pieces += more
        await self._open(transfer_id, num_tokens, codec, done)
        used_s, began = self._used_s(), monotonic()
        if stage == "protocol":
            self.hub.fetch(transfer_id, pieces)
        else:
            self._write(line(Put(transfer_id)))
            async for more in self._pieces():
                self.hub.fetch(transfer_id, more)
        taken = Taken(await asyncio.wait_for(done, DEADLINE_S) - began, self._used_s() - used_s)
        await self._end(transfer_id)
        return taken

    async def exposed(self, num_tokens: int, codec: str, prefill_s: float) -> Taken:
        """From the end of a prefill of ``prefill_s`` until its KV, sent as it became ready, is verified."""
        transfer_id = await self._begin(num_tokens, codec, digest=True)
        kv_stages.unpack(True)
        done: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        await self._open(transfer_id, num_tokens, codec, done)
        used_s = self._used_s()
        self._write(line(Put(transfer_id, prefill_s)))
        async for more in self._pieces():
            self.hub.fetch(transfer_id, more)
        verified_at_s = await asyncio.wait_for(done, DEADLINE_S)
        # Prefill may be held up between its last piece and the clock: then nothing was exposed, and not less.
        taken = Taken(max(verified_at_s - self._put_at_s, LEAST_S), self._used_s() - used_s)
        await self._end(transfer_id)
        return taken

    async def raw(self, num_bytes: int) -> Taken:
        """What the bare transport takes for as many bytes: a blocking socket, or one NIXL READ."""
        self._write(line(Raw(True)))
        await self._next()
        read = self._raw_nixl if self.setup.transport == "ucx" else self._raw_socket
        used_s = self._used_s()
        taken = Taken(await asyncio.to_thread(read, num_bytes), self._used_s() - used_s)
        self._write(line(Raw(False)))
        await self._next()
        return taken

    def close(self) -> None:
        """Let the bare transport go."""
        if self._raw is not None:
            self._raw.close()

    def _raw_socket(self, num_bytes: int) -> float:
        """A blocking socket, read straight into place."""
        if not isinstance(self._raw, socket.socket):
            self._raw = socket.create_connection((self.peer_host, self.up.raw_port), DEADLINE_S)
        began = monotonic()
        self._raw.sendall(num_bytes.to_bytes(8, "little"))
        view = self.landing.numpy().data[:num_bytes]
        while view:
            got = self._raw.recv_into(view)
            if not got:
                raise Unavailable("the sending process ended")
            view = view[got:]
        return monotonic() - began

    def _raw_nixl(self, num_bytes: int) -> float:
        """One NIXL READ, looked at without a pause."""
        if not isinstance(self._raw, UcxTransport):
            self._raw = UcxTransport(self.setup.hosts.split(",")[0])
            self._raw.register(None, self.landing)
        agent, peer = self._raw._agent, self._raw._peer(self.up.raw_endpoint)
        began = monotonic()
        transfer = agent.initialize_xfer(
            "READ",
            agent.get_xfer_descs([(self.landing.data_ptr(), num_bytes, 0)], "DRAM"),
            agent.get_xfer_descs([(peer.endpoint.base, num_bytes, 0)], "DRAM"),
            peer.name,
            backends=["UCX"],
        )
        state = agent.transfer(transfer)
        while state == "PROC":
            state = agent.check_xfer_state(transfer)
        seconds = monotonic() - began
        transfer.release()
        if state != "DONE":
            raise Unavailable(f"NIXL says {state}")
        return seconds

    def _used_s(self) -> float:
        return bound.used_s(os.getpid(), self.process.pid)

    async def _begin(self, num_tokens: int, codec: str, *, digest: bool) -> str:
        kv_stages.use_digests(digest)
        transfer_id = f"t{next(self._numbers)}"
        self._num_expected = num_chunks(num_tokens) * SHAPE.num_layers
        self._write(line(Hold(transfer_id, num_tokens, codec, digest)))
        await self._next()
        return transfer_id

    async def _open(self, transfer_id: str, num_tokens: int, codec: str, done: "asyncio.Future[float]") -> None:
        def hear(_rank: int, event: Event) -> None:
            if isinstance(event, Fetched) and not done.done():
                self.detail = event.transport_detail
                done.set_result(monotonic())
            elif isinstance(event, Failed) and not done.done():
                done.set_exception(Unavailable(f"{event.reason}: {event.detail}"))

        pages = tuple(range(num_chunks(num_tokens)))
        source = Source(SLICE, self.up.endpoints, tuple(page * self.up.page_bytes for page in pages))
        await self.hub.open_recv(transfer_id, TOKEN, num_tokens, codec, SHAPE.dtype, pages, (source,), hear)

    async def _pieces(self) -> AsyncIterator[tuple[Piece, ...]]:
        """Until all have been put and announced."""
        put, num_pieces = False, 0
        while not put or num_pieces < self._num_expected:
            message = await self._next()
            if isinstance(message, HasPut):
                put, self._put_at_s = True, message.at_s
            elif isinstance(message, Ready):
                num_pieces += sum(len(piece.digests) for piece in message.pieces) // SLICE.num_kv_heads
                yield message.pieces

    async def _end(self, transfer_id: str) -> None:
        await self.hub.close(transfer_id)
        self._write(line(Drop(transfer_id)))

    def _write(self, text: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text)

    async def _next(self) -> FromSender:
        assert self.process.stdout is not None
        text = await asyncio.wait_for(self.process.stdout.readline(), DEADLINE_S)
        if not text:
            raise Unavailable("the sending process ended")
        message: FromSender = msgspec.json.decode(text, type=FromSender)
        return message


@asynccontextmanager
async def rig(ours: Setup, theirs: Setup, command: Sequence[str] = ()) -> AsyncIterator[Rig]:
    """Both processes, ready. ``command`` goes before the sender's own, to run it elsewhere."""
    layout = PageLayout(SHAPE, SLICE)
    num_bytes = num_chunks(ours.max_tokens) * layout.page_bytes
    process = await asyncio.create_subprocess_exec(
        *(*command, sys.executable, "-m", "hexgen2.bench.kv_sender", msgspec.json.encode(theirs).decode()),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=_LINE_BYTES,
    )
    try:
        assert process.stdout is not None
        first = await asyncio.wait_for(process.stdout.readline(), DEADLINE_S)
        if not first:
            raise Unavailable("the sending process did not start")
        up = msgspec.json.decode(first, type=Up)
        async with agent_up(ours, DEADLINE_S, staging_bytes=num_bytes, landing_bytes=_LANDING_BYTES) as (hub, _):
            made = Rig(ours, hub, up, process, theirs.hosts.split(",")[0], buffer(num_bytes, torch.device("cpu")))
            try:
                yield made
            finally:
                made.close()
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
