"""Two workers with certificates: who may fetch KV, and bytes that are altered on their way."""

import re
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest

from hexgen2.config import EmulatedEngineConfig, KvConfig, WorkerConfig
from hexgen2.engine.base import Sampling
from hexgen2.engine.make import make_engine
from hexgen2.errors import ConfigError
from hexgen2.kv import choose
from hexgen2.kv import tcp_wire as wire
from hexgen2.kv.choose import transport_name
from hexgen2.rpc.client import channel
from hexgen2.v1 import prefill_pb2, prefill_pb2_grpc
from tests.certificates import Authority
from tests.flipping import Flipper
from tests.worker.pair import CONFIG, DEADLINE_S, WorkerPair, expected_tokens, pair
from tests.worker.test_hand_over import prompt_of

PROMPT = prompt_of(200)
SAMPLING = Sampling(max_tokens=4)


def kv(**changes: object) -> KvConfig:
    sizes = {"send_bytes": 1 << 20, "staging_bytes": 1 << 20, "landing_bytes": 1 << 18}
    return KvConfig.model_validate({"transport": "tcp"} | sizes | changes)


async def code_of(call: Any) -> str:
    try:
        async for _ in call:
            pass
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


async def test_with_certificates_the_bytes_go_over_tls_too(authority: Authority) -> None:
    async with pair(prefill_kv=kv(), decode_kv=kv(), authority=authority) as fleet:
        handed = await fleet.generate(PROMPT, SAMPLING)
        assert handed.tokens == expected_tokens(CONFIG, PROMPT, 4)
        assert handed.kv is not None
        assert handed.kv.transport == "tcp+tls"
        await fleet.settled()


async def test_fetching_is_for_workers_and_prefilling_for_gateways(authority: Authority) -> None:
    async with pair(prefill_kv=kv(), decode_kv=kv(), authority=authority) as fleet:
        transfer = fleet.transfer()
        fetch = prefill_pb2.FetchKvRequest(transfer_id=transfer.transfer_id, token=transfer.token)
        codes = {}
        for role in ("gateway", "worker", "client", "admin", "coordinator"):
            async with channel(fleet.prefill.address, authority.files(role)) as peer:
                stub = prefill_pb2_grpc.PrefillStub(peer)
                # A worker may wait for a transfer that has not come yet.
                fetch_s = 0.3 if role == "worker" else DEADLINE_S
                codes[role] = (
                    await code_of(stub.FetchKv(fetch, timeout=fetch_s)),
                    await code_of(stub.Prefill(prefill_pb2.PrefillRequest(), timeout=DEADLINE_S)),
                )
        no = "PERMISSION_DENIED"
        assert codes == {
            "gateway": (no, "INVALID_ARGUMENT"),
            "worker": ("DEADLINE_EXCEEDED", no),
            **dict.fromkeys(("client", "admin", "coordinator"), (no, no)),
        }


async def test_a_worker_that_is_none_gets_no_kv(authority: Authority) -> None:
    async with pair(prefill_kv=kv(), decode_kv=kv(), authority=authority, decode_identity="gateway") as fleet:
        transfer = fleet.transfer()
        prefill = fleet.start_prefill(transfer, PROMPT, SAMPLING)
        assert await code_of(fleet.start_decode(transfer, PROMPT, SAMPLING)) == "PERMISSION_DENIED"
        prefill.cancel()
        await fleet.settled()


async def test_the_token_is_still_needed(authority: Authority) -> None:
    async with pair(prefill_kv=kv(), decode_kv=kv(), authority=authority) as fleet:
        transfer = fleet.transfer()
        prefill = fleet.start_prefill(transfer, PROMPT, SAMPLING)
        await prefill.read()
        async with channel(fleet.prefill.address, authority.files("worker")) as peer:
            request = prefill_pb2.FetchKvRequest(transfer_id=transfer.transfer_id, token=secrets.token_bytes(32))
            call = prefill_pb2_grpc.PrefillStub(peer).FetchKv(request, timeout=DEADLINE_S)
            assert await code_of(call) == "NOT_FOUND"
        prefill.cancel()
        await fleet.settled()


@asynccontextmanager
async def flipped(fleet: WorkerPair) -> AsyncIterator[Flipper]:
    """Prefill says that its data is somewhere else, where somebody hands it on."""
    rank = fleet.prefill.ranks._ranks[0]
    endpoint = wire.Endpoint.unpack(rank.hello.endpoints[0])
    async with Flipper(endpoint.host, endpoint.port).running() as flipper:
        moved = replace(endpoint, port=flipper.port).pack()
        rank.hello = msgspec.structs.replace(rank.hello, endpoints=(moved,))
        yield flipper


async def decoded(fleet: WorkerPair) -> tuple[str, str]:
    """How one hand-over ends for decode: its status and what it says."""
    transfer = fleet.transfer()
    prefill = fleet.start_prefill(transfer, PROMPT, SAMPLING)
    try:
        async for _ in fleet.start_decode(transfer, PROMPT, SAMPLING):
            pass
    except grpc.aio.AioRpcError as error:
        return error.code().name, error.details() or ""
    finally:
        prefill.cancel()
    return "OK", ""


