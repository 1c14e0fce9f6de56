"""Grafana dashboards: serving, the KV hand-off, and the plan's predictions beside what was measured. Pure.

Each is a few rows of panels; ``dashboard_json`` lays them out. Metric names are those of ``hexgen2.metrics``.
"""

import json
from dataclasses import dataclass

#: The data source's uid, as ``observability`` provisions it.
DATASOURCE = "prometheus"
#: Grafana's grid is 24 units wide.
_WIDTH, _HEIGHT = 24, 8


@dataclass(frozen=True, slots=True)
class Panel:
    """A graph over time. ``lines``: (PromQL expression, legend)."""

    title: str
    unit: str
    lines: tuple[tuple[str, str], ...]
    told: str = ""


@dataclass(frozen=True, slots=True)
class Dashboard:
    """Rows of panels; a row's panels share its width."""

    uid: str
    title: str
    rows: tuple[tuple[Panel, ...], ...]


def _percentiles(metric: str) -> tuple[tuple[str, str], ...]:
    return tuple(
        (f"histogram_quantile({q}, sum by (le) (rate(hexgen2:{metric}_bucket[$__rate_interval])))", f"p{q * 100:.0f}")
        for q in (0.5, 0.9, 0.99)
    )


def _rate(metric: str, by: str = "") -> str:
    grouping = f" by ({by})" if by else ""
    return f"sum{grouping} (rate(hexgen2:{metric}_total[$__rate_interval]))"


def _mean(metric: str) -> str:
    return " / ".join(f"sum (rate(hexgen2:{metric}_{part}[$__rate_interval]))" for part in ("sum", "count"))


SERVING = Dashboard(
    "hexgen2-serving",
    "HexGen-2: serving",
    (
        (
            Panel("Time to first token", "s", _percentiles("time_to_first_token_seconds")),
            Panel("Time per output token", "s", _percentiles("time_per_output_token_seconds")),
            Panel("Whole request", "s", _percentiles("e2e_request_latency_seconds")),
        ),
        (
            Panel("Requests", "reqps", ((_rate("request_success", "finished_reason"), "{{finished_reason}}"),)),
            Panel("Tokens", "none", ((_rate("prompt_tokens"), "prompt/s"), (_rate("generation_tokens"), "output/s"))),
            Panel("Gap between tokens", "s", _percentiles("inter_token_latency_seconds")),
        ),
        (
            Panel(
                "Running",
                "none",
                (("hexgen2:num_requests_running", "{{instance}}"),),
                "Requests that each process works on.",
            ),
            Panel(
                "Waiting",
                "none",
                (("hexgen2:num_requests_waiting", "{{instance}}"),),
                "For memory or for the engine. Growing without end: more arrives than is served.",
            ),
        ),
    ),
)

KV = Dashboard(
    "hexgen2-kv",
    "HexGen-2: KV hand-off",
    (
        (
            Panel("Bytes handed over", "Bps", ((_rate("kv_bytes", "transport, codec"), "{{transport}} {{codec}}"),)),
            Panel("A transfer takes", "s", _percentiles("kv_transfer_seconds")),
            Panel("Transfers by how they ended", "ops", ((_rate("kv_transfers", "state"), "{{state}}"),)),
        ),
        (
            Panel(
                "Pools in use",
                "percentunit",
                (("hexgen2:kv_pool_bytes_used / hexgen2:kv_pool_bytes_total", "{{instance}} {{pool}}"),),
                "Full pools make requests wait; a queue that is full too answers 503.",
            ),
            Panel(
                "Quarantine",
                "bytes",
                (("hexgen2:kv_quarantine_bytes", "{{instance}}"),),
                "Memory that a read may still write, of transfers that are over. Bounded, and back to zero.",
            ),
            Panel(
                "Refused and corrupt",
                "ops",
                ((_rate("kv_refused", "reason"), "{{reason}}"), (_rate("kv_digest_failures"), "digest")),
                "Nothing of these was served. A digest failure is memory or a network that alters bytes.",
            ),
        ),
        (Panel("Tokens computed again", "none", ((_rate("recomputed_tokens"), "tokens/s"),), "After pre-emption."),),
    ),
)

DASHBOARDS = (SERVING, KV)


def dashboard_json(dashboard: Dashboard) -> str:
    """A dashboard as Grafana's provisioning reads it."""
    panels: list[dict[str, object]] = []
    for number, row in enumerate(dashboard.rows):
        width = _WIDTH // len(row)
        for column, panel in enumerate(row):
            place = {"x": column * width, "y": number * _HEIGHT, "w": width, "h": _HEIGHT}
            panels.append(_panel(len(panels) + 1, panel, place))
    document = {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "tags": ["hexgen2"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "5s",
        "time": {"from": "now-30m", "to": "now"},
        "panels": panels,
    }
    return json.dumps(document, indent=2) + "\n"


def _panel(number: int, panel: Panel, place: dict[str, int]) -> dict[str, object]:
    source = {"type": "prometheus", "uid": DATASOURCE}
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.told,
        "datasource": source,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + at), "datasource": source, "expr": expression, "legendFormat": legend}
            for at, (expression, legend) in enumerate(panel.lines)
        ],
    }
