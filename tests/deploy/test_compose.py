"""The deployment files that are checked in are what the command writes, and speak of things that exist."""

import json
import re
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from prometheus_client import REGISTRY

from hexgen2 import metrics as metrics
from hexgen2.cli.deploy import default_deployment, deploy
from hexgen2.cli.main import main
from hexgen2.config_flags import flags_of
from hexgen2.deploy import observability
from hexgen2.deploy.compose import compose
from hexgen2.deploy.dashboards import DASHBOARDS, Dashboard, dashboard_json

ROOT = Path(__file__).parent.parent.parent
PROCESSES = ("coordinator", "gateway", "prefill", "decode")


def exported() -> set[str]:
    names: set[str] = set()
    for metric in REGISTRY.collect():
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(metric.type, ("",))
        names |= {metric.name + suffix for suffix in suffixes}
    return names


def used(text: str) -> set[str]:
    return set(re.findall(r"hexgen2:\w+", text))


def test_what_is_checked_in_is_what_is_written(tmp_path: Path) -> None:
    result = CliRunner().invoke(deploy, ["compose", "-o", str(tmp_path)])
    assert result.exit_code == 0, result.output
    written = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert Path("compose.yaml") in written
    for path, text in written.items():
        assert (ROOT / "deploy" / path).read_text() == text, f"run `hexgen2 deploy compose`: {path} is old"


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda each: each.uid)
def test_dashboards_show_metrics_that_exist(dashboard: Dashboard) -> None:
    text = dashboard_json(dashboard)
    assert used(text)
    assert used(text) <= exported()
    panels = json.loads(text)["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24


def test_alerts_watch_metrics_that_exist_and_are_explained() -> None:
    assert used(observability.rules()) <= exported()
    runbook = (ROOT / "docs" / "runbook.md").read_text()
    assert set(re.findall(r"^## (Hexgen\w+)$", runbook, flags=re.MULTILINE)) == set(observability.ALERTS)


def test_every_process_starts_with_flags_that_its_command_takes() -> None:
    services = compose(default_deployment(2, 1))["services"]
    started = [service["command"] for service in services.values() if (service.get("command") or [""])[0] in PROCESSES]
    assert len(started) == 5
    for name, *flags in started:
        main.commands[name].make_context(name, list(flags))


def test_no_process_has_the_certificates_of_another_role() -> None:
    services = compose(default_deployment(1, 1))["services"]
    for name, role in (("coordinator", "coordinator"), ("gateway", "gateway"), ("prefill-0", "worker")):
        mounted = [volume.split(":")[0] for volume in services[name]["volumes"] if volume.startswith("certs")]
        assert mounted == [f"certs-{role}"]
        assert services[name]["command"].count("--tls") == 1


def test_flags_say_what_differs_from_the_defaults() -> None:
    (worker, *_) = default_deployment(1, 1).workers
    flags = flags_of(worker.config)
    assert flags[:2] == ["--replica-id", "prefill-0"]
    assert "--engine" in flags
    assert "--max-num-seqs" not in flags


def test_nothing_but_the_gateway_is_published() -> None:
    services = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())["services"]
    published = {name for name, service in services.items() if "ports" in service and "profiles" not in service}
    assert published == {"gateway"}
    for service in services.values():
        for port in service.get("ports", ()):
            assert port.startswith(("127.0.0.1:", "${HEXGEN2_HTTP:-127.0.0.1:", "${HEXGEN2_GRPC:-127.0.0.1:"))
