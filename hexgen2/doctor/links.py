"""Reachability, round trip and bandwidth between two hosts, by plain TCP: one serves, the other measures."""

import socket
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import TYPE_CHECKING

from hexgen2.address import format_address, parse_address
from hexgen2.doctor.finding import Finding, failed, ok
from hexgen2.errors import ConfigError, HexgenError, Unavailable

if TYPE_CHECKING:
    from hexgen2.doctor.kv_link import LinkFigures

CONNECT_TIMEOUT_S = 5.0
SILENT_TIMEOUT_S = 10.0
#: How long bytes are counted, and how many round trips are timed.
MEASURE_S = 1.0
ROUND_TRIPS = 20

_PING, _FLOOD, _KV = b"p", b"f", b"k"
_CHUNK = bytes(1 << 20)


def serve(listen: str) -> Generator[str, None, None]:
    """Answer peers one at a time. Yields the bound address, then a line for each peer; ends when closed.

    Raises:
        ConfigError: the address cannot be bound.
    """
    host, port = parse_address(listen)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        server = socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(f"cannot listen on {listen}: {error.strerror}") from None
    with closing(server):
        yield format_address(host, server.getsockname()[1])
        while True:
            peer, (address, *_) = server.accept()
            with closing(peer):
                peer.settimeout(SILENT_TIMEOUT_S)
                try:
                    _answer(peer)
                except OSError as error:
                    yield f"{address}: {error}"
                else:
                    yield f"{address}: measured"


def _answer(peer: socket.socket) -> None:
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while (asked := peer.recv(1)) == _PING:
        peer.sendall(_PING)
    if asked == _KV:
        # Imports torch, which a check of reachability alone does without.
        from hexgen2.doctor import kv_link

        kv_link.offer(peer)
    if asked == _FLOOD:
        # Until the one who measures has seen enough and closes.
        try:
            while True:
                peer.sendall(_CHUNK)
        except (BrokenPipeError, ConnectionResetError):
            return


def measure_kv(address: str) -> "LinkFigures":
    """Latency and bandwidth by the KV transport from ``address``, where ``serve`` runs, to here.

    Raises:
        Unavailable: it cannot be measured; says why and what to do.
    """
    from hexgen2.doctor import kv_link

    try:
        host, port = parse_address(address)
        with closing(socket.create_connection((host, port), CONNECT_TIMEOUT_S)) as peer:
            peer.settimeout(SILENT_TIMEOUT_S)
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            peer.sendall(_KV)
            return kv_link.measure(peer)
    except (OSError, HexgenError) as error:
        raise Unavailable(
            f"the link from {address} cannot be measured: {error}; on the other host: hexgen2 doctor --serve "
            f"{address}; look at firewalls"
        ) from error


def measure(address: str) -> Iterator[Finding]:
    """Round trip and bandwidth from ``address``, where ``serve`` runs, to here."""
    check = f"link from {address}"
    try:
        host, port = parse_address(address)
        with closing(socket.create_connection((host, port), CONNECT_TIMEOUT_S)) as peer:
            peer.settimeout(SILENT_TIMEOUT_S)
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            round_trip_s = sorted(_ping(peer) for _ in range(ROUND_TRIPS))[ROUND_TRIPS // 2]
            bytes_per_s = _flood(peer)
    except (OSError, ConfigError) as error:
        yield failed(check, str(error), f"on the other host: hexgen2 doctor --serve {address}; look at firewalls")
        return
    yield ok(check, f"round trip {round_trip_s * 1e3:.2f} ms, {bytes_per_s * 8 / 1e9:.2f} Gbit/s")


def _ping(peer: socket.socket) -> float:
    began = time.perf_counter()
    peer.sendall(_PING)
    if not peer.recv(1):
        raise ConnectionResetError("the other end closed")
    return time.perf_counter() - began


def _flood(peer: socket.socket) -> float:
    peer.sendall(_FLOOD)
    into = bytearray(len(_CHUNK))
    total, began = 0, time.perf_counter()
    while (took := time.perf_counter() - began) < MEASURE_S:
        count = peer.recv_into(into)
        if not count:
            raise ConnectionResetError("the other end closed")
        total += count
    return total / took
