"""Prometheus metrics: every name, its labels and its buckets. Names and buckets mirror vLLM's.

prometheus_client adds ``_total`` to the names of counters.
"""

import errno
import threading
from collections import Counter as Counts
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Protocol
from wsgiref.simple_server import WSGIServer

from prometheus_client import REGISTRY, Counter, Gauge, Histogram, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from hexgen2.address import format_address, parse_address, port_in_use
from hexgen2.calibration import Calibration
from hexgen2.errors import ConfigError

_TTFT_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0),
    *(2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_TOKEN_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0),
    *(2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_E2E_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)

TIME_TO_FIRST_TOKEN_SECONDS = Histogram(
    "hexgen2:time_to_first_token_seconds", "From the request to its first token.", buckets=_TTFT_BUCKETS
)
TIME_PER_OUTPUT_TOKEN_SECONDS = Histogram(
    "hexgen2:time_per_output_token_seconds",
    "Mean time per output token after the first, of one request.",
    buckets=_TOKEN_BUCKETS,
)
INTER_TOKEN_LATENCY_SECONDS = Histogram(
    "hexgen2:inter_token_latency_seconds", "Gap between two tokens of a request.", buckets=_TOKEN_BUCKETS
)
E2E_REQUEST_LATENCY_SECONDS = Histogram(
    "hexgen2:e2e_request_latency_seconds", "From the request to its last token.", buckets=_E2E_BUCKETS
)
PROMPT_TOKENS = Counter("hexgen2:prompt_tokens", "Prompt tokens read.")
GENERATION_TOKENS = Counter("hexgen2:generation_tokens", "Output tokens sampled.")
REQUEST_SUCCESS = Counter("hexgen2:request_success", "Requests that ended well.", ["finished_reason"])
REQUEST_CONTINUATIONS = Counter(
    "hexgen2:request_continuations", "Answers that broke off and were continued on another replica."
)
NUM_REQUESTS_RUNNING = Gauge("hexgen2:num_requests_running", "Requests that the engine is working on.")
MAX_NUM_SEQS = Gauge("hexgen2:max_num_seqs", "Requests that the engine may work on at once, as adapted.")
MAX_NUM_BATCHED_TOKENS = Gauge("hexgen2:max_num_batched_tokens", "Tokens of one step of the engine, as adapted.")
NUM_REQUESTS_WAITING = Gauge("hexgen2:num_requests_waiting", "Requests that wait for memory or the engine.")

KV_TRANSFERS = Counter("hexgen2:kv_transfers", "KV hand-offs by how they ended.", ["state"])
KV_BYTES = Counter("hexgen2:kv_bytes", "KV bytes handed over.", ["transport", "codec", "direction"])
KV_ROUTE_BYTES = Counter(
    "hexgen2:kv_route_bytes",
    "KV bytes received, by the transport and address (or device) of ours they came over.",
    ["route"],
)
KV_ROUTE_BYTES_PER_SECOND = Gauge(
    "hexgen2:kv_route_bytes_per_second", "Of the last hand-off, by route; waiting for prefill included.", ["route"]
)
KV_TRANSFER_SECONDS = Histogram(
    "hexgen2:kv_transfer_seconds", "From FetchKv's first message to the last verified byte.", buckets=_TTFT_BUCKETS
)
KV_BANDWIDTH = Histogram(
    "hexgen2:kv_bandwidth_bytes_per_second",
    "Bytes of a KV hand-off over the time from FetchKv's first message to the last verified byte.",
    buckets=tuple(10.0**power * step for power in range(5, 11) for step in (1.0, 2.5, 5.0)),
)
KV_REFETCHES = Counter("hexgen2:kv_refetches", "FetchKv calls that were made again after their connection broke.")
KV_DIGEST_FAILURES = Counter("hexgen2:kv_digest_failures", "KV pieces that did not match their digest.")
KV_REFUSED = Counter("hexgen2:kv_refused", "KV hand-offs that were refused.", ["reason"])
KV_POOL_BYTES_USED = Gauge("hexgen2:kv_pool_bytes_used", "Bytes in use of a KV pool.", ["pool"])
KV_POOL_BYTES_TOTAL = Gauge("hexgen2:kv_pool_bytes_total", "Bytes of a KV pool.", ["pool"])
KV_QUARANTINE_BYTES = Gauge(
    "hexgen2:kv_quarantine_bytes", "Landing memory that is kept apart because its read did not end."
)
RECOMPUTED_TOKENS = Counter("hexgen2:recomputed_tokens", "Tokens computed again after the engine pre-empted a request.")
KV_TRANSPORT_INFO = Gauge("hexgen2:kv_transport_info", "1 for the transport in use.", ["transport", "detail"])

