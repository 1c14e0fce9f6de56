"""Namespaces: joined, shaped, cut, and gone afterwards."""

import json
import subprocess
import sys

import pytest

from hexgen2 import netns
from hexgen2.netns import HOST, Link, Network

pytestmark = pytest.mark.skipif(netns.why_not() is not None, reason=str(netns.why_not()))

_CONNECT = "import socket,sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 2).sendall(b'x')"
_LISTEN = """
import socket, sys
with socket.create_server((sys.argv[1], 7000)) as server:
    print('ready', flush=True)
    while True:
        server.accept()[0].recv(1)
"""


def connects(net: Network, node: int, address: str) -> bool:
    command = net.command(node, [sys.executable, "-c", _CONNECT, address, "7000"])
    return subprocess.run(command, capture_output=True, timeout=30, check=False).returncode == 0


def test_nodes_are_joined_by_links_that_can_be_cut_and_mended() -> None:
    with netns.network(2, [Link(0, 1), Link(HOST, 1)]) as net:
        server = net.start(1, [sys.executable, "-c", _LISTEN, "0.0.0.0"], stdout=subprocess.PIPE)
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == b"ready\n"
            assert connects(net, 0, net.address(0, 1))
            assert connects(net, HOST, net.address(1, 1))
            net.down(0)
            assert not connects(net, 0, net.address(0, 1))
            assert connects(net, HOST, net.address(1, 1)), "only that link is cut"
            net.up(0)
            assert connects(net, 0, net.address(0, 1))
        finally:
            server.kill()
            server.communicate(timeout=10)
        names = net.names
    there = {row["name"] for row in json.loads(subprocess.check_output(["ip", "-j", "netns"]) or b"[]")}
    assert not there & set(names)


def test_a_link_has_the_rate_it_was_given_last() -> None:
    def rates(net: Network) -> set[int | None]:
        shown = [subprocess.check_output(["tc", "-j", "-n", name, "qdisc", "show"]) for name in net.names]
        rows = [row for text in shown for row in json.loads(text) if row["kind"] == "tbf"]
        return {row["options"]["rate"] for row in rows}

    with netns.network(2, [Link(0, 1, rate_mbit=1000)]) as net:
        assert rates(net) == {125_000_000}
        net.shape(0, 40)
        assert rates(net) == {5_000_000}
        net.shape(0, None)
        assert rates(net) == set()
