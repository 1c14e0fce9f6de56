"""The gRPC API."""

import asyncio
from collections.abc import AsyncIterator
from time import monotonic
from typing import Any

import grpc
import structlog

from hexgen2.errors import InvalidRequest
from hexgen2.gateway import jobs, observe
from hexgen2.gateway.gateway import Gateway
from hexgen2.gateway.job import Job, Operation, Piece, Summary
from hexgen2.gateway.keys import max_body_bytes
from hexgen2.rpc.convert import finish_to_proto, token_to_proto
from hexgen2.v1 import gateway_pb2, gateway_pb2_grpc, types_pb2


class GatewayServicer(gateway_pb2_grpc.GatewayServicer):
    """``hexgen2.v1.Gateway``."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def Generate(
        self, request: gateway_pb2.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[gateway_pb2.GenerateResponse]:
        """Stream the answer; the last message has its finish, usage and timing."""
        watch = observe.Stopwatch()
        left_s = context.time_remaining()
        timeout_s = self._gateway.config.request_timeout_s
        deadline = monotonic() + (timeout_s if left_s is None else min(left_s, timeout_s))
        operation = Operation.CHAT if request.HasField("chat") else Operation.TEXT_COMPLETION
        with (
            observe.request_span(operation, {}) as span,
            self._gateway.keys.admitted(_authorization(context)) as key,
            self._gateway.admitted(),
        ):
            observe.describe_key(span, key)
            limit = max_body_bytes(key, self._gateway.config.max_body_bytes)
            if request.ByteSize() > limit:
                raise InvalidRequest("request", f"has {request.ByteSize()} bytes; the limit is {limit}")
            job = await jobs.from_grpc(self._gateway, request)
            structlog.contextvars.bind_contextvars(request_id=job.request_id)
            responses: asyncio.Queue[gateway_pb2.GenerateResponse | None] = asyncio.Queue()
            task = asyncio.create_task(self._generate(job, responses, watch, deadline))
            task.add_done_callback(lambda _: responses.put_nowait(None))
            try:
                while (response := await responses.get()) is not None:
                    yield response
                    responses.task_done()
                await task
            finally:
                task.cancel()
                await asyncio.wait((task,))

    async def _generate(
        self,
        job: Job,
        responses: asyncio.Queue[gateway_pb2.GenerateResponse | None],
        watch: observe.Stopwatch,
        deadline: float,
    ) -> None:
        last: Piece | None = None

        async def emit(piece: Piece) -> None:
            nonlocal last
            if piece.finish_reason is not None:
                last = piece
                return
            responses.put_nowait(_response(job, piece))
            # A client that does not read holds its request back, not the gateway's memory.
            await responses.join()

        summary = await self._gateway.generate(job, emit, watch, deadline)
        if last is not None:
            response = _response(job, last)
            response.MergeFrom(_ending(summary))
            responses.put_nowait(response)


def _authorization(context: grpc.aio.ServicerContext[Any, Any]) -> str | None:
    found = dict(context.invocation_metadata() or ()).get("authorization")
    return found if isinstance(found, str) else None


def _response(job: Job, piece: Piece) -> gateway_pb2.GenerateResponse:
    return gateway_pb2.GenerateResponse(
        request_id=job.request_id,
        text=piece.text,
        tokens=[token_to_proto(token) for token in piece.tokens],
        finish_reason=finish_to_proto(piece.finish_reason),
        stop_text=piece.stop_text,
    )


def _ending(summary: Summary) -> gateway_pb2.GenerateResponse:
    kv = summary.kv
    return gateway_pb2.GenerateResponse(
        usage=gateway_pb2.Usage(
            prompt_tokens=summary.usage.prompt_tokens,
            completion_tokens=summary.usage.completion_tokens,
            cached_tokens=summary.usage.cached_tokens,
        ),
        timing=gateway_pb2.Timing(
            trace_id=summary.trace_id,
            ttft_s=summary.ttft_s,
            tpot_s=summary.tpot_s,
            e2e_s=summary.e2e_s,
            prefill_replica_id=summary.prefill_replica_id,
            decode_replica_id=summary.decode_replica_id,
            kv=None
            if kv is None
            else types_pb2.KvSummary(
                bytes=kv.num_bytes, pieces=kv.pieces, transport=kv.transport, codec=kv.codec, seconds=kv.seconds
            ),
        ),
    )
