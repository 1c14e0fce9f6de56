"""hexgen2 doctor: each thing that is wrong is found, with its remedy."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from hexgen2.cli.doctor import doctor_command
from hexgen2.doctor import links, machine
from hexgen2.doctor.finding import Finding, State
from hexgen2.security import certs
from hexgen2.security.callers import Caller
from tests.models import make_tiny_llama


def one(findings: Iterator[Finding], check: str) -> Finding:
    (found,) = [each for each in findings if each.check == check]
    return found


def test_this_machine_can_run_it() -> None:
    findings = [*machine.check_python(), *machine.check_memory(Path.home()), *machine.check_kv_plane()]
    assert not [each for each in findings if each.state is State.FAILED]
    assert all(each.remedy for each in findings if each.state is not State.OK)


def test_a_port_in_use_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert one(machine.check_ports([address]), f"port {address}").state is State.FAILED
    assert one(machine.check_ports(["127.0.0.1:0"]), "port 127.0.0.1:0").state is State.OK


def test_a_model_is_read_as_a_worker_reads_it(tmp_path: Path) -> None:
    assert one(machine.check_model(tmp_path / "none"), "model").state is State.FAILED
    folder = make_tiny_llama(tmp_path / "model")
    found = {each.check: each.state for each in machine.check_model(folder)}
    assert found["model"] is State.OK


def test_certificates(tmp_path: Path) -> None:
    certs.init(tmp_path)
    certs.issue(tmp_path, "worker", (Caller.WORKER,), ("localhost",), 30.0)
    good = list(machine.check_certificates(tmp_path / "worker"))
    assert [each.state for each in good] == [State.OK, State.OK]
    certs.issue(tmp_path, "soon", (Caller.WORKER,), ("localhost",), 2.0)
    assert one(machine.check_certificates(tmp_path / "soon"), "cert.pem").state is State.WARNING
    (tmp_path / "soon" / "key.pem").chmod(0o644)
    assert one(machine.check_certificates(tmp_path / "soon"), "key.pem").state is State.FAILED
    (tmp_path / "soon" / "cert.pem").write_text("nothing")
    assert one(machine.check_certificates(tmp_path / "soon"), "cert.pem").state is State.FAILED


@contextmanager
def served() -> Iterator[str]:
    lines = links.serve("127.0.0.1:0")
    address = next(lines)
    # Serves one peer; the generator then waits at its next line and is closed with this block.
    thread = threading.Thread(target=lambda: next(lines))
    thread.start()
    try:
        yield address
    finally:
        thread.join(timeout=10.0)
        lines.close()


def test_a_link_is_measured() -> None:
    with served() as address:
        (found,) = links.measure(address)
    assert found.state is State.OK
    assert "Gbit/s" in found.found


def test_a_link_to_nobody_is_told() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    (found,) = links.measure(address)
    assert found.state is State.FAILED
    assert "--serve" in found.remedy


def test_a_fleet_that_is_not_there_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    result = CliRunner().invoke(doctor_command, ["--coordinator", address, "--json"])
    assert result.exit_code == 1
    (found,) = json.loads(result.output)
    assert found["check"] == "coordinator"
    assert found["state"] == "failed"
