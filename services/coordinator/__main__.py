"""The coordinator process: ``python -m services.coordinator --config coordinator.yaml``."""

import asyncio
import time
from contextlib import AsyncExitStack

import structlog

from hexgen2 import metrics, telemetry
from hexgen2.cli.options import run_service
from hexgen2.config import CoordinatorConfig
from hexgen2.fleet_state import FleetState
from hexgen2.rpc.server import GrpcServer, run_until_signal
from hexgen2.tls import load_tls
from hexgen2.v1 import coordinator_pb2_grpc
from services.coordinator.service import SERVICE, UNTRACED, CoordinatorService

log = structlog.get_logger(__name__)


async def serve(config: CoordinatorConfig) -> None:
    """Serve until a signal.

    Raises:
        ConfigError: an address cannot be bound.
    """
    async with AsyncExitStack() as stack:
        stack.callback(telemetry.setup("coordinator"))
        metrics_address = stack.enter_context(metrics.metrics_served(config.metrics_listen))
        # Milliseconds: a new coordinator's epochs are above those of the one before it.
        state = FleetState(time.time_ns() // 1_000_000, config.lost_after_s, codec=config.codec)
        service = CoordinatorService(state, time.monotonic)
        server = GrpcServer(config.listen, untraced=UNTRACED, tls=load_tls(config.tls))
        server.add(coordinator_pb2_grpc.add_CoordinatorServicer_to_server, service, SERVICE)

        # Outside the task group, which would wrap its error.
        address = await server.start()
        stack.push_async_callback(server.stop, 0.0)

        async def start() -> None:
            await server.set_serving(True)
            log.info("ready", address=address, metrics=metrics_address, plan_epoch=state.plan.epoch)

        async def drain() -> None:
            await server.set_serving(False)
            service.close()
            await server.stop(config.drain_s)

        async with asyncio.TaskGroup() as tasks:
            expiry = tasks.create_task(service.run_expiry())
            await run_until_signal(start, drain)
            expiry.cancel()
    log.info("stopped")


def main() -> None:
    """Entry point."""
    run_service("coordinator", CoordinatorConfig, serve)


if __name__ == "__main__":
    main()
