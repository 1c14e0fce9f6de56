"""Agents and hubs of one sending and one receiving replica in this process, joined by a memory network."""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from hexgen2.kv.agent import KvAgent
from hexgen2.kv.codec import to_wire
from hexgen2.kv.memory import MemoryNetwork, MemoryTransport
from hexgen2.kv.messages import Piece, Source
from hexgen2.kv.ranks import Event, Ranks
from hexgen2.kv.send_buffer import SendBuffer
from hexgen2.kv.transport import Transport
from hexgen2.kv.wire import KvShape, PageLayout, RankSlice, chunk_span, num_chunks

TOKEN = bytes(range(32))
DEADLINE_S = 20.0


class Inbox:
    """Events of one transfer, awaited by predicate."""

    def __init__(self) -> None:
        self.events: list[tuple[int, Event]] = []
        self._new = asyncio.Event()

    def __call__(self, rank: int, event: Event) -> None:
        self.events.append((rank, event))
        self._new.set()

    async def wait(self, enough: Callable[[list[Event]], bool]) -> list[Event]:
        async with asyncio.timeout(DEADLINE_S):
            while not enough([event for _, event in self.events]):
                self._new.clear()
                await self._new.wait()
        return [event for _, event in self.events]


@dataclass
class Replica:
    """Ranks and their agents."""

    hub: Ranks
    agents: list[KvAgent]
    slices: tuple[RankSlice, ...]
    shape: KvShape

    def put(self, transfer_id: str, kv: torch.Tensor) -> None:
        """All pieces of ``kv``, ``[layer, kv_head, 2, token, head_dim]``, as the engine would make them."""
        for chunk in range(num_chunks(kv.shape[3])):
            start, stop = chunk_span(chunk, kv.shape[3])
            for agent, part in zip(self.agents, self.slices, strict=True):
                heads = slice(part.first_kv_head, part.first_kv_head + part.num_kv_heads)
                for layer in part.layers:
                    agent.put(transfer_id, layer, chunk, kv[layer, heads, :, start:stop])
                agent.flush()

    def sources(self, pages: tuple[int, ...]) -> tuple[Source, ...]:
        return tuple(
            Source(h.slice, h.endpoints, tuple(page * h.page_bytes for page in pages)) for h in self.hub.hellos
        )


@asynccontextmanager
async def replica(
    slices: tuple[RankSlice, ...],
    shape: KvShape,
    transport: Callable[[], Transport],
    *,
    send_pages: int = 0,
    staging_pages: int = 0,
    landing_slots: int = 8,
    num_routes: int = 1,
    stall_s: float = 30.0,
) -> AsyncIterator[Replica]:
    with tempfile.TemporaryDirectory(prefix="hexgen2-") as folder:
        hub = Ranks(Path(folder) / "s", len(slices))
        await hub.start()
        agents: list[KvAgent] = []
        try:
            for part in slices:
                layout = PageLayout(shape, part)
                agents.append(
                    await asyncio.to_thread(
                        KvAgent,
                        hub.socket_path,
                        part,
                        shape,
                        [transport() for _ in range(num_routes)],
                        device=torch.device("cpu"),
                        send_bytes=send_pages * layout.page_bytes,
                        staging_bytes=staging_pages * layout.page_bytes,
                        landing_bytes=landing_slots * layout.layer_stride,
                        stall_s=stall_s,
                    )
                )
            await hub.wait_complete(DEADLINE_S)
            yield Replica(hub, agents, slices, shape)
        finally:
            await hub.stop()
            for agent in agents:
                await asyncio.to_thread(agent.close)


def memory(network: MemoryNetwork) -> Callable[[], Transport]:
    return lambda: MemoryTransport(network)


def random_kv(shape: KvShape, num_tokens: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = (shape.num_layers, shape.num_kv_heads, 2, num_tokens, shape.head_dim)
    return torch.randn(size, generator=generator).to(getattr(torch, shape.dtype))


def sent_pieces(send: SendBuffer, transfer_id: str, kv: torch.Tensor) -> tuple[Piece, ...]:
    """All pieces of ``kv``, put into the send buffer of one rank that holds it all, as they are announced."""
    pieces: list[Piece] = []
    for chunk in range(num_chunks(kv.shape[3])):
        start, stop = chunk_span(chunk, kv.shape[3])
        for layer in range(kv.shape[0]):
            digests = send.put(transfer_id, layer, chunk, kv[layer, :, :, start:stop])
            assert digests is not None
            pieces.append(Piece(0, layer, chunk, to_wire(digests)))
    return tuple(pieces)
