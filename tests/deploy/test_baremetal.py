"""A plan and an inventory become units, configuration, certificates and playbooks that fit together."""

import re
import shutil
import stat
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from hexgen2.cli.deploy import deploy
from hexgen2.cli.main import main
from hexgen2.cli.options import merge
from hexgen2.config import (
    Config,
    CoordinatorConfig,
    GatewayConfig,
    NodeConfig,
    TlsConfig,
    VllmEngineConfig,
    WorkerConfig,
)
from hexgen2.deploy.baremetal import Process, processes, ucx_environment
from hexgen2.deploy.hosts_file import hosts_file
from hexgen2.deploy.systemd import unit
from hexgen2.errors import ConfigError, HexgenError
from hexgen2.inventory import Host, Inventory, load_inventory
from hexgen2.placement import Placement, StagePlan
from hexgen2.security import certs
from hexgen2.security.callers import Caller
from tests.placements import placement, planned_replica, stage, write

ROOT = Path(__file__).parent.parent.parent
PLAYBOOKS = ROOT / "hexgen2" / "deploy" / "ansible"
COMMANDS: Mapping[str, type[Config]] = {
    "coordinator": CoordinatorConfig,
    "gateway": GatewayConfig,
    "flexible": WorkerConfig,
}

INVENTORY = """\
hosts:
  - {name: a, address: 10.0.0.1, gpus: [NVIDIA L40S, NVIDIA L40S]}
  - name: b
    address: 10.0.0.2
    kv_host: 10.1.0.2
    gpus: [NVIDIA A100-SXM4-80GB, NVIDIA L40S, NVIDIA A100-SXM4-80GB]
    environment: {NOTE: 50% of "b"}
  - {name: c, address: 10.0.0.3, cores: 4, ssh_user: ops, ssh_host: c.example.org}
coordinator: a
gateways: [a, c]
model: /srv/models/M
packages: ["hexgen2[vllm]==0.1.0", "wheels/more-1.0-py3-none-any.whl[cpu]"]
api_keys: keys
"""


def plan(rdma: tuple[str, ...] = ()) -> Placement:
    return placement(
        planned_replica("p0", "prefill", stage("L40S", machine="a")),
        planned_replica("p1", "prefill", stage("L40S", machine="b")),
        planned_replica("d0", "decode", stage("A100-SXM", 2, machine="b"), batch=24),
        planned_replica("d1", "decode", stage("cpu-0.5", machine="c")),
        routes=(("p0", "d0", 1.0), ("p1", "d0", 1.0), ("p0", "d1", 0.1)),
    ).model_copy(update={"rdma": rdma})


def files(folder: Path, text: str = INVENTORY) -> tuple[Path, Path]:
    (folder / "wheels").mkdir(parents=True, exist_ok=True)
    (folder / "wheels" / "more-1.0-py3-none-any.whl").write_bytes(b"a wheel")
    (folder / "keys").write_text("a key's hash\n")
    (folder / "inventory.yaml").write_text(text)
    return write(folder, plan()), folder / "inventory.yaml"


