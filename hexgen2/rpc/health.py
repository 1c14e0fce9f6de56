"""``python -m hexgen2.rpc.health HOST:PORT``: whether a service serves, as its exit status.

Imports gRPC and nothing else: containers run it every few seconds.
"""

import sys
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

TIMEOUT_S = 3.0


def is_serving(channel: grpc.Channel) -> bool:
    """Whether the server at the other end says that it serves; False when it does not answer in time."""
    # Its published types leave its methods out.
    stub: Any = health_pb2_grpc.HealthStub(channel)
    try:
        answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
    except grpc.RpcError:
        return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def main() -> None:
    """Entry point: status 0 when it serves, 1 when it does not, 2 when called wrongly."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m hexgen2.rpc.health HOST:PORT")
    with grpc.insecure_channel(sys.argv[1], options=(("grpc.enable_http_proxy", 0),)) as channel:
        sys.exit(0 if is_serving(channel) else 1)


if __name__ == "__main__":
    main()
