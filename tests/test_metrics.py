"""Metrics: names that a vLLM dashboard finds with our prefix, and the server that tells them."""

import socket
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client import REGISTRY, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from hexgen2 import metrics
from hexgen2.errors import ConfigError
from hexgen2.kv.receiving import RecvState


def fetch(address: str) -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://{address}/metrics", timeout=10) as response:
        return str(response.read().decode())


@pytest.fixture
def server() -> Iterator[metrics.MetricsServer]:
    server = metrics.serve_metrics("127.0.0.1:0")
    yield server
    server.close()


def test_metrics_are_served_where_the_server_says(server: metrics.MetricsServer) -> None:
    metrics.PROMPT_TOKENS.inc(5)
    host, _, port = server.address.rpartition(":")
    assert host == "127.0.0.1"
    assert int(port) > 0
    families = {family.name for family in text_string_to_metric_families(fetch(server.address))}
    assert {
        "hexgen2:time_to_first_token_seconds",
        "hexgen2:time_per_output_token_seconds",
        "hexgen2:inter_token_latency_seconds",
        "hexgen2:e2e_request_latency_seconds",
        "hexgen2:prompt_tokens",
        "hexgen2:generation_tokens",
        "hexgen2:num_requests_running",
        "hexgen2:num_requests_waiting",
        "hexgen2:kv_transfers",
        "hexgen2:kv_bytes",
        "hexgen2:kv_route_bytes",
        "hexgen2:kv_route_bytes_per_second",
        "hexgen2:kv_transfer_seconds",
        "hexgen2:kv_quarantine_bytes",
        "hexgen2:recomputed_tokens",
    } <= families


def test_a_closed_server_frees_its_port(server: metrics.MetricsServer) -> None:
    server.close()
    again = metrics.serve_metrics(server.address)
    again.close()
    server.close()


def test_a_port_in_use_is_said_in_one_line(server: metrics.MetricsServer) -> None:
    with pytest.raises(ConfigError) as caught:
        metrics.serve_metrics(server.address)
    assert str(caught.value) == (
        f"{server.address} is in use: stop the process that listens there, or choose another port"
    )


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^metrics_listen: cannot listen on 192\.0\.2\.1:9: "):
        metrics.serve_metrics("192.0.2.1:9")


def test_an_empty_address_serves_none() -> None:
    with metrics.metrics_served("") as address:
        assert address == ""
    with metrics.metrics_served("127.0.0.1:0") as address:
        assert "hexgen2:" in fetch(address)
    with pytest.raises(OSError, match="refused"), socket.create_connection(address.split(":"), timeout=5):  # type: ignore[arg-type]
        pass


def test_every_metric_has_a_sentence_of_help() -> None:
    families = list(text_string_to_metric_families(generate_latest(REGISTRY).decode()))
    ours = [family for family in families if family.name.startswith("hexgen2:")]
    assert len(ours) >= 19
    assert all(family.documentation.endswith(".") for family in ours)


def test_open_transfers_are_told_by_the_state_they_are_in_when_somebody_looks() -> None:
    class Transfer:
        state = RecvState.QUEUED

    def told() -> dict[str, float]:
        [family] = metrics.KV_TRANSFERS_OPEN.collect()
        return {sample.labels["state"]: sample.value for sample in family.samples}

    first, second = Transfer(), Transfer()
    for each in (first, second):
        metrics.KV_TRANSFERS_OPEN.add("recv", each)
    assert told() == {"recv_queued": 2}
    second.state = RecvState.LOADED
    assert told() == {"recv_queued": 1, "recv_loaded": 1}
    for each in (first, second, second):
        metrics.KV_TRANSFERS_OPEN.remove(each)
    assert told() == {}
