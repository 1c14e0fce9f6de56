"""Latency and bandwidth from another host by the KV transport itself: one offers memory, the other reads it."""

import json
import select
import socket
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from statistics import median

import torch

from hexgen2.config import KvConfig
from hexgen2.errors import ConfigError, Unavailable
from hexgen2.kv.choose import make_transports, transport_name
from hexgen2.kv.transport import Span, Transport, TransportError

#: Memory that is offered and read, at once and in all.
OFFERED_BYTES, READ_BYTES = 32 << 20, 8 << 20
#: Small reads that are timed, and how long large ones are counted.
SMALL_READS, MEASURE_S = 20, 1.0
SILENT_TIMEOUT_S = 10.0
#: A transport that cannot wake its owner is looked at so often, as a KV agent does.
POLL_S = 0.0002
_LENGTH_BYTES = 4
MAX_ANSWER_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class LinkFigures:
    """One way. ``latency_s``: half of the time of a small read."""

    bandwidth_bytes_per_s: float
    latency_s: float
    transport: str


def offer(peer: socket.socket) -> None:
    """Let the other end of a connection read memory from here until it closes. Raises OSError."""
    name = _receive(peer).get("transport", "")
    try:
        transport = make_transports(str(name), peer.getsockname()[0])[0]
    except (ConfigError, ImportError, IndexError) as error:
        _send(peer, {"error": f"{name} cannot be used here: {error}"})
        return
    with closing(transport):
        transport.register(torch.ones(OFFERED_BYTES, dtype=torch.uint8), None)
        transport.serving(True)
        _send(peer, {"endpoint": transport.endpoint().hex()})
        peer.settimeout(None)
        while peer not in _wait(transport, [peer.fileno()], peer):
            transport.poll()


def measure(peer: socket.socket) -> LinkFigures:
    """Read from a peer that ``offer``s. Raises OSError, ConfigError, or Unavailable with what the peer says."""
    host = peer.getsockname()[0]
    name = transport_name(KvConfig(host=host))
    transport = make_transports(name, host)[0]
    with closing(transport):
        transport.register(None, torch.empty(READ_BYTES, dtype=torch.uint8))
        _send(peer, {"transport": name})
        answer = _receive(peer)
        if "endpoint" not in answer:
            raise Unavailable(f"the other end: {answer.get('error', 'no answer')}")
        endpoint = bytes.fromhex(str(answer["endpoint"]))
        small = [_read(transport, endpoint, 1) for _ in range(SMALL_READS)]
        total, began = 0, time.perf_counter()
        while (took := time.perf_counter() - began) < MEASURE_S:
            _read(transport, endpoint, READ_BYTES)
            total += READ_BYTES
        took = time.perf_counter() - began
        return LinkFigures(total / took, median(small[1:]) / 2, transport.describe())


def _read(transport: Transport, endpoint: bytes, num_bytes: int) -> float:
    began = time.perf_counter()
    try:
        handle = transport.read(endpoint, (Span(0, 0, num_bytes),))
        while True:
            for over, error in transport.poll():
                if error is not None:
                    raise error
                if over == handle:
                    return time.perf_counter() - began
            if time.perf_counter() - began > SILENT_TIMEOUT_S:
                raise Unavailable(f"no byte came within {SILENT_TIMEOUT_S:g} s")
            _wait(transport, ())
    except TransportError as error:
        raise Unavailable(str(error)) from error


def _wait(transport: Transport, others: Sequence[int], peer: socket.socket | None = None) -> Sequence[object]:
    """Until there is something to do; whether ``peer`` has closed is told by its being returned."""
    timeout_s = POLL_S if transport.needs_poll() and not transport.selectable() else 0.1
    readable, _, _ = select.select([*transport.selectable(), *others], [], [], timeout_s)
    return [peer] if peer is not None and peer.fileno() in readable else []


def _send(peer: socket.socket, message: dict[str, str]) -> None:
    data = json.dumps(message).encode()
    peer.sendall(len(data).to_bytes(_LENGTH_BYTES, "little") + data)


def _receive(peer: socket.socket) -> dict[str, object]:
    length = int.from_bytes(_exactly(peer, _LENGTH_BYTES), "little")
    if length > MAX_ANSWER_BYTES:
        raise ConnectionError("the other end does not speak this protocol")
    try:
        found = json.loads(_exactly(peer, length))
    except ValueError as error:
        raise ConnectionError("the other end does not speak this protocol") from error
    if not isinstance(found, dict):
        raise ConnectionError("the other end does not speak this protocol")
    return found


def _exactly(peer: socket.socket, num_bytes: int) -> bytes:
    data = b""
    while len(data) < num_bytes:
        more = peer.recv(num_bytes - len(data))
        if not more:
            raise ConnectionResetError("the other end closed")
        data += more
    return data
