"""What UcxTransport does to its process: environment, imports, errors."""

import os
import subprocess
import sys

import pytest

import hexgen2.kv.ucx as ucx
from hexgen2.errors import ConfigError


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("UCX_MODULES", "UCX_NET_DEVICES"):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_on_loopback_ucx_is_bound_to_loopback(environment: pytest.MonkeyPatch, host: str) -> None:
    ucx._prepare_environment(host)
    assert os.environ["UCX_NET_DEVICES"] == "lo"


@pytest.mark.parametrize("host", ["10.0.0.1", "fd00::1", "kv.example"])
def test_elsewhere_the_devices_are_ucx_own_choice(environment: pytest.MonkeyPatch, host: str) -> None:
    ucx._prepare_environment(host)
    assert "UCX_NET_DEVICES" not in os.environ


def test_what_the_user_set_stays(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("UCX_NET_DEVICES", "eth7")
    environment.setenv("UCX_MODULES", "^cuda")
    ucx._prepare_environment("127.0.0.1")
    assert (os.environ["UCX_NET_DEVICES"], os.environ["UCX_MODULES"]) == ("eth7", "^cuda")


def test_without_nixl_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ucx, "NIXL_MODULES", ("no_such_nixl",))
    with pytest.raises(ConfigError, match="install nixl-cu12"):
        ucx.UcxTransport("127.0.0.1")


def test_importing_the_transports_imports_nothing_heavy() -> None:
    code = "import sys, hexgen2.kv.tcp, hexgen2.kv.ucx; print({'torch', 'nixl', 'nixl_cu12', 'vllm'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "set()"
