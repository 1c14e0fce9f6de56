"""Whether a service serves. ``python -m hexgen2.rpc.health HOST:PORT [TLS_DIR]`` says it as its exit status.

Imports gRPC and nothing else: containers run it every few seconds.
"""

import sys
from pathlib import Path
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


async def serves(channel: grpc.aio.Channel, timeout_s: float) -> bool:
    """Whether the server at the other end says that it serves. Raises AioRpcError when it does not answer in time."""
    stub: Any = health_pb2_grpc.HealthStub(channel)  # type: ignore[arg-type,unused-ignore]
    answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def main() -> None:
    """Entry point: status 0 when it serves, 1 when it does not or its answer cannot be had.

    TLS_DIR has ca.pem, cert.pem and key.pem, as for ``--tls``: a service's own will do, for it may ask itself.
    """
    if not 2 <= len(sys.argv) <= 3:
        sys.exit("usage: python -m hexgen2.rpc.health HOST:PORT [TLS_DIR]")
    with _channel(*sys.argv[1:]) as channel:
        sys.exit(0 if is_serving(channel) else 1)


def _channel(address: str, tls: str = "") -> grpc.Channel:
    options = (("grpc.enable_http_proxy", 0),)
    if not tls:
        return grpc.insecure_channel(address, options=options)
    ca, cert, key = ((Path(tls) / f"{name}.pem").read_bytes() for name in ("ca", "cert", "key"))
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(ca, key, cert), options)


if __name__ == "__main__":
    main()
