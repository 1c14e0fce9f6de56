"""Certificates of one authority, and of another, made once for all tests."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from hexgen2.config import TlsConfig
from hexgen2.security import certs
from hexgen2.security.callers import Caller
from hexgen2.security.tls import TlsFiles

HOSTS = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Authority:
    """A folder as `hexgen2 certs fleet` makes it."""

    folder: Path

    def files(self, name: str) -> TlsFiles:
        return TlsFiles(self.config(name))

    def config(self, name: str) -> TlsConfig:
        return TlsConfig.model_validate(self.folder / name)

    def issue(self, name: str, *callers: str, hosts: Sequence[str] = HOSTS, days: float = 1) -> TlsFiles:
        certs.issue(self.folder, name, map(Caller, callers), hosts, days)
        return self.files(name)

    def copied(self, folder: Path) -> "Authority":
        """One that a test may change."""
        shutil.copytree(self.folder, folder)
        return Authority(folder)


def make(folder: Path) -> Authority:
    certs.init(folder)
    for role in Caller:
        certs.issue(folder, role, (role,), HOSTS)
    return Authority(folder)


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """A certificate for each role, by its name, and one that has expired."""
    made = make(tmp_path_factory.mktemp("authority") / "certs")
    made.issue("expired", "gateway", "client", "worker", days=-1)
    made.issue("elsewhere", "worker", hosts=("10.9.9.9",))
    return made


@pytest.fixture(scope="session")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Certificates of the same names by an authority that nobody here trusts."""
    return make(tmp_path_factory.mktemp("stranger") / "certs")
