"""ReadServer: lets peers that know its nonce read one send buffer. Bytes leave straight from the buffer."""

import errno
import selectors
import socket
from collections import deque
from hmac import compare_digest
from itertools import islice

from hexgen2.errors import ConfigError
from hexgen2.kv import tcp_wire as wire
from hexgen2.kv.tcp_socket import MAX_VIEWS, TURN_BYTES, advance, tune
from hexgen2.kv.tcp_stream import Stream, Streams
from hexgen2.kv.transport import TransportError

# Bounds on what strangers can make us keep. A decode rank holds one connection to each prefill rank it reads from.
_MAX_PEERS = 1024
_MAX_QUEUED_VIEWS = wire.MAX_SPANS
_RECEIVE_BYTES = 64 << 10


class ReadServer:
    """A listening socket and its connections, driven by the selector's owner."""

    def __init__(
        self, host: str, nonce: bytes, buffer: memoryview, selector: selectors.BaseSelector, streams: Streams
    ) -> None:
        """Listen on a free port of ``host``. Raises ConfigError when that cannot be."""
        self.nonce, self.buffer, self.selector, self._streams = nonce, buffer, selector, streams
        self.peers: dict[_Peer, None] = {}  # a set in order of arrival
        self.failed_handshakes = 0
        try:
            family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
            self._socket = socket.socket(family)
            try:
                self._socket.bind(address)
                self._socket.listen(128)
            except OSError:
                self._socket.close()
                raise
        except OSError as error:
            raise ConfigError(f"kv.host: cannot listen on {host!r}: {error}") from error
        self._socket.setblocking(False)
        self.host, self.port = self._socket.getsockname()[:2]
        selector.register(self._socket, selectors.EVENT_READ, self._on_ready)

    def close(self) -> None:
        """Close all connections. Idempotent."""
        if self._socket.fileno() >= 0:
            self.selector.unregister(self._socket)
            self._socket.close()
        for peer in list(self.peers):
            peer.close()

    def _on_ready(self, _events: int) -> None:
        try:
            accepted, _ = self._socket.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE) and self.peers:
                self._make_room()
            return
        accepted.setblocking(False)
        tune(accepted)
        if len(self.peers) >= _MAX_PEERS:
            self._make_room()
        try:
            stream = self._streams.accepted(accepted)
        except OSError:  # it is gone already
            accepted.close()
            return
        self.peers[_Peer(stream, self)] = None

    def _make_room(self) -> None:
        """Close the oldest connection that has not said hello, or the oldest of all."""
        next((peer for peer in self.peers if not peer.is_known), next(iter(self.peers))).close()


class _Peer:
    """One connection to a reader."""

    def __init__(self, stream: Stream, server: ReadServer) -> None:
        self.is_known = False
        self._stream, self._socket, self._server = stream, stream.socket, server
        self._in = bytearray()
        self._out: deque[memoryview] = deque()
        self._refused = False
        self._events = selectors.EVENT_READ
        server.selector.register(self._socket, self._events, self._on_ready)

    def close(self) -> None:
        self._server.peers.pop(self, None)
        if self._socket.fileno() >= 0:
            self._server.failed_handshakes += bool(self._stream.waits_for)
            self._server.selector.unregister(self._socket)
            self._socket.close()
        self._out.clear()

    def _on_ready(self, events: int) -> None:
        if self._socket.fileno() < 0:  # closed by another connection's event, seen in the same turn
            return
        try:
            if events & selectors.EVENT_READ or self._stream.waits_for:
                self._receive()
            if self._out:
                self._send()
        except BlockingIOError:
            pass
        except (OSError, TransportError):  # the reader is gone, or is none; what it wanted is nobody's concern now
            self.close()
        if self._socket.fileno() < 0:
            return
        # Who asks faster than he takes is not listened to meanwhile.
        wanted = selectors.EVENT_READ if len(self._out) < _MAX_QUEUED_VIEWS else 0
        wanted |= selectors.EVENT_WRITE if self._out else 0
        wanted = self._stream.waits_for or wanted
        if wanted != self._events:
            self._events = wanted
            self._server.selector.modify(self._socket, wanted, self._on_ready)

    def _receive(self) -> None:
        data = self._stream.receive(_RECEIVE_BYTES)
        if not data:
            self.close()
            return
        if self._refused:
            return  # kept open until the reader has read why
        self._in += data
        if not self.is_known:
            if len(self._in) < wire.HELLO.size:
                return
            hello = bytes(self._in[: wire.HELLO.size])
            del self._in[: wire.HELLO.size]
            if not compare_digest(hello, wire.pack_hello(self._server.nonce)):
                self._refuse(wire.WHOLE_CONNECTION, "this endpoint is not served here (any more)")
                self._refused = True
                self._in.clear()
                return
            self.is_known = True
        while (request := wire.take_request(self._in)) is not None:
            self._answer(request)

    def _answer(self, request: wire.Request) -> None:
        buffer = self._server.buffer
        reason = wire.refusal(request.ranges, len(buffer))
        if reason is not None:
            self._refuse(request.read_id, reason)
            return
        num_bytes = sum(length for _, length in request.ranges)
        self._out.append(memoryview(wire.ANSWER.pack(request.read_id, wire.OK, num_bytes)))
        self._out.extend(buffer[offset : offset + length] for offset, length in request.ranges if length)

    def _refuse(self, read_id: int, reason: str) -> None:
        text = reason.encode()[: wire.MAX_REFUSAL_BYTES]
        self._out.append(memoryview(wire.ANSWER.pack(read_id, wire.REFUSED, len(text)) + text))

    def _send(self) -> None:
        """Give at most about TURN_BYTES, so that other connections get their turn."""
        sent = 0
        while self._out and sent < TURN_BYTES:
            count = self._stream.send([*islice(self._out, MAX_VIEWS)])
            advance(self._out, count)
            sent += count
