"""What TcpTransport says on its connections: a hello, requests one way, answers the other. Pure.

Little-endian. The reader opens with ``HELLO`` (magic and the nonce of the endpoint it means), then sends requests:
``REQUEST`` (read id, number of spans) and that many ``SPAN`` (offset, length). The server answers each, in order, with
``ANSWER`` (read id, status, length) and that many bytes: the spans one after another, or the reason of a refusal.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from struct import Struct, error

from hexgen2.kv.transport import Span, TransportError

NONCE_BYTES = 32
_MAGIC = b"hexgkv01"
_ENDPOINT = Struct(f"<8s{NONCE_BYTES}sQH")
HELLO = Struct(f"<8s{NONCE_BYTES}s")
REQUEST = Struct("<QI4x")
SPAN = Struct("<QQ")
ANSWER = Struct("<QI4xQ")

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,253}")

OK, REFUSED = 0, 1
#: The read id of a refusal of everything on this connection: the nonce was wrong.
WHOLE_CONNECTION = (1 << 64) - 1
#: Spans of one request; a chunked read of a whole long prompt needs a few thousand.
MAX_SPANS = 1 << 16
MAX_REFUSAL_BYTES = 1024


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a send buffer is served; ``nonce`` is new in every process, so that a recycled port is noticed.

    ``name`` is what the server's certificate calls it, where that is not its address.
    """

    host: str
    port: int
    nonce: bytes
    num_bytes: int
    name: str = ""

    def pack(self) -> bytes:
        """As travels in a ``KvRank``."""
        name = f"/{self.name}" if self.name else ""
        return _ENDPOINT.pack(_MAGIC, self.nonce, self.num_bytes, self.port) + f"{self.host}{name}".encode()

    @classmethod
    def unpack(cls, data: bytes) -> "Endpoint":
        """Raises TransportError for what ``pack`` did not make."""
        try:
            magic, nonce, num_bytes, port = _ENDPOINT.unpack_from(data)
            if magic != _MAGIC:
                raise TransportError("tcp: the peer's endpoint is of another transport or version")
            # An address, never a name alone: looking one up could block the agent's thread.
            address, _, name = data[_ENDPOINT.size :].decode("ascii").partition("/")
            if name and not _NAME.fullmatch(name):
                raise ValueError(f"{name[:80]!r} is no host's name")
            return cls(str(ip_address(address)), port, nonce, num_bytes, name)
        except (error, ValueError) as bad:
            raise TransportError(f"tcp: the peer's endpoint is malformed: {bad}") from bad


def pack_hello(nonce: bytes) -> bytes:
    """First bytes of a connection."""
    return HELLO.pack(_MAGIC, nonce)


def pack_request(read_id: int, spans: Sequence[Span]) -> bytes:
    """A request for ``spans``."""
    return REQUEST.pack(read_id, len(spans)) + b"".join(SPAN.pack(s.remote_offset, s.num_bytes) for s in spans)


@dataclass(frozen=True, slots=True)
class Request:
    """A request as the server sees it: (offset, length) pairs."""

    read_id: int
    ranges: tuple[tuple[int, int], ...]


def take_request(data: bytearray) -> Request | None:
    """Remove one whole request from the front of ``data``; None while there is none. TransportError when absurd."""
    if len(data) < REQUEST.size:
        return None
    read_id, num_spans = REQUEST.unpack_from(data)
    if num_spans > MAX_SPANS:
        raise TransportError(f"tcp: a request of {num_spans} spans, at most {MAX_SPANS} are allowed")
    end = REQUEST.size + num_spans * SPAN.size
    if len(data) < end:
        return None
    ranges = tuple(SPAN.iter_unpack(memoryview(data)[REQUEST.size : end].tobytes()))
    del data[:end]
    return Request(read_id, ranges)


def refusal(ranges: Iterable[tuple[int, int]], num_bytes: int) -> str | None:
    """Why these ranges of a buffer of ``num_bytes`` cannot be read; None when they can."""
    for offset, length in ranges:
        if offset + length > num_bytes:
            return f"bytes {offset} to {offset + length} are outside the send buffer of {num_bytes} bytes"
    return None
