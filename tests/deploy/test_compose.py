"""The deployment files that are checked in are what the command writes, and speak of things that exist."""

import json
import re
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from prometheus_client import REGISTRY

from hexgen2 import metrics as metrics
from hexgen2.cli.deploy import default_deployment, deploy, planned_deployment
from hexgen2.cli.main import main
from hexgen2.config_flags import flags_of
from hexgen2.deploy import observability
from hexgen2.deploy.compose import Deployment, compose
from hexgen2.deploy.dashboards import DASHBOARDS, Dashboard, dashboard_json
from hexgen2.devices import Machine
from hexgen2.errors import ConfigError
from hexgen2.placement import load_placement
from tests.placements import placement, planned_replica, stage

ROOT = Path(__file__).parent.parent.parent
PROCESSES = ("coordinator", "gateway", "prefill", "decode", "flexible")


def two_prefill(machine: str = "a100", rdma: tuple[str, ...] = ()) -> Deployment:
    """Two prefill replicas, one of two GPUs in two stages, and a decode replica."""
    plan = placement(
        planned_replica("p0", "prefill", stage("L40S", 1, 0, 30), stage("A100-SXM", 1, 30, 10)),
        planned_replica("p1", "prefill", stage("L40S")),
        planned_replica("d0", "decode", stage("A100-SXM", machine=machine), batch=24),
        routes=(("p0", "d0", 1.0), ("p1", "d0", 1.0)),
    ).model_copy(update={"rdma": rdma})
    gpus = ("NVIDIA A100-SXM4-80GB", "NVIDIA L40S", "NVIDIA A100-SXM4-80GB", "NVIDIA L40S")
    return planned_deployment(plan, Path("plan.yaml"), Machine(gpus, 8), "M", "two")


def exported() -> set[str]:
    names: set[str] = set()
    for metric in REGISTRY.collect():
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(metric.type, ("",))
        names |= {metric.name + suffix for suffix in suffixes}
    return names


def used(text: str) -> set[str]:
    return set(re.findall(r"hexgen2:\w+", text))


#: The machine of the example with two GPUs.
WORKSTATION = ("--gpu", "NVIDIA GeForce RTX 4090", "--gpu", "NVIDIA GeForce RTX 3090", "--cores", "16")


def test_what_is_checked_in_is_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for words in ((), ("deploy/plan.gpu.yaml", *WORKSTATION, "--name", "gpu")):
        result = CliRunner().invoke(deploy, ["compose", *words, "-o", str(tmp_path)])
        assert result.exit_code == 0, result.output
    written = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert {Path("compose.yaml"), Path("compose.gpu.yaml"), Path("plan.gpu.yaml")} <= set(written)
    for path, text in written.items():
        assert (ROOT / "deploy" / path).read_text() == text, f"run `hexgen2 deploy compose`: {path} is old"


def test_the_plan_that_is_checked_in_is_what_is_planned(tmp_path: Path) -> None:
    words = ("workstation", "--model", "llama-3.1-8b", "--workload", "HPHD", "--kind", "disaggregated")
    made = tmp_path / "plan.yaml"
    result = CliRunner().invoke(main, ["plan", *words, "-o", str(made)])
    assert result.exit_code == 0, result.output
    ours, theirs = (load_placement(path) for path in (made, ROOT / "deploy" / "plan.gpu.yaml"))
    again = f"run `hexgen2 plan {' '.join(words)} -o deploy/plan.gpu.yaml`, and `hexgen2 deploy compose`"
    assert ours.throughput_rps == pytest.approx(theirs.throughput_rps, rel=1e-3), again
    assert [each.engine for each in ours.replicas] == [each.engine for each in theirs.replicas], again


def test_images_have_every_file_of_the_package() -> None:
    """What is not Python comes by MANIFEST.in, which whoever builds the package must see."""
    kinds = {
        path.suffix for path in (ROOT / "hexgen2").rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }
    told = set(re.findall(r"\*(\.\w+)", (ROOT / "MANIFEST.in").read_text()))
    assert kinds - {".py", ".pyi"} <= told
    assert "!MANIFEST.in" in (ROOT / ".dockerignore").read_text().splitlines()
    for stage_of_image in (ROOT / "deploy" / "Dockerfile").read_text().split("\nFROM "):
        if "make image" in stage_of_image:
            assert re.search(r"^COPY .*\bMANIFEST\.in\b", stage_of_image, re.MULTILINE)


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