def deployed(folder: Path, text: str = INVENTORY) -> Path:
    planned, inventory = files(folder, text)
    words = ["baremetal", str(planned), "--inventory", str(inventory), "-o", str(folder / "rack")]
    result = CliRunner().invoke(deploy, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return folder / "rack"


def inventory_of(folder: Path, text: str = INVENTORY) -> Inventory:
    return load_inventory(files(folder, text)[1])


def found(folder: Path) -> dict[str, list[Process]]:
    return processes(inventory_of(folder), plan(), "inventory.yaml")


def test_every_host_has_its_part_of_the_plan(tmp_path: Path) -> None:
    hosts = found(tmp_path)
    assert {host: [each.name for each in running] for host, running in hosts.items()} == {
        "a": ["coordinator", "worker-p0", "gateway"],
        "b": ["worker-p1", "worker-d0"],
        "c": ["worker-d1", "gateway"],
    }
    d0 = hosts["b"][1]
    assert isinstance(d0.config, WorkerConfig)
    assert d0.config.listen == "10.0.0.2:50062"
    assert d0.config.coordinator == "10.0.0.1:50052"
    assert d0.config.kv.host == "10.1.0.2"
    # Both A100s, around the L40S.
    assert d0.environment["CUDA_VISIBLE_DEVICES"] == "0,2"
    assert hosts["b"][0].environment["CUDA_VISIBLE_DEVICES"] == "1"
    assert hosts["c"][0].cores == 0.5
    listens = [each.listen for running in hosts.values() for each in running]
    assert len(set(listens)) == len(listens)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("name: c,", "name: a,", r":1: hosts: hosts\.2\.name: `a` is hosts\.0's, too"),
        ("address: 10.0.0.3", "address: 10.0.0.1", r":1: hosts: hosts\.2\.address: `10\.0\.0\.1` is hosts\.0's, too"),
        ("address: 10.0.0.2", "address: 10.0.0.2; reboot", r":4: hosts\.1\.address: .* is no host name nor address"),
        ("name: b", "name: ../b", r":3: hosts\.1\.name: '\.\./b' is not 1 to 63 letters"),
        ("coordinator: a", "coordinator: z", r":9: coordinator: no host `z`; there are: a, b, c"),
        ("[a, c]", "[a, a]", r":10: gateways: a host is named twice"),
        ("cores: 4", "core: 4", r":8: hosts\.2\.core: no such field; did you mean `cores`\?"),
        ("{NOTE:", "{A B:", r":7: hosts\.1\.environment: 'A B' cannot be set"),
    ],
)
def test_what_is_wrong_with_an_inventory_is_told_with_file_line_and_field(
    tmp_path: Path, old: str, new: str, problem: str
) -> None:
    assert old in INVENTORY
    with pytest.raises(ConfigError, match=r"inventory\.yaml" + problem):
        inventory_of(tmp_path, INVENTORY.replace(old, new, 1))


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("name: b", "name: e", r"the plan has machine `b`, and there is no host of that name; there are: a, e, c"),
        (
            "[NVIDIA L40S, NVIDIA L40S]",
            "[NVIDIA L40]",
            r"hosts\.0: the plan's part of a: it takes 1 L40S, and 1 NVIDIA",
        ),
        ("cores: 4", "ucx_tls: tcp, gpus: [NVIDIA L40S]", None),
    ],
)
def test_a_plan_for_other_hosts_is_refused(tmp_path: Path, old: str, new: str, problem: str | None) -> None:
    inventory = inventory_of(tmp_path, INVENTORY.replace(old, new, 1))
    if problem is None:
        assert processes(inventory, plan(), "inventory.yaml")
        return
    with pytest.raises(ConfigError, match=r"inventory\.yaml: (.*\n)*.*" + problem):
        processes(inventory, plan(), "inventory.yaml")


def split(*stages: StagePlan) -> Placement:
    return placement(
        planned_replica("big", "colocated", *stages), planned_replica("p", "prefill", stage("L40S", machine="b"))
    )


