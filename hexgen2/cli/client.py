"""Calls to a gateway and a coordinator from the command line, with errors that a person can act on."""

from collections.abc import AsyncIterator

import grpc

from hexgen2.errors import HexgenError, Unavailable
from hexgen2.rpc.client import channel, to_error
from hexgen2.v1 import coordinator_pb2, coordinator_pb2_grpc, gateway_pb2, gateway_pb2_grpc


async def generate(
    address: str, request: gateway_pb2.GenerateRequest, timeout_s: float
) -> AsyncIterator[gateway_pb2.GenerateResponse]:
    """The messages of one answer. Raises HexgenError."""
    async with channel(address) as peer:
        stub: gateway_pb2_grpc.GatewayAsyncStub = gateway_pb2_grpc.GatewayStub(peer)
        try:
            async for message in stub.Generate(request, timeout=timeout_s):
                yield message
        except grpc.aio.AioRpcError as error:
            raise _explain(error, address) from error


async def get_plan(address: str, timeout_s: float) -> coordinator_pb2.GetPlanResponse:
    """The plan and the state of every replica. Raises HexgenError."""
    async with channel(address) as peer:
        stub: coordinator_pb2_grpc.CoordinatorAsyncStub = coordinator_pb2_grpc.CoordinatorStub(peer)
        try:
            return await stub.GetPlan(coordinator_pb2.GetPlanRequest(), timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise _explain(error, address) from error


def _explain(error: grpc.aio.AioRpcError, address: str) -> HexgenError:
    details = error.details() or ""
    if error.code() == grpc.StatusCode.UNAVAILABLE and "failed to connect" in details.lower():
        return Unavailable(f"nobody answers at {address}: is `hexgen2 up` running?")
    return to_error(error)
