"""Ranks on other machines: their connections are carried to the worker, and a node lives as long as its worker."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from pydantic import ValidationError

from hexgen2 import metrics
from hexgen2.config import NodeConfig, VllmEngineConfig, WorkerConfig
from hexgen2.engine.emulated import EmulatedEngine
from hexgen2.engine.vllm_args import engine_args
from hexgen2.errors import EngineFailed
from hexgen2.security.tls import TlsFiles
from hexgen2.worker import node
from hexgen2.worker import relay as relays
from hexgen2.worker.loading import loading
from hexgen2.worker.relay import LIFE, RANK, Relay, carrying, dial
from tests.certificates import Authority
from tests.eventually import eventually

LIMIT_S = 60.0


@asynccontextmanager
async def echoing(path: Path) -> AsyncIterator[None]:
    """A service that says everything back, in capitals."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data.upper())
        writer.close()

    server = await asyncio.start_unix_server(serve, str(path))
    try:
        yield
    finally:
        server.close()


@asynccontextmanager
async def relaying(folder: Path, tls: TlsFiles | None) -> AsyncIterator[Relay]:
    async with echoing(folder / "service.sock"):
        relay = Relay("127.0.0.1:0", folder / "service.sock", tls)
        await relay.start()
        try:
            yield relay
        finally:
            await relay.stop()


@pytest.mark.parametrize("over_tls", [False, True])
async def test_a_rank_elsewhere_talks_to_the_service_as_if_it_were_here(
    tmp_path: Path, authority: Authority, over_tls: bool
) -> None:
    tls = authority.files("worker") if over_tls else None
    async with (
        asyncio.timeout(LIMIT_S),
        relaying(tmp_path, tls) as relay,
        carrying(tmp_path / "rank.sock", f"127.0.0.1:{relay.port}", tls),
    ):
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "rank.sock"))
        for size in (1, 1 << 20):
            writer.write(b"a" * size)
            assert await reader.readexactly(size) == b"A" * size
        # The service's end is the rank's.
        await relay.stop()
        assert await reader.read() == b""
        writer.close()


async def greet(relay: Relay, files: TlsFiles | None) -> bytes:
    reader, writer = await dial(f"127.0.0.1:{relay.port}", RANK, files)
    try:
        writer.write(b"hello")
        return await reader.readexactly(5)
    finally:
        writer.close()


@pytest.mark.parametrize("who", ["stranger", "gateway", "plain"])
async def test_who_is_no_worker_reaches_nothing(
    tmp_path: Path, authority: Authority, stranger: Authority, who: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if who == "stranger":
        # It does not trust us either, and leaves without a word: it counts when its time is over.
        monkeypatch.setattr(relays, "GREETING_S", 1.0)
    files = {"stranger": stranger.files("worker"), "gateway": authority.files("gateway"), "plain": None}[who]
    failed = metrics.TLS_HANDSHAKES_FAILED.labels("nodes")._value
    before = failed.get()
    async with asyncio.timeout(LIMIT_S), relaying(tmp_path, authority.files("worker")) as relay:
        with pytest.raises((OSError, asyncio.IncompleteReadError)):
            await greet(relay, files)
        # A gateway's certificate is one of the fleet's; it is its role that is refused.
        await eventually(lambda: failed.get() == before + (who != "gateway"))


async def test_a_worker_starts_when_all_machines_are_there_and_ends_its_start_when_one_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starting = asyncio.Event()

    async def start(_: EmulatedEngine) -> None:
        starting.set()
        # As vLLM, which would wait for its ranks elsewhere.
        await asyncio.sleep(LIMIT_S)

    monkeypatch.setattr(EmulatedEngine, "start", start)
    config = WorkerConfig.model_validate({"role": "decode", "engine": {"kind": "emulated"}, "kv": {"transport": "tcp"}})
    async with asyncio.timeout(LIMIT_S), loading(config) as loaded:
        relay = loaded.relay = Relay("127.0.0.1:0", loaded.ranks.socket_path, None, num_nodes=2)
        await relay.start()
        address = f"127.0.0.1:{relay.port}"
        loading_all = asyncio.ensure_future(loaded.start())
        _, first = await dial(address, LIFE, None)
        # One connection of a node's ranks is no further machine.
        _, rank = await dial(address, RANK, None)
        await asyncio.wait((asyncio.ensure_future(starting.wait()),), timeout=0.2)
        assert not starting.is_set()
        _, second = await dial(address, LIFE, None)
        await starting.wait()
        first.close()
        with pytest.raises(EngineFailed, match="another machine of this replica was lost"):
            await loading_all
        for writer in (rank, second):
            writer.close()
        await relay.stop()


@pytest.mark.parametrize(("nnodes", "listen"), [(2, ""), (1, "127.0.0.1:0")])
def test_a_worker_waits_for_nodes_where_and_only_where_it_has_some(tmp_path: Path, nnodes: int, listen: str) -> None:
    engine = VllmEngineConfig(model=tmp_path, nnodes=nnodes)
    with pytest.raises(ValidationError, match=f"needed with engine.nnodes: {nnodes}"):
        WorkerConfig(role="decode", engine=engine, nodes_listen=listen)


async def test_a_node_ends_when_its_worker_does_so_that_it_is_started_again(
    tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Ranks that take long to load; what they are told is where the worker is reached.
    started = tmp_path / "started"
    monkeypatch.setattr(node, "RANKS", ("sh", "-c", f'cat "$0" > {started}; test -S "$1" && exec sleep {LIMIT_S}'))
    async with asyncio.timeout(LIMIT_S), relaying(tmp_path, authority.files("worker")) as relay:
        config = NodeConfig(
            leader=f"127.0.0.1:{relay.port}",
            engine=VllmEngineConfig(model=tmp_path, nnodes=2, node_rank=1),
            tls=authority.config("worker"),
        )
        serving = asyncio.ensure_future(node.serve(config))
        while not started.exists() or not started.read_text().endswith("}"):
            assert not serving.done(), serving.result()
            await asyncio.sleep(0.01)
        assert NodeConfig.model_validate_json(started.read_text()) == config
        await relay.stop()
        with pytest.raises(EngineFailed, match=r"the worker at 127\.0\.0\.1:\d+ is gone"):
            await serving


def test_vllm_is_told_of_machines_only_where_there_are_several(tmp_path: Path) -> None:
    one = VllmEngineConfig(model=tmp_path)
    two = VllmEngineConfig(
        model=tmp_path, pipeline_parallel_size=2, nnodes=2, node_rank=1, master_addr="10.0.0.1", master_port=29500
    )
    kv = NodeConfig.model_fields["kv"].default
    told = [engine_args(each, kv, "flexible", tmp_path / "s", cpu=False) for each in (one, two)]
    assert "nnodes" not in told[0]
    assert {name: told[1][name] for name in ("nnodes", "node_rank", "master_addr", "master_port")} == {
        "nnodes": 2,
        "node_rank": 1,
        "master_addr": "10.0.0.1",
        "master_port": 29500,
    }
    assert told[1]["distributed_executor_backend"] == "mp"
