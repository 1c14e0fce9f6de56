"""A process that serves a send buffer until it is told to stop, killed, or two minutes old."""

import multiprocessing
import os
import select
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

import torch

from hexgen2.kv.choose import make_transports

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerProcess

LIFE_S = 120
START_S = 60


def contents(num_bytes: int, seed: int) -> torch.Tensor:
    """What the send buffer of a peer with this seed holds."""
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@dataclass
class Peer:
    """The process as its parent sees it."""

    process: "ForkServerProcess"
    pipe: Connection
    endpoint: bytes
    send: torch.Tensor

    def signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.process.kill()
        self.process.join(10)

    def stop(self) -> int | None:
        """Ask it to end by itself; its exit code."""
        self.pipe.send("stop")
        self.process.join(30)
        return self.process.exitcode


@contextmanager
def serving_peer(transport: str, num_bytes: int, seed: int = 1) -> Iterator[Peer]:
    """Start the process; it is gone afterwards."""
    # Children of a server that has torch already: 0.1 s to start instead of 3.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "hexgen2.kv.choose"])
    settings = {name: value for name, value in os.environ.items() if name.startswith("UCX_")}
    ours, theirs = context.Pipe()
    process = context.Process(target=_main, args=(theirs, transport, num_bytes, seed, settings))
    process.start()
    theirs.close()
    try:
        if not ours.poll(START_S):
            raise AssertionError(f"the peer did not start within {START_S} s")
        yield Peer(process, ours, ours.recv(), contents(num_bytes, seed))
    finally:
        process.kill()
        process.join(10)
        ours.close()


def _main(pipe: Connection, name: str, num_bytes: int, seed: int, settings: dict[str, str]) -> None:
    signal.alarm(LIFE_S)
    os.environ.update(settings)
    torch.set_num_threads(1)
    send = contents(num_bytes, seed)
    transport = make_transports(name, "127.0.0.1")[0]
    transport.register(send, None)
    transport.serving(True)
    pipe.send(transport.endpoint())
    # As an agent does: sleeps without a limit unless the transport says that it must be polled.
    wakers = [pipe.fileno(), *transport.selectable()]
    while pipe.fileno() not in select.select(wakers, [], [], 2e-4 if transport.needs_poll() else None)[0]:
        transport.poll()
    transport.close()
