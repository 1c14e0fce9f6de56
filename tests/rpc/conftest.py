"""A real server on a port of its own, with one service whose behaviour each test sets."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
import pytest

from hexgen2.rpc.client import channel
from hexgen2.rpc.server import GrpcServer
from hexgen2.v1 import coordinator_pb2, coordinator_pb2_grpc
from tests.spans import spans

__all__ = ["spans"]


class Service(coordinator_pb2_grpc.CoordinatorServicer):
    """``GetPlan`` is the unary call, ``WatchPlan`` the stream."""

    unary: Callable[[Any], Awaitable[coordinator_pb2.GetPlanResponse]]
    stream: Callable[[Any], AsyncIterator[coordinator_pb2.WatchPlanResponse]]

    async def Report(self, request: Any, context: Any) -> coordinator_pb2.ReportResponse:
        return coordinator_pb2.ReportResponse()

    async def ReportGateway(self, request: Any, context: Any) -> coordinator_pb2.ReportGatewayResponse:
        return coordinator_pb2.ReportGatewayResponse()

    async def ApplyPlan(self, request: Any, context: Any) -> coordinator_pb2.ApplyPlanResponse:
        return coordinator_pb2.ApplyPlanResponse()

    async def Preempt(self, request: Any, context: Any) -> coordinator_pb2.PreemptResponse:
        return coordinator_pb2.PreemptResponse()

    async def GetPlan(self, request: Any, context: Any) -> coordinator_pb2.GetPlanResponse:
        return await self.unary(context)

    async def WatchPlan(self, request: Any, context: Any) -> AsyncIterator[coordinator_pb2.WatchPlanResponse]:
        async with aclosing(self.stream(context)) as responses:  # type: ignore[type-var]
            async for response in responses:
                yield response


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
async def server(service: Service) -> AsyncIterator[GrpcServer]:
    server = GrpcServer("127.0.0.1:0")
    server.add(coordinator_pb2_grpc.add_CoordinatorServicer_to_server, service, "hexgen2.v1.Coordinator")
    yield server
    await server.stop(0)


@pytest.fixture
async def address(server: GrpcServer) -> str:
    address = await server.start()
    await server.set_serving(True)
    return address


@pytest.fixture
async def peer(address: str) -> AsyncIterator[grpc.aio.Channel]:
    async with channel(address) as peer:
        yield peer


@pytest.fixture
def stub(peer: grpc.aio.Channel) -> "coordinator_pb2_grpc.CoordinatorAsyncStub":
    return coordinator_pb2_grpc.CoordinatorStub(peer)
