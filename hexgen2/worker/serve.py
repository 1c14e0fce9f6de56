"""A worker in the role of its configuration: which gRPC services it has, over one engine and its ranks.

A flexible worker has both: the plan says which phase it is for, and it changes over without loading anything. Requests
of its former role that are under way end as they would have.
"""

from hexgen2.batching import Targets
from hexgen2.config import WorkerConfig
from hexgen2.engine.base import Engine
from hexgen2.kv.ranks import Ranks
from hexgen2.rpc.decode_service import DecodeService
from hexgen2.rpc.fetch_kv import KvClient
from hexgen2.rpc.prefill_service import PrefillService
from hexgen2.rpc.server import GrpcServer
from hexgen2.security.tls import load_tls
from hexgen2.v1 import decode_pb2_grpc, prefill_pb2_grpc
from hexgen2.worker.adapting import Adapting
from hexgen2.worker.aio import Gate, now, owned
from hexgen2.worker.decode import DecodeWorker
from hexgen2.worker.loading import Pools
from hexgen2.worker.meter import Meter
from hexgen2.worker.prefill import PrefillWorker
from hexgen2.worker.process import run_worker
from hexgen2.worker.received import Received


async def serve(config: WorkerConfig) -> None:
    """Serve until a signal."""
    gate = Gate()
    tls = load_tls(config.tls)
    client = KvClient(tls)
    received, meter = Received(), Meter()
    adapting = Adapting(Targets(config.slo_ttft_s, config.slo_tpot_s), meter.pace)
    prefill = PrefillService(gate) if config.role != "decode" else None
    decode = DecodeService(gate) if config.role != "prefill" else None

    def register(server: GrpcServer) -> None:
        if prefill is not None:
            server.add(prefill_pb2_grpc.add_PrefillServicer_to_server, prefill, "hexgen2.v1.Prefill")
        if decode is not None:
            server.add(decode_pb2_grpc.add_DecodeServicer_to_server, decode, "hexgen2.v1.Decode")

    async def attach(engine: Engine, ranks: Ranks, pools: Pools) -> None:
        limits = engine.max_model_len, engine.model.vocab_size
        if prefill is not None:
            prefill.attach(PrefillWorker(engine, ranks, pools.send, meter), *limits)
        if decode is not None:
            decode.attach(DecodeWorker(engine, ranks, pools.staging, client.fetch, received, meter), *limits)
        adapting.follow(engine)

    try:
        async with owned(adapting.run()):
            await run_worker(
                config, gate, register, attach, tls, lambda quarantine: received.told(now(), quarantine), meter.take
            )
    finally:
        await client.close()
