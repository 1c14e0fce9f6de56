"""A gateway for workers that serve both phases at once: each hands over to every other, both ways, all the time.

Plans give a worker one role at a time; here each flexible worker counts for one of either role. Everything else is the
gateway's own. ``python -m benchmarks.chaos.cross --config gateway.yaml``.
"""

import asyncio
from collections.abc import Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import replace

from hexgen2 import telemetry
from hexgen2.cli.options import run_service
from hexgen2.config import GatewayConfig
from hexgen2.gateway.gateway import Gateway
from hexgen2.plan import Plan, Replica, ReplicaStatus, Role, Route
from hexgen2.rpc.report import PlanWatcher
from hexgen2.rpc.server import GrpcServer, run_until_signal
from hexgen2.text.tokenizer import TextModel
from hexgen2.v1 import gateway_pb2_grpc
from hexgen2.web.server import HttpServer
from hexgen2.worker.aio import owned
from services.gateway.grpc_api import GatewayServicer
from services.gateway.http_api import make_app

#: How often it is looked whether a worker was lost.
LOOK_S = 1.0


class CrossPlans:
    """The plan and states of a watcher, every flexible replica as two."""

    def __init__(self, watcher: PlanWatcher) -> None:
        self._watcher = watcher

    @property
    def plan(self) -> Plan:
        """See the class. No epoch: workers refuse calls by plans that gave them another role."""
        sides = {
            role: [_side(each, role) for each in self._watcher.plan.replicas] for role in (Role.PREFILL, Role.DECODE)
        }
        routes = tuple(
            Route(prefill.replica_id, decode.replica_id, 1.0)
            for prefill in sides[Role.PREFILL]
            for decode in sides[Role.DECODE]
            if prefill.address != decode.address
        )
        return Plan(0, (*sides[Role.PREFILL], *sides[Role.DECODE]), routes)

    @property
    def statuses(self) -> Mapping[str, ReplicaStatus]:
        """By the ids of the plan."""
        return {
            f"{key}-{role}": replace(status, replica_id=f"{key}-{role}")
            for key, status in self._watcher.statuses.items()
            for role in (Role.PREFILL, Role.DECODE)
        }

    async def wait_changed(self) -> None:
        """Return at the next change of the plan or of a status."""
        await self._watcher.wait_changed()


def _side(replica: Replica, role: Role) -> Replica:
    return replace(replica, replica_id=f"{replica.replica_id}-{role}", role=role)


async def serve(config: GatewayConfig) -> None:
    """Serve until a signal."""
    async with AsyncExitStack() as stack:
        stack.callback(telemetry.setup("gateway"))
        watcher = PlanWatcher(config.coordinator)
        gateway = Gateway(config, TextModel.load(config.model), CrossPlans(watcher))
        stack.push_async_callback(gateway.close)
        grpc_server = GrpcServer(config.listen)
        grpc_server.add(gateway_pb2_grpc.add_GatewayServicer_to_server, GatewayServicer(gateway), "hexgen2.v1.Gateway")
        http_server = HttpServer(make_app(gateway), config.http_listen)

        async def follow() -> None:
            while True:
                await gateway.plan_changed()
                with suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_S):
                        await watcher.wait_changed()

        async def start() -> None:
            await grpc_server.start()
            stack.push_async_callback(grpc_server.stop, 0.0)
            await http_server.start()
            stack.push_async_callback(http_server.stop)
            await stack.enter_async_context(owned(watcher.run()))
            await stack.enter_async_context(owned(follow()))
            await grpc_server.set_serving(True)

        async def drain() -> None:
            await gateway.drain(config.drain_s)

        await run_until_signal(start, drain)


if __name__ == "__main__":
    run_service("gateway", GatewayConfig, serve)
