"""Prefill and decode workers with emulated engines, behind real gRPC sockets, as the gateway sees them."""

import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import grpc

from hexgen2.config import EmulatedEngineConfig, KvConfig, WorkerConfig
from hexgen2.engine.base import Sampling
from hexgen2.engine.emulated import EmulatedEngine
from hexgen2.engine.emulated_kv import MASK, kv_values, next_token, prefix_hashes, read_kv
from hexgen2.kv.ranks import Ranks
from hexgen2.plan import Role
from hexgen2.rpc.client import channel
from hexgen2.rpc.convert import sampling_to_proto
from hexgen2.rpc.decode_service import DecodeService
from hexgen2.rpc.fetch_kv import KvClient
from hexgen2.rpc.prefill_service import PrefillService
from hexgen2.rpc.server import GrpcServer
from hexgen2.security.tls import load_tls
from hexgen2.v1 import decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc, types_pb2
from hexgen2.worker.aio import Gate, PageQueue
from hexgen2.worker.decode import DecodeWorker
from hexgen2.worker.loading import loading
from hexgen2.worker.prefill import PrefillWorker
from tests.certificates import Authority
from tests.eventually import eventually

DEADLINE_S = 30.0
CONFIG = EmulatedEngineConfig(prefill_tokens_per_s=1e6, decode_step_base_s=0.0, decode_step_per_request_s=0.0)


