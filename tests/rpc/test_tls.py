"""Mutual TLS on real sockets: who gets a connection, who may call what, and files that change meanwhile."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from hexgen2 import metrics
from hexgen2.config import TlsConfig
from hexgen2.errors import ConfigError
from hexgen2.rpc.client import channel
from hexgen2.rpc.server import GrpcServer
from hexgen2.rpc.tls import TlsChannel
from hexgen2.security import certs
from hexgen2.security.callers import Caller
from hexgen2.security.tls import TlsFiles
from hexgen2.v1 import coordinator_pb2, coordinator_pb2_grpc
from tests.certificates import Authority
from tests.eventually import eventually
from tests.rpc.conftest import Service

REQUEST = coordinator_pb2.GetPlanRequest()
TIMEOUT_S = 10.0


async def answer(_: Any) -> coordinator_pb2.GetPlanResponse:
    return coordinator_pb2.GetPlanResponse()


async def watch(_: Any) -> AsyncIterator[coordinator_pb2.WatchPlanResponse]:
    while True:
        yield coordinator_pb2.WatchPlanResponse()
        await asyncio.sleep(0.01)


@asynccontextmanager
async def coordinator(tls: TlsFiles | None, *, client_certs: bool = True) -> AsyncIterator[str]:
    service = Service()
    service.unary, service.stream = answer, watch
    server = GrpcServer("127.0.0.1:0", tls=tls, client_certs=client_certs)
    server.add(coordinator_pb2_grpc.add_CoordinatorServicer_to_server, service, "hexgen2.v1.Coordinator")
    try:
        address = await server.start()
        await server.set_serving(True)
        yield address
    finally:
        await server.stop(0)


async def get_plan(address: str, tls: TlsFiles | None) -> str:
    """The status of one call."""
    async with channel(address, tls) as peer:
        return await status_of(coordinator_pb2_grpc.CoordinatorStub(peer).GetPlan(REQUEST, timeout=TIMEOUT_S))


async def status_of(call: Any) -> str:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


@pytest.fixture
async def address(authority: Authority) -> AsyncIterator[str]:
    async with coordinator(authority.files("coordinator")) as address:
        yield address


async def test_peers_of_one_authority_talk(authority: Authority, address: str) -> None:
    assert await get_plan(address, authority.files("gateway")) == "OK"


async def test_a_server_that_is_another_hosts_is_not_talked_to(authority: Authority) -> None:
    async with coordinator(authority.files("elsewhere")) as address:
        assert await get_plan(address, authority.files("gateway")) == "UNAVAILABLE"


@pytest.mark.parametrize("who", ["expired", "stranger", "nobody", "plain"])
async def test_who_has_no_certificate_of_the_authority_gets_no_connection(
    who: str, authority: Authority, stranger: Authority, address: str
) -> None:
    begun = metrics.TLS_HANDSHAKES_BEGUN.labels("grpc")._value
    before = begun.get()
    if who == "nobody":
        # Trusts us, but shows nothing.
        credentials = grpc.ssl_channel_credentials(authority.config("client").ca.read_bytes())
        async with grpc.aio.secure_channel(address, credentials) as peer:
            call = coordinator_pb2_grpc.CoordinatorStub(peer).GetPlan(REQUEST, timeout=TIMEOUT_S)
            assert await status_of(call) == "UNAVAILABLE"
    else:
        known = {"expired": authority.files("expired"), "stranger": stranger.files("gateway"), "plain": None}
        assert await get_plan(address, known[who]) == "UNAVAILABLE"
    # A client may try again before its call fails.
    assert begun.get() >= before + 1
    assert await get_plan(address, authority.files("gateway")) == "OK"


async def test_certificates_decide_who_may_call_what(authority: Authority, address: str) -> None:
    before = metrics.CALLS_REFUSED.labels("/hexgen2.v1.Coordinator/Report")._value.get()
    for role, may_report, may_see in (
        ("worker", True, False),
        ("gateway", False, True),
        ("client", False, True),
        ("admin", False, True),
        ("coordinator", False, False),
    ):
        async with channel(address, authority.files(role)) as peer:
            stub = coordinator_pb2_grpc.CoordinatorStub(peer)
            report = await status_of(stub.Report(coordinator_pb2.ReportRequest(), timeout=TIMEOUT_S))
            see = await status_of(stub.GetPlan(REQUEST, timeout=TIMEOUT_S))
            assert (report, see) == tuple("OK" if may else "PERMISSION_DENIED" for may in (may_report, may_see)), role
            # And every certificate sees health.
            health: Any = health_pb2_grpc.HealthStub(peer)  # type: ignore[arg-type,unused-ignore]
            assert (await health.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)).status == 1
    assert metrics.CALLS_REFUSED.labels("/hexgen2.v1.Coordinator/Report")._value.get() == before + 4


async def test_a_refusal_says_who_may(authority: Authority, address: str) -> None:
    async with channel(address, authority.files("client")) as peer:
        with pytest.raises(grpc.aio.AioRpcError, match="is for worker only; the caller's certificate says: client"):
            await coordinator_pb2_grpc.CoordinatorStub(peer).Report(coordinator_pb2.ReportRequest(), timeout=TIMEOUT_S)


async def test_without_client_certificates_tls_is_still_spoken(authority: Authority) -> None:
    async with coordinator(authority.files("gateway"), client_certs=False) as address:
        credentials = grpc.ssl_channel_credentials(authority.config("client").ca.read_bytes())
        async with grpc.aio.secure_channel(address, credentials) as peer:
            assert await status_of(coordinator_pb2_grpc.CoordinatorStub(peer).GetPlan(REQUEST)) == "OK"
        assert await get_plan(address, None) == "UNAVAILABLE"


async def test_new_connections_use_new_certificates_and_no_call_fails(authority: Authority, tmp_path: Path) -> None:
    mine = authority.copied(tmp_path / "certs")
    server_files, client_files = mine.files("coordinator"), mine.files("gateway")
    async with coordinator(server_files) as address, channel(address, client_files) as peer:
        stub = coordinator_pb2_grpc.CoordinatorStub(peer)
        running = stub.WatchPlan(coordinator_pb2.WatchPlanRequest())
        await running.read()
        stop = asyncio.Event()
        calls = 0

        async def load() -> None:
            nonlocal calls
            while not stop.is_set():
                await stub.GetPlan(REQUEST, timeout=TIMEOUT_S)
                calls += 1

        async with asyncio.TaskGroup() as tasks:
            for _ in range(4):
                tasks.create_task(load())
            seen = [serial(address, client_files)]
            for _ in range(2):
                certs.renew(mine.folder, days=1)
                wanted = calls + 20
                await eventually(lambda wanted=wanted: calls >= wanted)  # type: ignore[misc]
                seen.append(serial(address, client_files))
            stop.set()
        assert len(set(seen)) == 3
        # What ran before the change runs on.
        assert await running.read() is not grpc.aio.EOF
        running.cancel()


async def test_a_channel_outlives_the_certificates_that_it_began_with(authority: Authority, tmp_path: Path) -> None:
    mine = authority.copied(tmp_path / "certs")
    async with coordinator(mine.files("coordinator")) as address:
        files = mine.issue("late", "gateway", days=-1)
        async with channel(address, files) as peer:
            stub = coordinator_pb2_grpc.CoordinatorStub(peer)
            assert await status_of(stub.GetPlan(REQUEST, timeout=TIMEOUT_S)) == "UNAVAILABLE"
            mine.issue("late", "gateway")
            assert await status_of(stub.GetPlan(REQUEST, timeout=TIMEOUT_S)) == "OK"


async def test_a_closed_channel_leaves_no_connection(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hexgen2.rpc.tls._LINGER_S", 0.0)
    mine = authority.copied(tmp_path / "certs")
    async with coordinator(mine.files("coordinator")) as address:
        peer = TlsChannel(address, mine.files("gateway"), ())
        stub = coordinator_pb2_grpc.CoordinatorStub(peer)
        held = stub.WatchPlan(coordinator_pb2.WatchPlanRequest())
        await held.read()
        for _ in range(3):
            certs.renew(mine.folder, days=1)
            await stub.GetPlan(REQUEST, timeout=TIMEOUT_S)
        # The one with a call, and the newest.
        await eventually(lambda: len(peer._old) == 1)
        await peer.close()
        assert await held.code() is grpc.StatusCode.CANCELLED


def serial(address: str, files: TlsFiles) -> int:
    """Of the certificate that the server shows to a new connection."""
    host, _, port = address.partition(":")
    context = ssl.create_default_context(cafile=str(files.config.ca))
    context.load_cert_chain(files.config.cert, files.config.key)
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection((host, int(port)), TIMEOUT_S) as plain,
        context.wrap_socket(plain, server_hostname=host) as tls,
    ):
        shown = tls.getpeercert()
        assert shown
        return int(str(shown["serialNumber"]), 16)


def test_files_that_do_not_belong_together_change_nothing(authority: Authority, tmp_path: Path) -> None:
    mine = authority.copied(tmp_path / "certs")
    files = mine.files("gateway")
    first = files.current()
    assert files.current() is first
    whole = files.config.key.read_bytes()
    files.config.key.write_bytes(mine.config("worker").key.read_bytes())
    assert files.current() is first
    files.config.key.write_bytes(b"")
    assert files.current() is first
    files.config.key.unlink()
    assert files.current() is first
    files.config.key.write_bytes(whole)
    files.config.key.chmod(0o600)
    assert files.current().key == whole


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: c.key.write_bytes(b"x"), r"tls\.key: .*no PEM key"),
        (lambda c: c.cert.write_bytes(b"x"), r"tls\.cert: .*no PEM certificate"),
        (lambda c: c.ca.write_bytes(b"x"), r"tls\.ca: .*no PEM certificates"),
        (lambda c: c.ca.unlink(), r"gateway/ca\.pem: No such file"),
        (lambda c: c.key.chmod(0o644), r"may be read by everybody; chmod 600"),
        (lambda c: c.cert.write_bytes((c.cert.parent.parent / "worker/cert.pem").read_bytes()), "is not the key of"),
    ],
)
def test_files_that_cannot_be_used_are_told_at_the_start(
    damage: Any, message: str, authority: Authority, tmp_path: Path
) -> None:
    config = authority.copied(tmp_path / "certs").config("gateway")
    damage(config)
    with pytest.raises(ConfigError, match=message):
        TlsFiles(config)


def test_a_section_may_be_a_folder(tmp_path: Path) -> None:
    assert TlsConfig.model_validate(str(tmp_path)) == TlsConfig(
        ca=tmp_path / "ca.pem", cert=tmp_path / "cert.pem", key=tmp_path / "key.pem"
    )


def test_every_method_is_somebodys() -> None:
    from hexgen2.security.callers import _MAY_CALL
    from hexgen2.v1 import decode_pb2, gateway_pb2, prefill_pb2

    methods = {
        f"/{service.full_name}/{method.name}"
        for file in (coordinator_pb2, decode_pb2, gateway_pb2, prefill_pb2)
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    assert set(_MAY_CALL) <= methods
    assert all(allowed <= set(Caller) for allowed in _MAY_CALL.values())
