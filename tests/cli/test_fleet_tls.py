"""A fleet of real processes that speaks TLS everywhere, and whose certificates change while it serves."""

import asyncio
import ssl
import sys
from collections.abc import AsyncIterable
from pathlib import Path

import httpx
import pytest

from hexgen2.cli.client import Access, generate, get_plan
from hexgen2.cli.fleet import Fleet
from hexgen2.cli.fleet_config import FleetConfig
from hexgen2.cli.generate import answer
from hexgen2.cli.main import make_request
from hexgen2.errors import PermissionDenied, Unavailable
from hexgen2.rpc.client import channel
from hexgen2.security import certs
from hexgen2.security.tls_context import peer_context
from hexgen2.v1 import gateway_pb2, gateway_pb2_grpc
from tests.certificates import Authority
from tests.eventually import eventually
from tests.models import make_tiny_llama

DEADLINE_S = 60.0
TEXT = {"model": "", "prompt": "hello", "max_tokens": 5, "ignore_eos": True, "temperature": 0}


def config(tokenizer: Path, authority: Authority) -> FleetConfig:
    free = dict.fromkeys(("listen", "http_listen", "coordinator"), "127.0.0.1:0")
    engine = {"engine": {"kind": "emulated"}, "tokenizer": tokenizer, "kv": {"transport": "tcp"}}
    return FleetConfig.model_validate(free | engine | {"tls": authority.folder, "drain_s": 5})


async def test_a_fleet_speaks_tls_everywhere(tmp_path: Path, authority: Authority) -> None:
    tokenizer = make_tiny_llama(tmp_path / "tiny")
    mine = authority.copied(tmp_path / "certs")
    async with Fleet(config(tokenizer, mine), tmp_path / "run") as fleet:
        client, request = Access(mine.files("client")), make_request("hello", max_tokens=5, ignore_eos=True)
        with (tmp_path / "out").open("w") as out:
            made = await answer(fleet.grpc_address, request, DEADLINE_S, out, client)
            assert made.last.timing.decode_replica_id == "decode-0"
        await renewed_under_load(mine, fleet, client, made.text)
        assert len((await get_plan(fleet.coordinator_address, DEADLINE_S, client)).statuses) == 2
        with pytest.raises(Unavailable, match=r"there is no connection: does only one side speak TLS"):
            await get_plan(fleet.coordinator_address, DEADLINE_S)
        with pytest.raises(Unavailable, match=r"there is no connection: .*expired"):
            await get_plan(fleet.coordinator_address, DEADLINE_S, Access(authority.files("expired")))
        with pytest.raises(PermissionDenied, match=r"GetPlan is for .*; the caller's certificate says: worker"):
            await get_plan(fleet.coordinator_address, DEADLINE_S, Access(mine.files("worker")))
        worker = (await fleet.plan()).replicas[0].address
        assert [await probe(worker, mine.folder / "worker"), await probe(worker)] == [0, 1]
        context = ssl.create_default_context(cafile=str(mine.config("client").ca))
        async with httpx.AsyncClient(base_url=fleet.http_url, verify=context, trust_env=False) as http:
            with pytest.raises(httpx.TransportError):
                await http.get("/health")
        async with httpx.AsyncClient(
            base_url=fleet.http_url, verify=peer_context(mine.files("client"), server=False), trust_env=False
        ) as http:
            told = (await http.post("/v1/completions", json=TEXT)).raise_for_status().json()
            assert told["usage"]["completion_tokens"] == 5


async def renewed_under_load(authority: Authority, fleet: Fleet, access: Access, expected: str) -> None:
    """Every certificate is replaced while requests run, over standing connections and new ones: none fails."""
    request = make_request("hello", max_tokens=5, ignore_eos=True)
    address, stop, answers = fleet.grpc_address, asyncio.Event(), 0

    async def standing() -> None:
        async with channel(address, access.tls) as peer:
            stub: gateway_pb2_grpc.GatewayAsyncStub = gateway_pb2_grpc.GatewayStub(peer)
            while not stop.is_set():
                await one(stub.Generate(request, timeout=DEADLINE_S))

    async def new() -> None:
        while not stop.is_set():
            await one(generate(address, request, DEADLINE_S, access))

    async def over_http() -> None:
        assert access.tls is not None
        while not stop.is_set():
            context = peer_context(access.tls, server=False)
            async with httpx.AsyncClient(base_url=fleet.http_url, verify=context, trust_env=False) as http:
                (await http.post("/v1/completions", json=TEXT, timeout=DEADLINE_S)).raise_for_status()

    async def one(messages: AsyncIterable[gateway_pb2.GenerateResponse]) -> None:
        nonlocal answers
        assert "".join([message.text async for message in messages]) == expected
        answers += 1

    async def more(number: int) -> None:
        wanted = answers + number
        await eventually(lambda: answers >= wanted)

    async with asyncio.TaskGroup() as tasks:
        for load in (standing, standing, new, over_http):
            tasks.create_task(load())
        for _ in range(2):
            await more(15)
            certs.renew(authority.folder, days=1)
        await more(15)
        stop.set()


async def probe(address: str, *tls: Path) -> int:
    """The exit status of the health check that containers run."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "hexgen2.rpc.health", address, *map(str, tls))
    )
    async with asyncio.timeout(DEADLINE_S):
        return await process.wait()