def expected_tokens(config: EmulatedEngineConfig, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """What a right fleet answers, by the model's definition alone."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        hashes = prefix_hashes(tokens)
        heads = range(config.num_kv_heads)
        checksum = 0
        for layer in range(config.num_layers):
            kv = kv_values(hashes, layer, heads, config.head_dim)
            checksum += read_kv(kv.view("uint8"), layer, heads, 0)
        tokens.append(next_token(checksum & MASK, len(tokens), config.vocab_size))
    return tokens[len(prompt) :]


class Peer(Protocol):
    """What a caller needs of a worker."""

    @property
    def address(self) -> str: ...

    @property
    def channel(self) -> grpc.aio.Channel: ...


@dataclass
class Worker:
    """One worker and what a test looks at."""

    address: str
    engine: EmulatedEngine
    ranks: Ranks
    memory: PageQueue
    gate: Gate
    channel: grpc.aio.Channel


@asynccontextmanager
async def worker(
    role: Literal["prefill", "decode"],
    config: EmulatedEngineConfig = CONFIG,
    kv: KvConfig | None = None,
    authority: Authority | None = None,
    identity: str = "worker",
) -> AsyncIterator[Worker]:
    """A worker that serves; with an ``authority`` it speaks TLS by its certificate ``identity``."""
    tls = authority.config(identity) if authority else None
    kv = kv or KvConfig(transport="tcp", send_bytes=1 << 20, staging_bytes=1 << 20, landing_bytes=1 << 18)
    async with AsyncExitStack() as stack:
        loaded = await stack.enter_async_context(loading(WorkerConfig(role=role, engine=config, kv=kv, tls=tls)))
        engine, ranks = loaded.engine, loaded.ranks
        assert isinstance(engine, EmulatedEngine)
        memory = (await loaded.start()).of(Role(role))
        gate = Gate()
        server = GrpcServer("127.0.0.1:0", tls=load_tls(tls))
        if role == "prefill":
            prefill = PrefillService(gate)
            prefill.attach(PrefillWorker(engine, ranks, memory), engine.max_model_len, engine.model.vocab_size)
            server.add(prefill_pb2_grpc.add_PrefillServicer_to_server, prefill, "hexgen2.v1.Prefill")
        else:
            client = KvClient(load_tls(tls))
            stack.push_async_callback(client.close)
            decode = DecodeService(gate)
            decode.attach(
                DecodeWorker(engine, ranks, memory, client.fetch), engine.max_model_len, engine.model.vocab_size
            )
            server.add(decode_pb2_grpc.add_DecodeServicer_to_server, decode, "hexgen2.v1.Decode")
        address = await server.start()
        stack.push_async_callback(server.stop, 0.0)
        gate.open()
        peer = channel(address, authority.files("gateway") if authority else None)
        yield Worker(address, engine, ranks, memory, gate, await stack.enter_async_context(_closing(peer)))


@asynccontextmanager
async def _closing(each: grpc.aio.Channel) -> AsyncIterator[grpc.aio.Channel]:
    try:
        yield each
    finally:
        await each.close()


@dataclass
class Handed:
    """What a hand-over came to."""

    tokens: list[int] = field(default_factory=list)
    finish_reason: int = 0
    cached_tokens: int = 0
    kv: types_pb2.KvSummary | None = None


@dataclass
class Pair:
    """A gateway's view of one prefill and one decode worker."""

    prefill: Peer
    decode: Peer

    def transfer(self, codec: str = "") -> types_pb2.Transfer:
        return types_pb2.Transfer(transfer_id=secrets.token_hex(8), token=secrets.token_bytes(32), codec=codec)

    def start_prefill(
        self, transfer: types_pb2.Transfer, prompt: Sequence[int], sampling: Sampling, *, hand_over: bool = True
    ) -> Any:
        return prefill_pb2_grpc.PrefillStub(self.prefill.channel).Prefill(
            prefill_pb2.PrefillRequest(
                request_id=transfer.transfer_id,
                transfer=transfer,
                prompt_token_ids=prompt,
                sampling=sampling_to_proto(sampling),
                hand_over=hand_over,
            ),
            timeout=DEADLINE_S,
        )

    def start_decode(
        self, transfer: types_pb2.Transfer | None, prompt: Sequence[int], sampling: Sampling, *, suffix: str = ""
    ) -> Any:
        remote = transfer and decode_pb2.RemoteKv(transfer=transfer, prefill_address=self.prefill.address)
        return decode_pb2_grpc.DecodeStub(self.decode.channel).Decode(
            decode_pb2.DecodeRequest(
                request_id=(transfer.transfer_id if transfer else secrets.token_hex(8)) + suffix,
                prompt_token_ids=prompt,
                sampling=sampling_to_proto(sampling),
                remote_kv=remote,
            ),
            timeout=DEADLINE_S,
        )

    async def generate(self, prompt: Sequence[int], sampling: Sampling, codec: str = "") -> Handed:
        """One request as the gateway runs it."""
        transfer, handed = self.transfer(codec), Handed()
        prefill = self.start_prefill(transfer, prompt, sampling)
        decode = self.start_decode(transfer, prompt, sampling)
        async for response in prefill:
            if response.HasField("first_token"):
                handed.tokens.append(response.first_token.token.token_id)
                handed.finish_reason = response.first_token.finish_reason
                break
        if handed.finish_reason:
            decode.cancel()
            return handed
        async for response in decode:
            if response.HasField("kv_verified"):
                handed.kv = response.kv_verified.summary
                prefill.cancel()
            else:
                handed.tokens += [token.token_id for token in response.tokens.tokens]
                handed.finish_reason = response.tokens.finish_reason
                handed.cached_tokens = max(handed.cached_tokens, response.tokens.cached_tokens)
        return handed


@dataclass
class WorkerPair(Pair):
    """A pair in this process, whose memory can be looked at."""

    prefill: Worker
    decode: Worker

    async def settled(self) -> None:
        """Wait until no call is running and all memory is free."""
        for each in (self.prefill, self.decode):
            await eventually(
                lambda each=each: (
                    not (  # type: ignore[misc]
                        each.gate.num_inside or each.memory.bytes_used or any(each.engine.num_requests())
                    )
                )
            )


@asynccontextmanager
async def pair(
    prefill: EmulatedEngineConfig = CONFIG,
    decode: EmulatedEngineConfig = CONFIG,
    *,
    prefill_kv: KvConfig | None = None,
    decode_kv: KvConfig | None = None,
    authority: Authority | None = None,
    decode_identity: str = "worker",
) -> AsyncIterator[WorkerPair]:
    """One prefill and one decode worker."""
    async with (
        worker("prefill", prefill, prefill_kv, authority) as p,
        worker("decode", decode, decode_kv, authority, decode_identity) as d,
    ):
        yield WorkerPair(p, d)
