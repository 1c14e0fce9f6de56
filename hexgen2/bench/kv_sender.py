"""The sending process of ``hexgen2 bench kv``: a real KV agent with real pieces, and the bare transport beside it.

Standard input and output are the lines of ``kv_talk``; it ends with its input.
"""

import asyncio
import os
import signal
import socket
import sys
from threading import Event as Flag
from threading import Thread
from time import monotonic, sleep

import msgspec
import torch

from hexgen2.bench import kv_stages
from hexgen2.bench.kv_agent import agent_up
from hexgen2.bench.kv_talk import SHAPE, SLICE, TOKEN, Drop, HasPut, Held, Hold, Put, Raw, Setup, ToSender, Up, line
from hexgen2.kv.agent import KvAgent
from hexgen2.kv.choose import make_transports
from hexgen2.kv.host_memory import buffer
from hexgen2.kv.messages import Ready
from hexgen2.kv.ranks import Event, Ranks
from hexgen2.kv.transport import Transport
from hexgen2.kv.wire import CHUNK_TOKENS, PageLayout, num_chunks

LIFE_S = 900
#: Tokens that a step of the engine computes.
STEP_TOKENS = 512


class Sender:
    """See the module."""

    def __init__(self, setup: Setup, hub: Ranks, agent: KvAgent) -> None:
        self._hub, self._agent = hub, agent
        # As vLLM lays it out on CUDA: a token's heads side by side, so that gathering permutes.
        shape = (SHAPE.num_layers, 2, setup.max_tokens, SHAPE.num_kv_heads, SHAPE.head_dim)
        self._kv = torch.randn(shape).to(torch.bfloat16)
        self._held: dict[str, Hold] = {}

    async def obey(self, message: ToSender) -> None:
        """Carry out one message."""
        match message:
            case Hold():
                self._held[message.transfer_id] = message
                kv_stages.use_digests(message.digest)
                pages = tuple(range(num_chunks(message.num_tokens)))
                await self._hub.open_send(
                    message.transfer_id, TOKEN, message.num_tokens, message.codec, pages, self._tell
                )
                say(line(Held()))
            case Put():
                say(line(HasPut(await asyncio.to_thread(self._put, message))))
            case Drop():
                await self._hub.close(message.transfer_id)
            case Raw():
                pass

    def _tell(self, _rank: int, event: Event) -> None:
        if isinstance(event, Ready):
            say(line(event))

    def _put(self, message: Put) -> float:
        num_tokens = self._held[message.transfer_id].num_tokens
        layers = -(-num_tokens // STEP_TOKENS) * SHAPE.num_layers
        began = monotonic()
        for number in range(layers):
            step, layer = divmod(number, SHAPE.num_layers)
            if message.prefill_s:
                # A step's layer is computed now; the next one is under way while this one leaves.
                sleep(max(0.0, began + (number + 1) * message.prefill_s / layers - monotonic()))
            start, stop = step * STEP_TOKENS, min((step + 1) * STEP_TOKENS, num_tokens)
            piece = self._kv[layer, :, start:stop].permute(2, 0, 1, 3)
            self._agent.put(message.transfer_id, layer, start // CHUNK_TOKENS, piece)
            if message.prefill_s:
                self._agent.flush()
        self._agent.flush()
        return monotonic()


def say(text: bytes) -> None:
    """To the receiving process."""
    sys.stdout.buffer.write(text)
    sys.stdout.buffer.flush()


def serve_socket(listening: socket.socket, data: memoryview) -> None:
    """Bare TCP: eight bytes of size come in, so many bytes go out."""
    while True:
        accepted, _ = listening.accept()
        with accepted:
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while request := accepted.recv(8, socket.MSG_WAITALL):
                accepted.sendall(data[: int.from_bytes(request, "little")])


def serve_transport(transport: Transport, active: Flag) -> None:
    """Bare NIXL, whose owner must poll while a peer reads."""
    while True:
        active.wait()
        transport.serving(True)
        transport.poll()
        sleep(0.0002)


async def main(setup: Setup) -> None:
    """Serve until standard input ends."""
    layout = PageLayout(SHAPE, SLICE)
    num_bytes = num_chunks(setup.max_tokens) * layout.page_bytes
    raw = buffer(num_bytes, torch.device("cpu")).fill_(1)
    active, raw_endpoint = Flag(), b""
    if setup.transport == "ucx":
        transport = make_transports("ucx", setup.hosts, setup.devices)[0]
        transport.register(raw, None)
        raw_endpoint = transport.endpoint()
        Thread(target=serve_transport, args=(transport, active), daemon=True).start()
    listening = socket.create_server((setup.hosts.split(",")[0], 0))
    Thread(target=serve_socket, args=(listening, raw.numpy().data), daemon=True).start()
    async with agent_up(setup, 60.0, send_bytes=num_bytes) as (hub, agent):
        hello = hub.hellos[0]
        sender = Sender(setup, hub, agent)
        say(line(Up(hello.endpoints, hello.page_bytes, listening.getsockname()[1], raw_endpoint)))
        decoder: msgspec.json.Decoder[ToSender] = msgspec.json.Decoder(ToSender)
        reader = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        while text := await reader.readline():
            message = decoder.decode(text)
            if isinstance(message, Raw):
                active.set() if message.active else active.clear()
                say(line(Held()))
            else:
                await sender.obey(message)


if __name__ == "__main__":
    signal.alarm(LIFE_S)
    torch.set_num_threads(1)
    asyncio.run(main(msgspec.json.decode(sys.argv[1], type=Setup)))
    # UCX's exit handlers may crash where there is no InfiniBand.
    os._exit(0)
