"""What a KV connection's bytes go through: the bare socket, or TLS 1.3 with certificates on both sides.

Non-blocking: a call that can move nothing raises BlockingIOError, like a socket. TLS moves its handshake on in the
calls that send and receive; who waits for the socket asks ``waits_for`` first.
"""

import selectors
import socket
import ssl
from collections.abc import Sequence
from typing import Protocol

from hexgen2.kv.tcp_socket import TURN_BYTES
from hexgen2.kv.transport import TransportError
from hexgen2.security.callers import Caller
from hexgen2.security.tls import TlsFiles
from hexgen2.security.tls_context import Contexts, callers_at, peer_context


class Stream(Protocol):
    """An open connection. All methods raise OSError or TransportError when it is broken."""

    @property
    def socket(self) -> socket.socket:
        """To be waited for and closed."""
        ...

    @property
    def waits_for(self) -> int:
        """The one event that a handshake waits for; 0 when there is none (any more)."""
        ...

    @property
    def holds_bytes(self) -> bool:
        """Whether bytes have been taken from the socket that no call has received yet."""
        ...

    def send(self, views: Sequence[memoryview]) -> int:
        """As ``sendmsg``: how many bytes went."""
        ...

    def receive_into(self, views: Sequence[memoryview]) -> int:
        """As ``recvmsg_into``: how many bytes came; 0 at the end."""
        ...

    def receive(self, num_bytes: int) -> bytes:
        """As ``recv``; empty at the end."""
        ...


class PlainStream:
    """The bare socket."""

    waits_for = 0
    holds_bytes = False

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock

    def send(self, views: Sequence[memoryview]) -> int:
        """See ``Stream``."""
        return self.socket.sendmsg(views)

    def receive_into(self, views: Sequence[memoryview]) -> int:
        """See ``Stream``."""
        return self.socket.recvmsg_into(views)[0]

    def receive(self, num_bytes: int) -> bytes:
        """See ``Stream``."""
        return self.socket.recv(num_bytes)


class TlsStream:
    """TLS over a connected socket, which it takes over. The other side must show the certificate of a worker."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, server_host: str | None) -> None:
        """``server_host``: whose certificate a reader wants to see; None on the side that serves."""
        self._tls = context.wrap_socket(
            sock, server_side=server_host is None, server_hostname=server_host, do_handshake_on_connect=False
        )
        self.socket: socket.socket = self._tls
        self.waits_for = selectors.EVENT_READ if server_host is None else selectors.EVENT_WRITE

    @property
    def holds_bytes(self) -> bool:
        """See ``Stream``."""
        return not self.waits_for and self._tls.pending() > 0

    def send(self, views: Sequence[memoryview]) -> int:
        """See ``Stream``. A record of 16 KiB at a time, as OpenSSL does it."""
        self._shake_hands()
        sent = 0
        try:
            for view in views:
                at = 0
                while at < len(view):
                    count = self._tls.send(view[at:])
                    at += count
                    sent += count
                if sent >= TURN_BYTES:
                    break
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            if not sent:
                raise BlockingIOError from None
        return sent

    def receive_into(self, views: Sequence[memoryview]) -> int:
        """See ``Stream``."""
        self._shake_hands()
        received = 0
        try:
            for view in views:
                at = 0
                while at < len(view):
                    count = self._tls.recv_into(view[at:])
                    if not count:
                        return received
                    at += count
                    received += count
                if received >= TURN_BYTES:
                    break
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            if not received:
                raise BlockingIOError from None
        return received

    def receive(self, num_bytes: int) -> bytes:
        """See ``Stream``."""
        self._shake_hands()
        if not num_bytes:
            return b""
        try:
            return self._tls.recv(num_bytes)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None

    def _shake_hands(self) -> None:
        if not self.waits_for:
            return
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self.waits_for = selectors.EVENT_READ
            raise BlockingIOError from None
        except ssl.SSLWantWriteError:
            self.waits_for = selectors.EVENT_WRITE
            raise BlockingIOError from None
        if Caller.WORKER not in callers_at(self._tls):
            raise TransportError("the peer's certificate is no worker's")
        self.waits_for = 0


class Streams:
    """Makes the streams of one transport: over TLS where there are certificates."""

    def __init__(self, tls: TlsFiles | None) -> None:
        """Raises ConfigError for certificates that cannot be used."""
        self.over_tls = tls is not None
        self._accepting = self._reading = None
        if tls is not None:
            self._accepting = Contexts(tls, lambda files: peer_context(files, server=True))
            self._reading = Contexts(tls, lambda files: peer_context(files, server=False))

    def accepted(self, sock: socket.socket) -> Stream:
        """Of a connection that a reader has made to us."""
        return PlainStream(sock) if self._accepting is None else TlsStream(sock, self._accepting.current(), None)

    def connected(self, sock: socket.socket, host: str) -> Stream:
        """Of a connection that we have made to ``host``, to read from it."""
        return PlainStream(sock) if self._reading is None else TlsStream(sock, self._reading.current(), host)