@pytest.mark.parametrize("deployment", [default_deployment(2, 1), two_prefill()], ids=["default", "planned"])
def test_every_process_starts_with_flags_that_its_command_takes(deployment: Deployment) -> None:
    services = compose(deployment)["services"]
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
    assert services["admin"]["volumes"] == ["certs-admin:/var/lib/hexgen2/tls:ro"]
    assert services["admin"]["profiles"] == ["admin"]


def test_flags_say_what_differs_from_the_defaults() -> None:
    (worker, *_) = default_deployment(1, 1).workers
    flags = flags_of(worker.config)
    assert flags[:2] == ["--replica-id", "prefill-0"]
    assert "--engine" in flags
    assert "--max-num-seqs" not in flags


def test_nothing_but_the_gateway_and_the_page_is_published() -> None:
    services = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())["services"]
    published = {name for name, service in services.items() if "ports" in service and "profiles" not in service}
    assert published == {"gateway", "coordinator"}
    assert services["coordinator"]["ports"] == ["${HEXGEN2_PAGE:-127.0.0.1:8001}:8001"]
    for service in services.values():
        for port in service.get("ports", ()):
            assert re.match(r"127\.0\.0\.1:|\$\{HEXGEN2_(HTTP|GRPC|PAGE):-127\.0\.0\.1:", port)


def test_each_replica_of_a_plan_has_its_gpus_and_sees_those_of_its_peers() -> None:
    services = compose(two_prefill())["services"]

    def devices(name: str) -> tuple[list[str], str]:
        (device,) = services[name]["deploy"]["resources"]["reservations"]["devices"]
        return device["device_ids"], services[name]["environment"]["CUDA_VISIBLE_DEVICES"]

    # GPU 1 is the first L40S, GPU 0 the first A100; p1 does not hand over to p0 and has no need of GPU 0.
    assert devices("p0") == (["0", "1", "2"], "1,0")
    assert devices("p1") == (["2", "3"], "1")
    assert devices("d0") == (["0", "1", "2", "3"], "2")
    assert services["p0"]["environment"]["VLLM_PP_LAYER_PARTITION"] == "30,10"
    assert "--pipeline-parallel-size" in services["p0"]["command"]
    assert services["d0"]["command"][services["d0"]["command"].index("--max-num-seqs") + 1] == "24"
    for name in ("p0", "p1", "d0"):
        assert services[name]["pid"] == services[name]["ipc"] == "service:namespaces"
        assert "devices" not in services[name]
    (plan,) = (volume for volume in services["coordinator"]["volumes"] if isinstance(volume, dict))
    assert (plan["source"], plan["target"]) == ("./plan.two.yaml", "/etc/hexgen2/plan.yaml")
    assert "model" not in services


def test_where_rdma_was_planned_workers_may_pin_memory_and_have_its_devices() -> None:
    worker = compose(two_prefill(rdma=("a100",)))["services"]["p0"]
    assert worker["devices"] == ["/dev/infiniband:/dev/infiniband"]
    assert worker["ulimits"] == {"memlock": -1}
    assert worker["cap_add"] == ["IPC_LOCK"]


def test_a_plan_of_several_machines_is_no_compose_file() -> None:
    with pytest.raises(
        ConfigError, match="replicas are on a100, other; a compose file is for one: `hexgen2 deploy bare"
    ):
        two_prefill("other")


def test_a_plan_says_which_workers_there_are(tmp_path: Path) -> None:
    for words in (["--gpu", "L40S"], [str(ROOT / "deploy" / "plan.gpu.yaml"), "--prefill", "2"]):
        result = CliRunner().invoke(deploy, ["compose", *words, "-o", str(tmp_path)])
        assert result.exit_code == 2, result.output
    assert not list(tmp_path.iterdir())
