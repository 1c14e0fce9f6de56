import os

import pytest

from hexgen2.engine.vllm_network import choose
from hexgen2.errors import ConfigError

pytest.importorskip("psutil")
NAMES = ("VLLM_HOST_IP", "GLOO_SOCKET_IFNAME")


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        # Set first, so that what is set meanwhile goes again.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_ranks_use_the_network_that_leads_to_the_first_machine() -> None:
    choose("127.0.0.1", 29501)
    assert [os.environ[name] for name in NAMES] == ["127.0.0.1", "lo"]


def test_what_is_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "bond0")
    choose("127.0.0.1", 29501)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "bond0"


def test_an_address_of_another_machine_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_HOST_IP", "192.0.2.7")
    with pytest.raises(ConfigError, match=r"VLLM_HOST_IP: 192\.0\.2\.7 is no address of this machine"):
        choose("127.0.0.1", 29501)


def test_a_first_machine_that_nobody_knows_is_told() -> None:
    with pytest.raises(ConfigError, match=r"engine\.master_addr: no way to nowhere\.invalid"):
        choose("nowhere.invalid", 29501)
