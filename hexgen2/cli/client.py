"""Calls to a gateway and a coordinator from the command line, with errors that a person can act on."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import grpc

from hexgen2.errors import HexgenError, Unavailable
from hexgen2.rpc.client import channel, to_error
from hexgen2.security.tls import TlsFiles
from hexgen2.v1 import coordinator_pb2, coordinator_pb2_grpc, gateway_pb2, gateway_pb2_grpc

#: In what gRPC says of a handshake that failed, on either side.
_TLS_TROUBLE = ("socket closed", "handshake", "ssl", "peer name", "connection reset")


@dataclass(frozen=True, slots=True)
class Access:
    """What a client shows: the certificates of TLS and an API key, where the fleet asks for them."""

    tls: TlsFiles | None = None
    api_key: str = field(default="", repr=False)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Of each call to a gateway."""
        return (("authorization", f"Bearer {self.api_key}"),) if self.api_key else ()


#: To a fleet that asks for nothing.
ANONYMOUS = Access()


async def generate(
    address: str, request: gateway_pb2.GenerateRequest, timeout_s: float, access: Access = ANONYMOUS
) -> AsyncIterator[gateway_pb2.GenerateResponse]:
    """The messages of one answer. Raises HexgenError."""
    async with channel(address, access.tls) as peer:
        stub: gateway_pb2_grpc.GatewayAsyncStub = gateway_pb2_grpc.GatewayStub(peer)
        try:
            async for message in stub.Generate(request, timeout=timeout_s, metadata=access.metadata):
                yield message
        except grpc.aio.AioRpcError as error:
            raise _explain(error, address) from error


async def get_plan(address: str, timeout_s: float, access: Access = ANONYMOUS) -> coordinator_pb2.GetPlanResponse:
    """The plan and the state of every replica. Raises HexgenError."""
    async with channel(address, access.tls) as peer:
        stub: coordinator_pb2_grpc.CoordinatorAsyncStub = coordinator_pb2_grpc.CoordinatorStub(peer)
        try:
            return await stub.GetPlan(coordinator_pb2.GetPlanRequest(), timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise _explain(error, address) from error


async def apply_plan(address: str, plan_json: str, timeout_s: float, access: Access = ANONYMOUS) -> int:
    """Give the coordinator another plan; its epoch. Raises HexgenError."""
    async with channel(address, access.tls) as peer:
        stub: coordinator_pb2_grpc.CoordinatorAsyncStub = coordinator_pb2_grpc.CoordinatorStub(peer)
        try:
            answer = await stub.ApplyPlan(coordinator_pb2.ApplyPlanRequest(plan_json=plan_json), timeout=timeout_s)
            return answer.plan_epoch
        except grpc.aio.AioRpcError as error:
            raise _explain(error, address) from error


async def preempt(address: str, replica_id: str, grace_s: float, timeout_s: float, access: Access = ANONYMOUS) -> None:
    """Tell the coordinator that a replica's machine goes. Raises HexgenError."""
    async with channel(address, access.tls) as peer:
        stub: coordinator_pb2_grpc.CoordinatorAsyncStub = coordinator_pb2_grpc.CoordinatorStub(peer)
        try:
            request = coordinator_pb2.PreemptRequest(replica_id=replica_id, grace_s=grace_s)
            await stub.Preempt(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise _explain(error, address) from error


def _explain(error: grpc.aio.AioRpcError, address: str) -> HexgenError:
    details = error.details() or ""
    if error.code() == grpc.StatusCode.UNAVAILABLE and "failed to connect" in details.lower():
        if any(each in details.lower() for each in _TLS_TROUBLE):
            return Unavailable(
                f"{address} is there, but there is no connection: does only one side speak TLS (--tls), or is a "
                f"certificate expired, of another authority, or for another host? {details.rpartition(': ')[2][:200]}"
            )
        return Unavailable(f"nobody answers at {address}: is `hexgen2 up` running?")
    return to_error(error)
