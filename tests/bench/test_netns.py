import subprocess
import sys
import time

import pytest

from hexgen2.bench.netns import Link, Namespace, why_not

pytestmark = pytest.mark.skipif(bool(why_not()), reason=f"no network namespaces: {why_not()}")

SERVE = """
import socket
server = socket.create_server(("10.9.0.2", 5000))
while True:
    peer = server.accept()[0]
    try:
        peer.sendall(bytes(500_000))
    except OSError:
        pass
    peer.close()
"""
READ = """
import socket, sys
peer = socket.create_connection(("10.9.0.2", 5000), timeout=float(sys.argv[1]))
total = 0
while data := peer.recv(1 << 20):
    total += len(data)
print(total)
"""


def test_a_link_carries_is_shaped_falls_silent_and_is_cut_and_mended() -> None:
    a, b = Namespace.new(), Namespace.new()
    link = Link.between(a, "10.9.0.1", b, "10.9.0.2")
    server = subprocess.Popen([*b.command, sys.executable, "-c", SERVE])

    def read(timeout_s: float) -> bool:
        command = [*a.command, sys.executable, "-c", READ, str(timeout_s)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        return done.stdout.strip() == "500000"

    try:
        deadline = time.monotonic() + 20
        while not read(5.0):
            assert time.monotonic() < deadline
        link.shape(bits_per_s=10e6)
        began = time.monotonic()
        assert read(10.0)
        # 4 Mbit, less what may leave at once: no faster than the link.
        assert time.monotonic() - began > 0.3
        link.unshape()
        link.silence()
        assert not read(0.5)
        link.speak()
        assert read(10.0)
        link.down()
        assert not read(0.5)
        link.up()
        assert read(10.0)
    finally:
        server.kill()
        server.wait()