@pytest.mark.parametrize("byte", [5_000, 100_000])
async def test_a_bit_that_was_turned_over_on_the_way_is_not_served(authority: Authority, byte: int) -> None:
    plain = kv(tls="off")
    async with pair(prefill_kv=plain, decode_kv=plain, authority=authority) as fleet, flipped(fleet) as flipper:
        flipper.at = byte
        code, told = await decoded(fleet)
        assert (code, flipper.flipped) == ("DATA_LOSS", 1), told
        # Byte counts go on over the connection: it is in order again.
        handed = await fleet.generate(PROMPT, SAMPLING)
        assert handed.tokens == expected_tokens(CONFIG, PROMPT, 4)
        await fleet.settled()


async def test_over_tls_it_does_not_even_arrive_and_is_read_again(authority: Authority) -> None:
    async with pair(prefill_kv=kv(), decode_kv=kv(), authority=authority) as fleet, flipped(fleet) as flipper:
        flipper.at = 100_000
        code, told = await decoded(fleet)
        assert (code, flipper.flipped) == ("OK", 1), told
        handed = await fleet.generate(PROMPT, SAMPLING)
        assert handed.tokens == expected_tokens(CONFIG, PROMPT, 4)
        await fleet.settled()


async def test_a_side_in_the_clear_is_refused(authority: Authority) -> None:
    async with pair(prefill_kv=kv(), decode_kv=kv(tls="off"), authority=authority) as fleet:
        code, told = await decoded(fleet)
        assert (code, "tcp+tls" in told) == ("FAILED_PRECONDITION", True), told
        await fleet.settled()


def test_required_tls_is_tls_or_an_error(authority: Authority) -> None:
    tls = authority.config("worker")
    assert transport_name(KvConfig(tls="require"), tls) == "tcp+tls"
    assert transport_name(KvConfig(transport="tcp", tls="off"), tls) == "tcp"
    assert transport_name(KvConfig(transport="tcp"), None) == "tcp"
    with pytest.raises(ConfigError, match=r"kv\.tls: require, but UCX has no TLS"):
        transport_name(KvConfig(transport="ucx", tls="require"), tls)
    with pytest.raises(ConfigError, match=r"kv\.tls: require needs certificates"):
        transport_name(KvConfig(tls="require"), None)


def test_a_worker_that_is_to_have_rdma_does_not_start_on_tcp(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(choose, "rdma_devices", list)
    monkeypatch.setattr(choose, "network_interfaces", lambda: ["eth0", "lo"])
    # Set by whichever test used UCX before.
    monkeypatch.delenv("UCX_NET_DEVICES", raising=False)
    config = WorkerConfig(role="prefill", engine=EmulatedEngineConfig(), kv=KvConfig(require="rdma"))
    with pytest.raises(ConfigError) as caught:
        make_engine(config, tmp_path / "kv.sock")
    assert re.match(
        r"kv\.require: rdma, but (this machine has no RDMA device|NIXL, which drives UCX, is not installed).*; UCX "
        r"offers here: eth0 \(TCP\), lo \(TCP\)\. Mend that, or accept with kv\.require: any",
        str(caught.value),
    )


@pytest.mark.parametrize(
    ("kv", "environment", "why"),
    [
        ({"transport": "tcp"}, {}, "kv.transport is tcp"),
        ({"tls": "require"}, {}, "UCX has no TLS"),
        ({"devices": "eth0"}, {}, "UCX is given, eth0, none is"),
        ({}, {"UCX_NET_DEVICES": "eth0"}, "UCX is given, eth0, none is .*; UCX_NET_DEVICES=eth0"),
        ({}, {"UCX_TLS": "tcp,sm"}, "UCX_TLS leaves out RDMA's transports; .*; UCX_TLS=tcp,sm"),
        ({}, {"UCX_TLS": "^ib"}, "UCX_TLS leaves out"),
        ({}, {}, ""),
        ({"devices": "mlx5_0:1"}, {"UCX_TLS": "rc,cuda_copy"}, ""),
    ],
)
def test_rdma_needs_a_device_and_leave_to_use_it(
    monkeypatch: pytest.MonkeyPatch, kv: dict[str, str], environment: dict[str, str], why: str
) -> None:
    monkeypatch.setattr(choose, "rdma_devices", lambda: ["mlx5_0"])
    monkeypatch.setattr(choose, "find_spec", lambda name: True)
    for name in ("UCX_TLS", "UCX_NET_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    config = KvConfig.model_validate({"require": "rdma"} | kv)
    if not why:
        assert transport_name(config) == "ucx"
        return
    with pytest.raises(ConfigError, match=why) as caught:
        transport_name(config)
    assert "mlx5_0 (RDMA)" in str(caught.value)
