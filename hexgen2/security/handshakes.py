"""TLS handshakes with asyncio's servers, counted: asyncio itself tells of those that failed in debug mode alone."""

import asyncio
import ssl

from hexgen2 import metrics


def counted(context: ssl.SSLContext, plane: str, timeout_s: float) -> ssl.SSLContext:
    """The same context, whose handshakes count as ``plane``'s.

    One that OpenSSL refuses, or that the other side ends with a reason, counts as failed at once; one that the other
    side just leaves, of which nobody is told, when its ``timeout_s`` are over.
    """
    begun, failed = metrics.TLS_HANDSHAKES_BEGUN.labels(plane), metrics.TLS_HANDSHAKES_FAILED.labels(plane)

    class Connection(ssl.SSLObject):
        # Knows nothing of the connection, which need not outlive its end.
        left: asyncio.TimerHandle | None = None

        def do_handshake(self) -> None:
            if self.left is None:
                begun.inc()
                self.left = asyncio.get_running_loop().call_later(timeout_s, failed.inc)
            try:
                super().do_handshake()
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                raise
            except ssl.SSLError:
                failed.inc()
                self.left.cancel()
                raise
            self.left.cancel()

    context.sslobject_class = Connection
    return context
