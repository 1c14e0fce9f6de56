"""The decode worker process: ``python -m services.decode --config worker.yaml``."""

from hexgen2.cli.options import run_service
from hexgen2.config import WorkerConfig
from hexgen2.engine.base import Engine
from hexgen2.kv.ranks import Ranks
from hexgen2.rpc.fetch_kv import KvClient
from hexgen2.rpc.server import GrpcServer
from hexgen2.tls import load_tls
from hexgen2.v1 import decode_pb2_grpc
from hexgen2.worker.aio import Gate, PageQueue
from hexgen2.worker.decode import DecodeWorker
from hexgen2.worker.process import run_worker
from services.decode.service import DecodeService


async def serve(config: WorkerConfig) -> None:
    """Serve until a signal."""
    gate = Gate()
    service = DecodeService(gate)
    tls = load_tls(config.tls)
    client = KvClient(tls)

    def register(server: GrpcServer) -> None:
        server.add(decode_pb2_grpc.add_DecodeServicer_to_server, service, "hexgen2.v1.Decode")

    async def attach(engine: Engine, ranks: Ranks, memory: PageQueue) -> None:
        service.attach(DecodeWorker(engine, ranks, memory, client.fetch), engine.max_model_len, engine.model.vocab_size)

    try:
        await run_worker(config, gate, register, attach, tls)
    finally:
        await client.close()


def main() -> None:
    """Entry point."""
    run_service("decode", WorkerConfig, serve)


if __name__ == "__main__":
    main()