def test_a_replica_larger_than_a_machine_has_a_worker_on_the_first_and_nodes_on_the_others(tmp_path: Path) -> None:
    text = INVENTORY.replace("cores: 4", "gpus: [NVIDIA A100-SXM4-80GB, NVIDIA A100-SXM4-80GB]")
    big = split(stage("A100-SXM", 2, 0, 30, machine="b"), stage("A100-SXM", 2, 30, 10, machine="c"))
    inventory = inventory_of(tmp_path, text)
    hosts = processes(inventory, big, "inventory.yaml")
    worker, other = hosts["b"][0], hosts["c"][0]
    assert [worker.name, other.name] == ["worker-big", "node-big"]
    assert isinstance(worker.config, WorkerConfig)
    assert isinstance(other.config, NodeConfig)
    first, second = worker.config.engine, other.config.engine
    assert isinstance(first, VllmEngineConfig)
    assert (first.nnodes, first.node_rank, first.master_addr, first.master_port) == (2, 0, "10.0.0.2", 29500)
    assert second == first.model_copy(update={"node_rank": 1})
    assert (first.tensor_parallel_size, first.pipeline_parallel_size) == (2, 2)
    assert other.config.leader == worker.config.nodes_listen == "10.0.0.2:29501"
    assert other.config.kv.host == "10.0.0.3"
    for process, gpus in ((worker, "0,2"), (other, "0,1")):
        assert process.environment["VLLM_PP_LAYER_PARTITION"] == "30,10"
        assert process.environment["CUDA_VISIBLE_DEVICES"] == gpus
    told = yaml.safe_load(hosts_file(inventory, hosts, "r", {}, "test"))["all"]["hosts"]["c"]
    assert told["hexgen2_replicas"] == ["big"]
    assert told["hexgen2_processes"][0]["leader"] == {"host": "b", "unit": "hexgen2-worker-big.service"}


def test_the_hand_over_has_the_memory_that_was_planned(tmp_path: Path) -> None:
    sized = plan().model_dump()
    engine = {"kv_cache_bytes": 1 << 30, "max_num_seqs": 24, "max_num_batched_tokens": 2048}
    for replica in sized["replicas"]:
        replica["engine"] = engine | {"send_tokens": 4096, "staging_tokens": 8192}
    hosts = processes(inventory_of(tmp_path), Placement.model_validate(sized), "inventory.yaml")
    p1, d0 = (each.config for each in hosts["b"])
    assert isinstance(p1, WorkerConfig)
    assert isinstance(d0, WorkerConfig)
    # Llama-2-13B in bfloat16: 2 * 40 layers * 40 heads * 128 * 2 bytes per token; and half of it on each of two ranks.
    assert p1.kv.send_bytes == 4096 * 819_200
    assert d0.kv.staging_bytes == 8192 * 819_200 // 2
    assert isinstance(d0.engine, VllmEngineConfig)
    assert d0.engine.kv_cache_bytes == 1 << 30


@pytest.mark.parametrize(
    ("stages", "problem"),
    [
        (((2, "b"), (1, "c")), "with 2 GPUs of b, 1 GPUs of c: vLLM takes as many of each"),
        (((1, "b"), (1, "c"), (1, "b"), (1, "c")), "and its stages go to and fro between them"),
    ],
)
def test_what_vllms_multi_node_executor_cannot_run_is_refused(
    tmp_path: Path, stages: Sequence[tuple[int, str]], problem: str
) -> None:
    text = INVENTORY.replace("cores: 4", "gpus: [NVIDIA A100-SXM4-80GB, NVIDIA A100-SXM4-80GB]")
    big = split(*(stage("A100-SXM", size, 0, 10, machine=machine) for size, machine in stages))
    with pytest.raises(ConfigError, match=f"replica big is on several machines, {problem}"):
        processes(inventory_of(tmp_path, text), big, "inventory.yaml")


def test_rdma_that_was_planned_must_be_there_and_is_required(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"hosts\.0\.infiniband: a was planned with RDMA"):
        processes(inventory_of(tmp_path), plan(("a", "b")), "inventory.yaml")
    text = INVENTORY.replace("10.0.0.1,", "10.0.0.1, infiniband: true, ucx_net_devices: 'mlx5_0:1',")
    text = text.replace("kv_host: 10.1.0.2", "infiniband: true")
    hosts = processes(inventory_of(tmp_path, text), plan(("a", "b")), "inventory.yaml")
    required = {each.name: getattr(each.config, "kv", None) for each in [*hosts["a"], *hosts["b"], *hosts["c"]]}
    assert {name for name, kv in required.items() if kv is not None and kv.require == "rdma"} == {
        "worker-p0",
        "worker-d0",
    }
    assert hosts["a"][1].environment["UCX_NET_DEVICES"] == "mlx5_0:1"
    assert hosts["a"][1].environment["UCX_TLS"] == "rc,sm,self,cuda"


