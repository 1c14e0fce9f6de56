"""Channels to peers, the trace context that goes with a call, and what a failed call means."""

import grpc
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from hexgen2 import errors
from hexgen2.errors import HexgenError
from hexgen2.rpc.tls import TlsChannel
from hexgen2.security.tls import TlsFiles

MAX_MESSAGE_BYTES = 64 << 20

#: Trailing metadata that lets ``to_error`` rebuild the very error that the peer raised.
ERROR_KEY = "hexgen2-error"
RETRY_AFTER_KEY = "retry-after-s"

_OPTIONS: tuple[tuple[str, int], ...] = (
    # A silent peer (stopped, unplugged) is found in 30 s, as long as a call is open. Less than gRPC's own 20 s for an
    # answer takes peers that are only starved of CPU for dead ones (seen at 5 s on two cores with six busy processes).
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # Without it the keepalive's own timeout is not used, and a minute passes.
    ("grpc.http2.ping_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.http2.max_pings_without_data", 0),
    # A peer that restarts is found again within two seconds.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # Despite its name: how long one attempt to connect may take.
    ("grpc.min_reconnect_backoff_ms", 5_000),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Peers are on the cluster's own network, whatever http_proxy says.
    ("grpc.enable_http_proxy", 0),
)

_PROPAGATOR = TraceContextTextMapPropagator()


def channel(address: str, tls: TlsFiles | None = None) -> grpc.aio.Channel:
    """A channel to ``host:port``; the caller closes it. Connects at the first call and again by itself.

    With ``tls`` the server must show a certificate for that host, and ours is shown.
    """
    if tls is not None:
        return TlsChannel(address, tls, _OPTIONS)
    return grpc.aio.insecure_channel(address, options=_OPTIONS)


def trace_metadata() -> tuple[tuple[str, str], ...]:
    """Call metadata with the W3C context of the current span; empty when there is none."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier)
    return tuple(carrier.items())


def traceparent() -> str:
    """The W3C ``traceparent`` of the current span; empty when there is none."""
    return dict(trace_metadata()).get("traceparent", "")


_BY_STATUS: dict[str, type[HexgenError]] = {
    "NOT_FOUND": errors.TransferNotFound,
    "FAILED_PRECONDITION": errors.TransferRefused,
    "DATA_LOSS": errors.KvCorrupt,
    "UNAVAILABLE": errors.Unavailable,
    # Our own cancellation is CancelledError; this is the peer giving the call up.
    "CANCELLED": errors.Unavailable,
    "ABORTED": errors.StaleEpoch,
    "DEADLINE_EXCEEDED": errors.DeadlineExceeded,
    "UNAUTHENTICATED": errors.Unauthenticated,
    "PERMISSION_DENIED": errors.PermissionDenied,
}


def to_error(error: grpc.aio.AioRpcError) -> HexgenError:
    """The error that the peer raised, by its name where the peer is one of ours, else by the call's status."""
    trailing = {key: value for key, value in error.trailing_metadata() or ()}
    status, message = error.code().name, error.details() or error.code().name
    if status == "INVALID_ARGUMENT":
        field, colon, rest = message.partition(": ")
        return errors.InvalidRequest(field, rest) if colon else errors.InvalidRequest("request", message)
    if status == "RESOURCE_EXHAUSTED":
        return errors.Overloaded(message, _seconds(trailing.get(RETRY_AFTER_KEY)))
    named = getattr(errors, str(trailing.get(ERROR_KEY, "")), None)
    if isinstance(named, type) and issubclass(named, HexgenError) and named.status == status:
        return named(message)
    return _BY_STATUS.get(status, HexgenError)(message)


def _seconds(value: str | bytes | None) -> float:
    try:
        return max(0.0, float(value)) if value is not None else 1.0
    except ValueError:
        return 1.0
