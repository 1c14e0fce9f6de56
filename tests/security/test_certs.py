"""The certificate authority, and its command."""

import json
import os
import ssl
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from hexgen2.cli.main import main
from hexgen2.errors import ConfigError
from hexgen2.security import certs
from hexgen2.security.callers import Caller


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    certs.init(tmp_path / "ca")
    return tmp_path / "ca"


def run(*arguments: str) -> str:
    result = CliRunner().invoke(main, ["certs", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def purposes(path: Path) -> set[x509.ObjectIdentifier]:
    certificate = x509.load_pem_x509_certificate(path.read_bytes())
    return set(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)


def test_keys_are_the_owners_alone(folder: Path) -> None:
    mask = os.umask(0)
    try:
        certs.issue(folder, "w", (Caller.WORKER,), ("10.0.0.7",))
    finally:
        os.umask(mask)
    for key in (folder / "ca.key", folder / "w" / "key.pem"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600


def test_a_certificate_says_what_was_asked_for(folder: Path) -> None:
    made = certs.issue(folder, "w", (Caller.WORKER, Caller.GATEWAY), ("10.0.0.7", "w.example"), days=3)
    assert (made.name, made.callers, made.hosts) == (
        "w",
        (Caller.GATEWAY, Caller.WORKER),
        ("w.example", "10.0.0.7"),
    )
    assert timedelta(days=3) - timedelta(minutes=1) < made.not_after - datetime.now(UTC) < timedelta(days=3)
    assert purposes(made.path) == {ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH}


def test_who_does_not_listen_cannot_be_a_server(folder: Path) -> None:
    assert purposes(certs.issue(folder, "c", (Caller.CLIENT,)).path) == {ExtendedKeyUsageOID.CLIENT_AUTH}


def test_a_second_authority_does_not_replace_the_first(folder: Path) -> None:
    with pytest.raises(ConfigError, match="there is a certificate authority already"):
        certs.init(folder)


def test_the_authority_signs_no_further_authorities(folder: Path) -> None:
    certificate = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (constraints.critical, constraints.value.ca, constraints.value.path_length) == (True, True, 0)


@pytest.mark.parametrize(
    ("name", "callers", "hosts", "days", "message"),
    [
        ("../x", (Caller.CLIENT,), (), 1, "name: "),
        ("", (Caller.CLIENT,), (), 1, "name: "),
        ("x", (), (), 1, "role: "),
        ("x", (Caller.WORKER,), (), 1, "host: x is a worker, which others dial"),
        ("x", (Caller.CLIENT,), ("ä",), 1, "host: 'ä' is neither"),
        ("x", (Caller.CLIENT,), (), 9999, "days: 9999 is longer than the authority's"),
    ],
)
def test_what_cannot_be_is_refused(
    name: str, callers: tuple[Caller, ...], hosts: tuple[str, ...], days: float, message: str, folder: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        certs.issue(folder, name, callers, hosts, days)


def test_the_key_must_be_the_authoritys(folder: Path, tmp_path: Path) -> None:
    certs.init(tmp_path / "other")
    (tmp_path / "other" / "ca.key").replace(folder / "ca.key")
    with pytest.raises(ConfigError, match="is not the key of the first certificate"):
        certs.issue(folder, "x", (Caller.CLIENT,))


def test_renewed_certificates_are_new_and_say_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "certs"
    made = json.loads(run("fleet", str(folder), "--json"))
    assert {row["name"] for row in made} == set(Caller)
    before = {path: path.read_bytes() for path in folder.glob("*/*.pem")}
    authority = (folder / "ca.pem").read_bytes()
    again = json.loads(run("renew", str(folder), "--days", "2", "--json"))
    same = ("name", "roles", "hosts", "path")
    assert [[row[key] for key in same] for row in sorted(made, key=lambda row: row["name"])] == [
        [row[key] for key in same] for row in again
    ]
    assert all((path.read_bytes() == data) == (path.name == "ca.pem") for path, data in before.items())
    assert (folder / "ca.pem").read_bytes() == authority
    for role in Caller:
        # OpenSSL takes them.
        context = ssl.create_default_context(cafile=str(folder / role / "ca.pem"))
        context.load_cert_chain(folder / role / "cert.pem", folder / role / "key.pem")


def test_the_command_makes_and_shows(tmp_path: Path) -> None:
    folder = str(tmp_path / "certs")
    assert "certificate authority" in run("init", folder)
    run("issue", folder, "worker-1", "--role", "worker", "--host", "10.0.0.7")
    run("issue", folder, "old", "--role", "client", "--days", "0.01")
    shown = run("show", folder)
    assert "worker-1" in shown
    assert "10.0.0.7" in shown
    assert "in 30 days" in shown
    assert "in 0 hours" in shown
    assert "worker-1" in run("show", f"{folder}/worker-1")