FORECAST_RPS = Gauge(
    "hexgen2:forecast_requests_per_second", "Arrivals that are expected, by forecaster.", ["forecaster"]
)
FORECAST_ERROR = Gauge(
    "hexgen2:forecast_error", "Mean error of the last forecasts, as a share of the rate.", ["forecaster"]
)
PLAN_CHANGES = Counter("hexgen2:plan_changes", "What became of the plan: re-planned, rolled back, ...", ["what"])

TLS_CERTIFICATE_NOT_AFTER = Gauge(
    "hexgen2:tls_certificate_not_after_seconds", "When this process's certificate expires; seconds since 1970."
)
TLS_HANDSHAKES_BEGUN = Counter(
    "hexgen2:tls_handshakes_begun",
    "TLS handshakes begun with this process: grpc, https, nodes; gRPC does not tell how they ended.",
    ["plane"],
)
TLS_HANDSHAKES_FAILED = Counter(
    "hexgen2:tls_handshakes_failed",
    "TLS handshakes with this process that came to nothing: kv, https, nodes.",
    ["plane"],
)
CALLS_REFUSED = Counter("hexgen2:calls_refused", "Calls refused for what their certificate says.", ["method"])
HTTP_CONNECTIONS_CLOSED = Counter(
    "hexgen2:http_connections_closed",
    "HTTP connections closed because they brought no request, or took no answer.",
    ["reason"],
)
REQUESTS_FAILED = Counter(
    "hexgen2:requests_failed", "Requests that ended with an error, refused ones included, by its kind.", ["error"]
)
API_REQUESTS = Counter(
    "hexgen2:api_requests", "Requests by the name of their API key and how it was taken.", ["key", "outcome"]
)


class OpenTransfers(Collector):
    """``hexgen2:kv_transfers_open``: hand-offs under way, by the state they are in when somebody looks."""

    def __init__(self) -> None:
        self._open: dict[int, tuple[str, Stateful]] = {}

    def add(self, side: str, transfer: "Stateful") -> None:
        """A transfer of ``side`` (send or recv) begins."""
        self._open[id(transfer)] = side, transfer

    def remove(self, transfer: "Stateful") -> None:
        """It is over. Idempotent."""
        self._open.pop(id(transfer), None)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Called by whoever serves the metrics, from a thread of its own."""
        family = GaugeMetricFamily("hexgen2:kv_transfers_open", "KV hand-offs under way.", labels=["state"])
        for state, num in Counts(f"{side}_{transfer.state}" for side, transfer in tuple(self._open.values())).items():
            family.add_metric([state], num)
        yield family


class Stateful(Protocol):
    """What is counted of a transfer."""

    @property
    def state(self) -> StrEnum:
        """Where it is."""


KV_TRANSFERS_OPEN = OpenTransfers()
REGISTRY.register(KV_TRANSFERS_OPEN)


PLAN_ERROR_RATIO = Gauge(
    "hexgen2:plan_error_ratio", "Measured over planned time, by replica and term.", ["replica", "term"]
)
PLAN_OFF = Gauge("hexgen2:plan_off", "1 when a term of the plan is off by more than the limit.")


def tell_calibration(calibration: Calibration) -> None:
    """Publish the error of the plan in force, and of no other."""
    PLAN_ERROR_RATIO.clear()
    for each in calibration.ratios:
        PLAN_ERROR_RATIO.labels(each.replica_id, each.term).set(each.ratio)
    PLAN_OFF.set(calibration.off)


class MetricsServer:
    """``/metrics`` of this process. ``address`` is host:port as bound."""

    def __init__(self, address: str, server: WSGIServer, thread: threading.Thread) -> None:
        self.address = address
        self._server = server
        self._thread = thread

    def close(self) -> None:
        """Stop listening. Idempotent."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def serve_metrics(listen: str) -> MetricsServer:
    """Serve this process's metrics on ``listen`` (host:port, port 0 for any) from a thread of its own.

    Raises:
        ConfigError: the address cannot be bound; one line with the remedy.
    """
    host, port = parse_address(listen, what="metrics_listen")
    try:
        server, thread = start_http_server(port, host)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise port_in_use(listen) from None
        raise ConfigError(f"metrics_listen: cannot listen on {listen}: {error.strerror}") from None
    return MetricsServer(format_address(host, server.server_port), server, thread)


@contextmanager
def metrics_served(listen: str) -> Iterator[str]:
    """``serve_metrics`` for the length of a block; an empty ``listen`` serves none. Yields the address, or ""."""
    if not listen:
        yield ""
        return
    server = serve_metrics(listen)
    try:
        yield server.address
    finally:
        server.close()
