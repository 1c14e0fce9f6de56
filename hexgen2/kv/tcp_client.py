"""ReadConnection: the reading end of one TCP connection to one peer's send buffer. Bytes land where they belong."""

import errno
import os
import selectors
import socket
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

from hexgen2.kv import tcp_wire as wire
from hexgen2.kv.tcp_socket import MAX_VIEWS, TURN_BYTES, advance, tune
from hexgen2.kv.tcp_stream import Stream, Streams
from hexgen2.kv.transport import Span, TransportError

#: Told of a read that is over.
Over = Callable[[int, TransportError | None], None]


@dataclass(slots=True)
class _Read:
    read_id: int
    views: deque[memoryview]
    num_bytes: int


class ReadConnection:
    """Requests go out, answers come in, in the same order.

    Once ``closed``, every read posted on it has been told to ``over`` and nothing writes its bytes any more.
    """

    def __init__(
        self,
        endpoint: wire.Endpoint,
        selector: selectors.BaseSelector,
        over: Over,
        streams: Streams,
        source: str = "",
    ) -> None:
        """Start to connect, from address ``source`` where it is given; does not block."""
        self.endpoint = endpoint
        self.closed = False
        self._selector, self._over = selector, over
        self._out = bytearray(wire.pack_hello(endpoint.nonce))
        self._reads: deque[_Read] = deque()  # asked for, oldest first
        self._header = bytearray()  # of the answer that comes next
        self._answering = False  # the header of the oldest read's answer is here; bytes of its spans follow
        self._refusal: bytearray | None = None  # text of a refusal that is arriving
        self._refusal_bytes = 0
        self._is_unwelcome = False  # the refusal is of this connection, not of one read
        self._streams = streams
        self._stream: Stream | None = None  # once there is a connection
        try:
            self._socket = socket.socket(socket.AF_INET6 if ":" in endpoint.host else socket.AF_INET)
        except OSError as error:
            raise TransportError(f"tcp: {error}") from error
        self._socket.setblocking(False)
        tune(self._socket)
        if source:
            try:
                self._socket.bind((source, 0))
            except OSError as error:
                self._socket.close()
                raise TransportError(f"tcp: cannot connect from {source}: {error}") from error
        code = self._socket.connect_ex((endpoint.host, endpoint.port))
        if code not in (0, errno.EINPROGRESS):
            self._socket.close()
            raise TransportError(f"tcp: cannot connect to {endpoint.host}:{endpoint.port}: {os.strerror(code)}")
        self._events = selectors.EVENT_READ | selectors.EVENT_WRITE  # the first event tells the outcome
        selector.register(self._socket, self._events, self._on_ready)

    @property
    def is_idle(self) -> bool:
        """Whether no read is open."""
        return not self._reads

    def post(self, read_id: int, spans: Sequence[Span], landing: memoryview) -> None:
        """Ask for ``spans`` (checked, merged) of the peer's buffer, to be put into ``landing``."""
        views = deque(landing[s.local_offset : s.local_offset + s.num_bytes] for s in spans)
        self._reads.append(_Read(read_id, views, sum(s.num_bytes for s in spans)))
        self._out += wire.pack_request(read_id, spans)
        if self._stream is not None:
            self._progress(self._send)

    def revoke(self, read_id: int) -> bool:
        """Throw away what is still to come of an open read; whether it is one of this connection's."""
        for read in self._reads:
            if read.read_id == read_id:
                left = sum(map(len, read.views))
                sink = memoryview(bytearray(min(left, TURN_BYTES)))
                whole, rest = divmod(left, TURN_BYTES)
                read.views = deque([sink] * whole + ([sink[:rest]] if rest else []))
                return True
        return False

    def landed_bytes(self, read_id: int) -> int | None:
        """Of an open read; None for a read that is not of this connection."""
        for read in self._reads:
            if read.read_id == read_id:
                return read.num_bytes - sum(map(len, read.views))
        return None

    def close(self, reason: str = "closed") -> None:
        """Give up all open reads with ``reason``. Idempotent."""
        if self.closed:
            return
        self.closed = True
        self._selector.unregister(self._socket)
        self._socket.close()
        reads, self._reads = self._reads, deque()
        for read in reads:
            peer = f"{self.endpoint.host}:{self.endpoint.port}"
            self._over(read.read_id, TransportError(f"tcp: read from {peer} failed: {reason}"))

    def _on_ready(self, events: int) -> None:
        if self.closed:  # by another connection's event, seen in the same turn
            return
        if self._stream is None:
            error = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                self.close(f"cannot connect: {os.strerror(error)}")
                return
            try:
                self._stream = self._streams.connected(self._socket, self.endpoint.name or self.endpoint.host)
            except OSError as bad:
                self.close(str(bad))
                return
            self._socket = self._stream.socket
        if events & selectors.EVENT_WRITE:
            self._progress(self._send)
        if events & selectors.EVENT_READ and not self.closed:
            self._progress(self._receive)

    def _progress(self, step: Callable[[], None]) -> None:
        try:
            step()
        except BlockingIOError:
            pass
        except (OSError, TransportError) as error:
            self.close(str(error))
            return
        assert self._stream is not None
        events = self._stream.waits_for or selectors.EVENT_READ | (selectors.EVENT_WRITE if self._out else 0)
        if events != self._events and not self.closed:
            self._events = events
            self._selector.modify(self._socket, events, self._on_ready)

    def _send(self) -> None:
        assert self._stream is not None
        while self._out:
            with memoryview(self._out) as view:
                count = self._stream.send((view,))
            del self._out[:count]

    def _receive(self) -> None:
        """Take at most about TURN_BYTES, so that other connections get their turn."""
        assert self._stream is not None
        received = 0
        while received < TURN_BYTES or self._stream.holds_bytes:
            if self._refusal is not None:
                received += self._receive_into(self._refusal, self._refusal_bytes)
                if len(self._refusal) == self._refusal_bytes:
                    text = f"refused: {self._refusal.decode(errors='replace')}"
                    if self._is_unwelcome:
                        raise TransportError(text)
                    self._finish(TransportError(f"tcp: {text}"))
            elif self._answering:
                views = self._reads[0].views
                count = self._stream.receive_into([*islice(views, MAX_VIEWS)]) if views else 0
                if views and not count:
                    raise TransportError("the peer closed the connection")
                received += count
                advance(views, count)
                if not views:
                    self._finish(None)
            else:
                received += self._receive_into(self._header, wire.ANSWER.size)
                if len(self._header) == wire.ANSWER.size:
                    self._begin_answer()

    def _receive_into(self, buffer: bytearray, size: int) -> int:
        assert self._stream is not None
        data = self._stream.receive(size - len(buffer))
        if not data and size > len(buffer):
            raise TransportError("the peer closed the connection")
        buffer += data
        return len(data)

    def _begin_answer(self) -> None:
        read_id, status, num_bytes = wire.ANSWER.unpack(self._header)
        self._header.clear()
        read = self._reads[0] if self._reads else None
        if status == wire.REFUSED and num_bytes <= wire.MAX_REFUSAL_BYTES and read is not None:
            self._refusal, self._refusal_bytes = bytearray(), num_bytes
            self._is_unwelcome = read_id == wire.WHOLE_CONNECTION
        elif status == wire.OK and read is not None and (read_id, num_bytes) == (read.read_id, read.num_bytes):
            self._answering = True
        else:
            raise TransportError("the peer answered what was not asked")

    def _finish(self, error: TransportError | None) -> None:
        self._answering, self._refusal = False, None
        self._over(self._reads.popleft().read_id, error)
