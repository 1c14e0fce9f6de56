"""A coordinator within the test, over a real socket, and workers that report to it."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import hexgen2
from hexgen2.coordinator.assignment import Assignment
from hexgen2.coordinator.state import FleetState
from hexgen2.plan import Replica, Role
from hexgen2.rpc.client import channel
from hexgen2.rpc.server import GrpcServer
from hexgen2.v1 import coordinator_pb2_grpc
from services.coordinator.service import SERVICE, UNTRACED, CoordinatorService


def replica(replica_id: str, **changes: Any) -> Replica:
    """A prefill replica if its id begins with p, else a decode replica."""
    role = Role.PREFILL if replica_id.startswith("p") else Role.DECODE
    port = 1000 + sum(map(ord, replica_id))
    made = Replica(replica_id, role, f"127.0.0.1:{port}", "m", b"m" * 32, "first", 1024, "tcp")
    return replace(made, **({"version": hexgen2.__version__} | changes))


@asynccontextmanager
async def coordinator(
    listen: str = "127.0.0.1:0",
    *,
    epoch: int = 100,
    lost_after_s: float = 60.0,
    load_interval_s: float = 0.0,
    assignment: Assignment | None = None,
) -> AsyncIterator[str]:
    service = CoordinatorService(
        FleetState(epoch, lost_after_s, assignment=assignment), time.monotonic, load_interval_s
    )
    server = GrpcServer(listen, untraced=UNTRACED)
    server.add(coordinator_pb2_grpc.add_CoordinatorServicer_to_server, service, SERVICE)
    expiry = asyncio.create_task(service.run_expiry())
    try:
        yield await server.start()
    finally:
        service.close()
        await server.stop(5)
        expiry.cancel()
        await asyncio.wait([expiry])


@asynccontextmanager
async def connected(address: str) -> AsyncIterator["coordinator_pb2_grpc.CoordinatorAsyncStub"]:
    async with channel(address) as peer:
        yield coordinator_pb2_grpc.CoordinatorStub(peer)


@asynccontextmanager
async def running(*owners: Any) -> AsyncIterator[None]:
    """Their ``run`` beside the test."""
    tasks = [asyncio.create_task(owner.run()) for owner in owners]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, asyncio.CancelledError), result
