"""The gateway process: ``python -m services.gateway --config gateway.yaml``."""

import asyncio
from contextlib import AsyncExitStack, suppress

import structlog

from hexgen2 import telemetry
from hexgen2.cli.options import run_service
from hexgen2.config import GatewayConfig
from hexgen2.gateway.gateway import Gateway
from hexgen2.rpc.report import PlanWatcher, report_gateway
from hexgen2.rpc.server import GrpcServer, run_until_signal
from hexgen2.security.tls import load_tls
from hexgen2.text.tokenizer import TextModel
from hexgen2.v1 import gateway_pb2_grpc
from hexgen2.web.guard import Limits
from hexgen2.web.server import HttpServer
from hexgen2.worker.aio import owned
from services.gateway.grpc_api import GatewayServicer
from services.gateway.http_api import make_app

SERVICE = "hexgen2.v1.Gateway"
#: How soon calls to lost replicas are looked at again.
AGAIN_S = 1.0

log = structlog.get_logger(__name__)


async def serve(config: GatewayConfig) -> None:
    """Serve until a signal.

    Raises:
        ConfigError: an address cannot be bound, or the model folder cannot be used.
    """
    async with AsyncExitStack() as stack:
        stack.callback(telemetry.setup("gateway"))
        text = TextModel.load(config.model)
        tls = load_tls(config.tls)
        watcher = PlanWatcher(config.coordinator, tls=tls)
        gateway = Gateway(config, text, watcher, tls, watcher.in_flight_elsewhere)
        stack.push_async_callback(gateway.close)
        public_tls = tls if config.serve_tls else None
        grpc_server = GrpcServer(
            config.listen,
            tls=public_tls,
            client_certs=config.asks_certificates,
            max_connections=config.max_grpc_connections,
        )
        grpc_server.add(gateway_pb2_grpc.add_GatewayServicer_to_server, GatewayServicer(gateway), SERVICE)
        http_server = HttpServer(
            make_app(gateway),
            config.http_listen,
            public_tls,
            client_certs=config.asks_certificates,
            limits=Limits(config.max_http_connections, config.head_timeout_s, config.unread_timeout_s),
        )

        async def start() -> None:
            address = await grpc_server.start()
            stack.push_async_callback(grpc_server.stop, 0.0)
            stack.push_async_callback(http_server.stop)
            http_address = await http_server.start()
            await stack.enter_async_context(owned(watcher.run()))
            reports = report_gateway(config.coordinator, gateway.load, tls, on_slo=gateway.take_slo)
            await stack.enter_async_context(owned(reports))
            await stack.enter_async_context(owned(_follow(watcher, gateway, grpc_server)))
            log.info(
                "ready",
                address=address,
                http_address=http_address,
                model=gateway.model_name,
                eos_token_ids=text.eos_token_ids,
                sampling_defaults=dict(text.sampling_defaults),
            )

        async def drain() -> None:
            # Health says no from now on, and new requests are told so.
            gateway.draining = True
            await grpc_server.set_serving(False)
            if not await gateway.drain(config.drain_s):
                log.warning("drain_incomplete", running=gateway.num_running, drain_s=config.drain_s)

        await run_until_signal(start, drain)
        gateway.draining = True
    log.info("stopped")


async def _follow(watcher: PlanWatcher, gateway: Gateway, server: GrpcServer) -> None:
    """Tell gRPC's health what the plan means, at each change; runs until cancelled."""
    ready = False
    while True:
        plan, statuses = watcher.plan, watcher.statuses
        if gateway.ready() != ready:
            ready = gateway.ready()
            log.info("serving" if ready else "not_serving", plan_epoch=plan.epoch)
            await server.set_serving(ready)
        again = await gateway.plan_changed()
        if watcher.plan is plan and watcher.statuses is statuses:
            with suppress(TimeoutError):
                async with asyncio.timeout(AGAIN_S if again else None):
                    await watcher.wait_changed()


def main() -> None:
    """Entry point."""
    run_service("gateway", GatewayConfig, serve)


if __name__ == "__main__":
    main()
