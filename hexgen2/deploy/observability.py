"""Configuration of what watches a fleet: Prometheus with alerts, the OpenTelemetry Collector, Grafana. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from hexgen2.deploy.dashboards import DASHBOARDS, DATASOURCE, dashboard_json

#: Each alert: expression, how long it must hold, what it means. docs/operations.md says what to do.
ALERTS: Mapping[str, tuple[str, str, str]] = {
    "HexgenTargetDown": (
        'up{job="hexgen2"} == 0',
        "30s",
        "{{ $labels.instance }} does not answer: its requests go to others, if there are any.",
    ),
    "HexgenSlowFirstToken": (
        "histogram_quantile(0.99, sum by (le) (rate(hexgen2:time_to_first_token_seconds_bucket[5m]))) > 10",
        "5m",
        "One request in a hundred waits more than 10 s for its first token.",
    ),
    "HexgenQueueGrows": (
        "sum(hexgen2:num_requests_waiting) > 0 and deriv(sum(hexgen2:num_requests_waiting)[5m:15s]) > 0",
        "10m",
        "More arrives than is served: requests have been waiting longer and longer for ten minutes.",
    ),
    "HexgenKvPoolFull": (
        "hexgen2:kv_pool_bytes_used / hexgen2:kv_pool_bytes_total > 0.95",
        "2m",
        "The {{ $labels.pool }} pool of {{ $labels.instance }} is full: requests wait for KV memory.",
    ),
    "HexgenKvCorrupt": (
        "increase(hexgen2:kv_digest_failures_total[10m]) > 0",
        "0m",
        "KV that {{ $labels.instance }} received was not what was sent. It was not served.",
    ),
    "HexgenKvQuarantine": (
        "hexgen2:kv_quarantine_bytes > 0",
        "5m",
        "{{ $labels.instance }} keeps memory apart because a read of it has not ended.",
    ),
}


def prometheus(targets: Sequence[str]) -> str:
    """prometheus.yaml; ``targets`` are host:port of each process's metrics."""
    return _yaml(
        {
            "global": {"scrape_interval": "5s", "evaluation_interval": "15s"},
            "rule_files": ["rules.yaml"],
            "scrape_configs": [{"job_name": "hexgen2", "static_configs": [{"targets": list(targets)}]}],
        }
    )


def rules() -> str:
    """rules.yaml: the alerts."""
    return _yaml(
        {
            "groups": [
                {
                    "name": "hexgen2",
                    "rules": [
                        {"alert": name, "expr": expression, "for": held, "annotations": {"summary": meaning}}
                        for name, (expression, held, meaning) in ALERTS.items()
                    ],
                }
            ]
        }
    )


def collector() -> str:
    """otel-collector.yaml: spans come in by OTLP and go on to Jaeger."""
    return _yaml(
        {
            "receivers": {
                "otlp": {
                    "protocols": {"grpc": {"endpoint": "0.0.0.0:4317"}, "http": {"endpoint": "0.0.0.0:4318"}},
                }
            },
            "processors": {
                "memory_limiter": {"check_interval": "1s", "limit_mib": 256},
                "batch": {"timeout": "1s"},
            },
            "exporters": {"otlp/jaeger": {"endpoint": "jaeger:4317", "tls": {"insecure": True}}},
            "service": {
                "pipelines": {
                    "traces": {
                        "receivers": ["otlp"],
                        "processors": ["memory_limiter", "batch"],
                        "exporters": ["otlp/jaeger"],
                    }
                }
            },
        }
    )


def files(targets: Sequence[str]) -> dict[str, str]:
    """Every file by its path in the folder ``observability``."""
    datasources = {
        "apiVersion": 1,
        "datasources": [
            {
                "name": "Prometheus",
                "uid": DATASOURCE,
                "type": "prometheus",
                "access": "proxy",
                "url": "http://prometheus:9090",
                "isDefault": True,
            },
            {"name": "Jaeger", "uid": "jaeger", "type": "jaeger", "access": "proxy", "url": "http://jaeger:16686"},
        ],
    }
    providers = {
        "apiVersion": 1,
        "providers": [
            {"name": "hexgen2", "type": "file", "options": {"path": "/etc/grafana/provisioning/dashboards"}},
        ],
    }
    return {
        "prometheus.yaml": prometheus(targets),
        "rules.yaml": rules(),
        "otel-collector.yaml": collector(),
        "grafana/datasources/datasources.yaml": _yaml(datasources),
        "grafana/dashboards/dashboards.yaml": _yaml(providers),
        **{f"grafana/dashboards/{each.uid}.json": dashboard_json(each) for each in DASHBOARDS},
    }


def _yaml(document: Mapping[str, Any]) -> str:
    return yaml.safe_dump(document, sort_keys=False, width=120)
