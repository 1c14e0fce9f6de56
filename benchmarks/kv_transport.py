"""How fast the KV transports move bytes between two processes, beside the bare thing each is made of.

TcpTransport beside a blocking socket that is read in a loop, UcxTransport beside bare NIXL READs, taken in turns.
Each figure is the median of the repetitions. Run from the root of the tree: ``python -m benchmarks.kv_transport``.
"""

import json
import multiprocessing
import os
import select
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from multiprocessing.connection import Connection
from statistics import median
from time import perf_counter, sleep

import click
import torch

from hexgen2.kv.choose import make_transport
from hexgen2.kv.transport import Span, Transport
from hexgen2.kv.ucx import NIXL_MODULES, UcxTransport

HOST = "127.0.0.1"
LIFE_S = 300
START_S = 60
POLL_S = 0.0002


@dataclass(frozen=True, slots=True)
class Row:
    """One size over one transport."""

    transport: str
    bytes: int
    gb_per_s: float
    raw_gb_per_s: float
    ratio: float


@click.command()
@click.option("--transport", "names", multiple=True, type=click.Choice(["tcp", "ucx"]), help="default: all there are")
@click.option("--mib", "sizes", multiple=True, type=click.IntRange(1, 1024), default=(1, 4, 16), show_default=True)
@click.option("--repeat", default=15, show_default=True, type=click.IntRange(1, 1000))
@click.option("--json", "as_json", is_flag=True, help="print the rows as JSON")
def main(names: tuple[str, ...], sizes: tuple[int, ...], repeat: int, as_json: bool) -> None:
    """Measure reads of each size over each transport and over what is beneath it."""
    torch.set_num_threads(1)
    names = names or (("tcp", "ucx") if any(map(find_spec, NIXL_MODULES)) else ("tcp",))
    rows = [row for name in names for row in measure(name, [mib << 20 for mib in sizes], repeat)]
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=1))
        return
    click.echo(f"{'transport':24}{'MiB':>6}{'GB/s':>8}{'bare':>8}{'ratio':>8}")
    for row in rows:
        click.echo(f"{row.transport:24}{row.bytes >> 20:6}{row.gb_per_s:8.2f}{row.raw_gb_per_s:8.2f}{row.ratio:8.2f}")


def measure(name: str, sizes: list[int], repeat: int) -> Iterator[Row]:
    """One row per size."""
    with ExitStack() as stack:
        landing = torch.zeros(max(sizes), dtype=torch.uint8)
        endpoint = stack.enter_context(child(serve, name, max(sizes)))
        reader = make_transport(name, HOST)
        stack.callback(reader.close)
        reader.register(None, landing)
        bare: Callable[[int], None]
        if isinstance(reader, UcxTransport):
            bare = partial(nixl_read, reader, endpoint)
        else:
            port = int(stack.enter_context(child(serve_raw, max(sizes))))
            sock = stack.enter_context(socket.create_connection((HOST, port)))
            bare = partial(raw_read, sock, landing)
        for size in sizes:
            ours_s, bare_s = [], []
            for turn in range(repeat + 2):  # the first two warm up
                taken = timed(partial(read, reader, endpoint, size)), timed(partial(bare, size))
                if turn >= 2:
                    ours_s.append(taken[0])
                    bare_s.append(taken[1])
            ours, raw = size / median(ours_s) / 1e9, size / median(bare_s) / 1e9
            label = f"ucx ({os.environ.get('UCX_TLS', 'all')})" if name == "ucx" else name
            yield Row(label, size, round(ours, 3), round(raw, 3), round(ours / raw, 3))


def timed(call: Callable[[], None]) -> float:
    """Seconds that the call takes."""
    began = perf_counter()
    call()
    return perf_counter() - began


def read(reader: Transport, endpoint: bytes, size: int) -> None:
    """As the KV agent does: sleep until there is something to do, poll in between where that is needed."""
    reader.read(endpoint, [Span(0, 0, size)])
    over = reader.poll()
    while not over:
        if reader.needs_poll():
            sleep(POLL_S)
        else:
            select.select(reader.selectable(), [], [], START_S)
        over = reader.poll()
    if over[0][1] is not None:
        raise over[0][1]


def raw_read(sock: socket.socket, landing: torch.Tensor, size: int) -> None:
    """A blocking socket, read straight into place."""
    sock.sendall(size.to_bytes(8, "little"))
    view = landing.numpy().data[:size]
    while view:
        view = view[sock.recv_into(view) :]


def nixl_read(transport: UcxTransport, endpoint: bytes, size: int) -> None:
    """One NIXL READ of the same memory by the same agent, looked at without a pause."""
    agent, peer, landing = transport._agent, transport._peer(endpoint), transport._landing
    assert landing is not None
    transfer = agent.initialize_xfer(
        "READ",
        agent.get_xfer_descs([(landing.data_ptr(), size, 0)], "DRAM"),
        agent.get_xfer_descs([(peer.endpoint.base, size, 0)], "DRAM"),
        peer.name,
        backends=["UCX"],
    )
    state = agent.transfer(transfer)
    while state == "PROC":
        state = agent.check_xfer_state(transfer)
    transfer.release()
    if state != "DONE":
        raise RuntimeError(f"NIXL says {state}")


@contextmanager
def child(target: Callable[..., None], *args: object) -> Iterator[bytes]:
    """A process that sends one message when it is ready; killed afterwards."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, *args))
    process.start()
    try:
        if not ours.poll(START_S):
            raise click.ClickException(f"the serving process did not start within {START_S} s")
        yield ours.recv()
    finally:
        process.kill()
        process.join(10)


def serve(pipe: Connection, name: str, num_bytes: int) -> None:
    """Serve a send buffer over the transport."""
    signal.alarm(LIFE_S)
    transport = make_transport(name, HOST)
    transport.register(torch.ones(num_bytes, dtype=torch.uint8), None)
    transport.serving(True)
    pipe.send(transport.endpoint())
    while True:
        if transport.needs_poll():
            sleep(POLL_S)
        else:
            select.select(transport.selectable(), [], [])
        transport.poll()


def serve_raw(pipe: Connection, num_bytes: int) -> None:
    """Serve bytes on a blocking socket: eight bytes of size come in, so many bytes go out."""
    signal.alarm(LIFE_S)
    data = torch.ones(num_bytes, dtype=torch.uint8).numpy().data
    with socket.create_server((HOST, 0)) as listening:
        pipe.send(str(listening.getsockname()[1]))
        accepted, _ = listening.accept()
        with accepted:
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while request := accepted.recv(8, socket.MSG_WAITALL):
                accepted.sendall(data[: int.from_bytes(request, "little")])


if __name__ == "__main__":
    main()
