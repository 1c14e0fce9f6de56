"""The prefill worker process: ``python -m services.prefill --config worker.yaml``."""

from hexgen2.cli.options import run_service
from hexgen2.config import WorkerConfig
from hexgen2.engine.base import Engine
from hexgen2.kv.ranks import Ranks
from hexgen2.rpc.server import GrpcServer
from hexgen2.tls import load_tls
from hexgen2.v1 import prefill_pb2_grpc
from hexgen2.worker.aio import Gate, PageQueue
from hexgen2.worker.prefill import PrefillWorker
from hexgen2.worker.process import run_worker
from services.prefill.service import PrefillService


async def serve(config: WorkerConfig) -> None:
    """Serve until a signal."""
    gate = Gate()
    tls = load_tls(config.tls)
    service = PrefillService(gate)

    def register(server: GrpcServer) -> None:
        server.add(prefill_pb2_grpc.add_PrefillServicer_to_server, service, "hexgen2.v1.Prefill")

    async def attach(engine: Engine, ranks: Ranks, memory: PageQueue) -> None:
        service.attach(PrefillWorker(engine, ranks, memory), engine.max_model_len, engine.model.vocab_size)

    await run_worker(config, gate, register, attach, tls)


def main() -> None:
    """Entry point."""
    run_service("prefill", WorkerConfig, serve)


if __name__ == "__main__":
    main()
