"""Free ports: held while they are chosen, and not those that anybody may be given."""

import socket

import pytest

from hexgen2.address import check_free, held_port
from hexgen2.errors import ConfigError


def test_a_port_is_held_to_the_end_of_the_block_and_free_then() -> None:
    with held_port("127.0.0.1") as port, held_port("127.0.0.1") as other:
        assert port != other
        # Linux gives those from 32768 on to whoever asks for any.
        assert 20_000 <= port < 32_000
        with pytest.raises(ConfigError, match="in use"):
            check_free(f"127.0.0.1:{port}")
    check_free(f"127.0.0.1:{port}")
    socket.create_server(("127.0.0.1", port)).close()


def test_an_address_of_another_machine_has_no_ports_here() -> None:
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1"), held_port("192.0.2.1"):
        pass
