"""What both ends of a KV connection do to their sockets."""

import socket
from collections import deque

#: Bytes that one connection may move before the others get their turn.
TURN_BYTES = 4 << 20
#: Buffers given to one system call; the kernel takes at most 1024.
MAX_VIEWS = 64
# A peer whose host or link is gone is noticed after about this long; a stopped process is not, nor should it be.
_SILENCE_S = 15


def tune(sock: socket.socket) -> None:
    """No delay for small requests; an error when the other host falls silent."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        ("TCP_KEEPIDLE", _SILENCE_S // 3),
        ("TCP_KEEPINTVL", _SILENCE_S // 3),
        ("TCP_KEEPCNT", 2),
        ("TCP_USER_TIMEOUT", _SILENCE_S * 1000),
    ):
        if hasattr(socket, option):  # Linux has all of them
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def advance(views: deque[memoryview], num_bytes: int) -> None:
    """Drop the first ``num_bytes`` of the views, and views that are empty."""
    while views and num_bytes >= len(views[0]):
        num_bytes -= len(views.popleft())
    if num_bytes:
        views[0] = views[0][num_bytes:]
