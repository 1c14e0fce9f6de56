"""TcpTransport: KV reads over plain TCP sockets, where NIXL is not installed or the network carries nothing else.

No thread of its own: ``poll`` moves whatever can move without blocking. It need not be called in a loop: the one
descriptor in ``selectable`` is readable whenever there is something to do. Host memory only.
"""

import secrets
import selectors
from collections.abc import Sequence
from ipaddress import ip_address
from typing import TYPE_CHECKING

from hexgen2.errors import ConfigError
from hexgen2.kv import tcp_wire as wire
from hexgen2.kv.tcp_client import ReadConnection
from hexgen2.kv.tcp_server import ReadServer
from hexgen2.kv.tcp_stream import Streams
from hexgen2.kv.transport import Span, TransportError, check_spans, merged
from hexgen2.security.tls import TlsFiles

if TYPE_CHECKING:
    import torch

# Idle connections beyond this are closed, oldest first: peers that were restarted leave endpoints behind.
_MAX_CONNECTIONS = 256


class TcpTransport:
    """See the module and ``transport.Transport``.

    Args:
        host: address or name that the send buffer is served on and that peers are told.
        tls: certificates; every connection is TLS then. Both sides of a transfer must have the same name.
        bind: connect to peers from that address, too: where a rank has several, each is a way of its own.
    """

    def __init__(self, host: str, tls: TlsFiles | None = None, *, bind: bool = False) -> None:
        if host in ("", "0.0.0.0", "::"):
            raise ConfigError(f"kv.host: {host!r} is not an address that peers can connect to")
        self.name = "tcp" if tls is None else "tcp+tls"
        # What comes is digested while it is in the cache.
        self.direct_read_bytes = 4 << 20
        self._host = self.local = host
        self._bind = host if bind else ""
        self._streams = Streams(tls)
        self._selector = selectors.DefaultSelector()
        self._server: ReadServer | None = None
        self._endpoint = b""
        self._landing = memoryview(b"")
        self._connections: dict[bytes, ReadConnection] = {}
        self._over: list[tuple[int, TransportError | None]] = []
        self._next_handle = 0

    def register(self, send: "torch.Tensor | None", landing: "torch.Tensor | None") -> None:
        """Serve ``send`` from now on (if any). Raises ConfigError for device memory or an address not ours."""
        if landing is not None:
            self._landing = _host_memory("landing", landing)
        if send is not None:
            buffer = _host_memory("send", send)
            nonce = secrets.token_bytes(wire.NONCE_BYTES)
            self._server = ReadServer(self._host, nonce, buffer, self._selector, self._streams)
            # Peers connect to the address that the name has here, and find the name in the certificate.
            name = "" if _is_address(self._host) else self._host
            self._endpoint = wire.Endpoint(self._server.host, self._server.port, nonce, len(buffer), name).pack()

    def endpoint(self) -> bytes:
        """Address, size and nonce of our send buffer. Whoever has it can read that: it travels like a secret."""
        return self._endpoint

    def describe(self) -> str:
        """For people."""
        return self.name

    def read(self, endpoint: bytes, spans: Sequence[Span]) -> int:
        """Post a read, connecting first where there is no connection yet."""
        peer = wire.Endpoint.unpack(endpoint)
        check_spans(spans, peer.num_bytes, len(self._landing))
        spans = merged(spans)
        if len(spans) > wire.MAX_SPANS:
            raise TransportError(f"tcp: a read of {len(spans)} spans, at most {wire.MAX_SPANS} are allowed")
        connection = self._connections.pop(endpoint, None)
        if connection is None or connection.closed:
            self._close_idle()
            connection = ReadConnection(peer, self._selector, self._is_over, self._streams, self._bind)
        self._connections[endpoint] = connection  # last in the order of use
        self._next_handle += 1
        connection.post(self._next_handle, spans, self._landing)
        return self._next_handle

    def poll(self) -> Sequence[tuple[int, TransportError | None]]:
        """Move what can be moved."""
        for key, events in self._selector.select(0):
            key.data(events)
        over, self._over = self._over, []
        return over

    def is_direct(self, endpoint: bytes) -> bool:
        """Always: this process itself puts the bytes where they go."""
        return True

    def revoke(self, handle: int) -> bool:
        """What is still to come of it is thrown away as it comes."""
        return any(connection.revoke(handle) for connection in self._connections.values())

    def landed_bytes(self, handle: int) -> int:
        """Exact."""
        return next((n for c in self._connections.values() if (n := c.landed_bytes(handle)) is not None), 0)

    def cut(self, endpoint: bytes) -> None:
        """Close the connection, which ends its reads."""
        connection = self._connections.pop(endpoint, None)
        if connection is not None:
            connection.close("given up")

    def serving(self, active: bool) -> None:
        """Nothing to do: requests of peers make ``selectable`` readable."""

    def needs_poll(self) -> bool:
        """Only to fetch the outcome of reads that are over already; the rest shows in ``selectable``."""
        return bool(self._over)

    def failed_handshakes(self) -> int:
        """Of readers without a certificate of the fleet, or with too much patience."""
        server = self._server
        if server is None:
            return 0
        count, server.failed_handshakes = server.failed_handshakes, 0
        return count

    def selectable(self) -> Sequence[int]:
        """The selector's own descriptor."""
        return (self._selector.fileno(),)

    def close(self) -> None:
        """Close all sockets. Peers' reads from us fail."""
        if self._server is not None:
            self._server.close()
        for connection in self._connections.values():
            connection.close()
        self._connections.clear()
        self._selector.close()
        self._landing = memoryview(b"")

    def _is_over(self, handle: int, error: TransportError | None) -> None:
        self._over.append((handle, error))

    def _close_idle(self) -> None:
        self._connections = {key: c for key, c in self._connections.items() if not c.closed}
        excess = len(self._connections) - _MAX_CONNECTIONS + 1
        for key in [key for key, c in self._connections.items() if c.is_idle][: max(0, excess)]:
            self._connections.pop(key).close()


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _host_memory(name: str, buffer: "torch.Tensor") -> memoryview:
    if buffer.device.type != "cpu":
        raise ConfigError(f"kv.transport: tcp moves host memory only, the {name} buffer is on {buffer.device}; use ucx")
    return buffer.numpy().data.cast("B")