@pytest.mark.parametrize(
    ("host", "settings"),
    [
        ({}, {}),
        ({"infiniband": True}, {"UCX_TLS": "rc,sm,self"}),
        ({"ucx_net_devices": "eth1"}, {"UCX_TLS": "tcp,sm,self", "UCX_NET_DEVICES": "eth1"}),
        ({"ucx_tls": "dc,self", "infiniband": True, "gpus": ["NVIDIA H200"]}, {"UCX_TLS": "dc,self"}),
    ],
)
def test_ucx_is_told_what_a_host_has(host: dict[str, Any], settings: dict[str, str]) -> None:
    assert ucx_environment(Host.model_validate({"name": "a", "address": "a"} | host)) == settings


def test_every_unit_starts_a_process_that_can_read_its_configuration(tmp_path: Path) -> None:
    rack = deployed(tmp_path)
    for path in sorted(rack.glob("files/*/units/*.service")):
        text = path.read_text()
        (start,) = re.findall(r"^ExecStart=/opt/hexgen2/releases/\w+/bin/hexgen2 (.*)$", text, flags=re.MULTILINE)
        command, flag, file = start.split()
        assert flag == "--config"
        main.commands[command].make_context(command, [flag, file])
        written = path.parent.parent / "etc" / Path(file).relative_to("/etc/hexgen2")
        config = merge(COMMANDS[command], written, {}, {"role": command} if command == "flexible" else {})
        # Everything that it reads is there.
        for name in ("plan", "api_keys"):
            if value := getattr(config, name, None):
                assert (path.parent.parent / "etc" / Path(value).relative_to("/etc/hexgen2")).is_file()
        tls = _tls(config)
        for part in (tls.ca, tls.cert, tls.key):
            assert (path.parent.parent / "etc" / part.relative_to("/etc/hexgen2")).is_file()
    assert len(list(rack.glob("files/*/units/*.service"))) == 7
    # A release that is a little older reads it, too: it has no field that nobody asked for.
    settings = yaml.safe_load((rack / "files" / "a" / "etc" / "coordinator.yaml").read_text())
    assert set(settings) == {"listen", "metrics_listen", "page_listen", "plan", "state_file", "tls"}


def _tls(config: Config) -> TlsConfig:
    assert isinstance(config, CoordinatorConfig | GatewayConfig | WorkerConfig)
    assert config.tls is not None
    return config.tls


def test_a_unit_stops_no_sooner_than_its_requests_and_hides_what_it_does_not_need(tmp_path: Path) -> None:
    hosts = found(tmp_path)
    text = unit(hosts["b"][1], "hexgen2", "/opt/hexgen2/releases/r")
    for line in ("NoNewPrivileges=yes", "ProtectSystem=strict", "LimitMEMLOCK=infinity", "Restart=on-failure"):
        assert line in text.splitlines()
    assert "TimeoutStopSec=50" in text
    assert 'Environment="NOTE=50%% of \\"b\\""' in text
    assert "PrivateDevices" not in text, "it has GPUs"
    assert "PrivateDevices=yes" in unit(hosts["a"][0], "hexgen2", "/r")
    assert "CPUQuota=50%" in unit(hosts["c"][0], "hexgen2", "/r")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_finds_nothing_wrong_with_the_units(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "hexgen2"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    paths = []
    for host, running in found(tmp_path).items():
        folder = tmp_path / host
        folder.mkdir()
        for process in running:
            paths.append(folder / process.unit)
            paths[-1].write_text(unit(process, "hexgen2", str(tmp_path)))
    for folder in sorted({path.parent for path in paths}):
        checked = _verify([path for path in paths if path.parent == folder])
        assert checked.returncode == 0, checked.stderr
    broken = paths[0].with_name("hexgen2-broken.service")
    broken.write_text(paths[0].read_text().replace("ProtectSystem=strict", "ProtectSystem=perhaps"))
    assert _verify([broken]).returncode != 0


def _verify(paths: Sequence[Path]) -> subprocess.CompletedProcess[str]:
    words = ["systemd-analyze", "verify", "--recursive-errors=yes", "--man=no", *map(str, paths)]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)


