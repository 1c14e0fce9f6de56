"""Ask a gateway over gRPC and print the answer as it comes: ``python examples/grpc_client.py [ADDRESS] [PROMPT]``."""

import asyncio
import sys

import grpc

from hexgen2.v1 import gateway_pb2, gateway_pb2_grpc, types_pb2


async def main(address: str = "127.0.0.1:50051", prompt: str = "What is the capital of France?") -> None:
    """Stream one answer; then who made it, and how fast."""
    async with grpc.aio.insecure_channel(address) as channel:
        gateway: gateway_pb2_grpc.GatewayAsyncStub = gateway_pb2_grpc.GatewayStub(channel)
        request = gateway_pb2.GenerateRequest(
            chat=gateway_pb2.Chat(messages=[gateway_pb2.ChatMessage(role="user", content=prompt)]),
            sampling=types_pb2.SamplingParams(max_tokens=32, temperature=0.0),
        )
        # The deadline is that of every step behind it; leaving the loop early cancels them all.
        async for message in gateway.Generate(request, timeout=60):
            print(message.text, end="", flush=True)
        who = f"{message.timing.prefill_replica_id or 'nobody'} and {message.timing.decode_replica_id}"
        print(f"\n{message.usage.completion_tokens} tokens by {who}, the first after {message.timing.ttft_s:.3f} s")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