def test_certificates_are_of_each_host_and_role_alone_and_the_authority_stays(tmp_path: Path) -> None:
    rack = deployed(tmp_path)
    authority = (rack / "certs" / "ca.pem").read_bytes()
    issued = certs.read(rack / "files" / "b" / "etc" / "tls" / "worker" / "cert.pem")
    assert issued.callers == (Caller.WORKER,)
    assert {"10.0.0.2", "10.1.0.2", "b", "127.0.0.1"} <= set(issued.hosts)
    assert {path.name for path in (rack / "files" / "b" / "etc" / "tls").iterdir()} == {"worker"}
    assert {path.name for path in (rack / "files" / "a" / "etc" / "tls").iterdir()} == {
        "coordinator",
        "worker",
        "gateway",
        "admin",
    }
    assert not list(rack.glob("files/**/ca.key"))
    for key in rack.rglob("key.pem"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
    deployed(tmp_path)
    assert (rack / "certs" / "ca.pem").read_bytes() == authority


def test_other_packages_are_another_release_and_the_same_ones_the_same(tmp_path: Path) -> None:
    def release() -> str:
        return str(yaml.safe_load((deployed(tmp_path) / "hosts.yaml").read_text())["all"]["vars"]["hexgen2_release"])

    first = release()
    assert release() == first
    (tmp_path / "wheels" / "more-1.0-py3-none-any.whl").unlink()
    planned, inventory = files(tmp_path)
    (tmp_path / "wheels" / "more-1.0-py3-none-any.whl").write_bytes(b"another wheel")
    words = ["baremetal", str(planned), "--inventory", str(inventory), "-o", str(tmp_path / "other")]
    assert CliRunner().invoke(deploy, words).exit_code == 0
    other = yaml.safe_load((tmp_path / "other" / "hosts.yaml").read_text())["all"]["vars"]
    assert other["hexgen2_release"] != first
    assert "/opt/hexgen2/packages/more-1.0-py3-none-any.whl[cpu]" in other["hexgen2_pip"]
    (tmp_path / "wheels" / "more-1.0-py3-none-any.whl").unlink()
    with pytest.raises(HexgenError, match=r"packages\.1: .*more-1\.0-py3-none-any\.whl: no such file"):
        CliRunner().invoke(deploy, words, catch_exceptions=False, standalone_mode=False)


def test_playbooks_ask_for_nothing_that_hosts_yaml_does_not_say(tmp_path: Path) -> None:
    rack = deployed(tmp_path)
    hosts = yaml.safe_load((rack / "hosts.yaml").read_text())["all"]
    known = {*hosts["vars"], *next(iter(hosts["hosts"].values()))}
    for path in sorted(PLAYBOOKS.rglob("*.yaml")):
        text = path.read_text()
        assert (rack / path.relative_to(PLAYBOOKS)).read_text() == text
        made = set(re.findall(r"(?:register|loop_var): (hexgen2_\w+)|^ +(hexgen2_\w+):", text, flags=re.MULTILINE))
        given = {"hexgen2_process", *(name for pair in made for name in pair)}
        optional = set(re.findall(r"(hexgen2_\w+) \| default", text))
        assert set(re.findall(r"\bhexgen2_\w+", text)) <= known | given | optional, path.name
    assert hosts["hosts"]["c"]["ansible_host"] == "c.example.org"
    assert hosts["hosts"]["c"]["ansible_become"] is True
    assert "ansible_become" not in hosts["hosts"]["a"]
