"""``hexgen2.v1.Decode``: gRPC to and from ``hexgen2.worker.decode``."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc

from hexgen2.address import parse_address
from hexgen2.engine.base import EngineOutput
from hexgen2.errors import ConfigError, InvalidRequest
from hexgen2.rpc.client import trace_metadata
from hexgen2.rpc.convert import codec_from_proto, finish_to_proto, sampling_from_proto, token_to_proto
from hexgen2.rpc.kv_convert import summary_to_proto
from hexgen2.v1 import decode_pb2, decode_pb2_grpc
from hexgen2.worker.aio import Gate, now
from hexgen2.worker.decode import DecodeJob, DecodeWorker
from hexgen2.worker.limits import call_timeout_s, check_prompt, check_transfer
from hexgen2.worker.receive import KvSummary, RemoteKv

_Context = grpc.aio.ServicerContext[Any, Any]


class DecodeService(decode_pb2_grpc.DecodeServicer):
    """Thin: checks, translates, delegates."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def attach(self, worker: DecodeWorker, max_model_len: int, vocab_size: int) -> None:
        """The engine is up; the gate opens next."""
        self._worker = worker
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size

    async def Decode(
        self, request: decode_pb2.DecodeRequest, context: _Context
    ) -> AsyncIterator[decode_pb2.DecodeResponse]:
        """See the proto."""
        deadline = now() + call_timeout_s(context.time_remaining())
        async with (
            self._gate.enter(request.plan_epoch),
            aclosing(self._worker.run(self._job(request, deadline))) as events,
        ):
            async for event in events:
                match event:
                    case KvSummary():
                        yield decode_pb2.DecodeResponse(kv_verified=summary_to_proto(event))
                    case EngineOutput():
                        tokens = decode_pb2.Tokens(
                            tokens=[token_to_proto(token) for token in event.tokens],
                            finish_reason=finish_to_proto(event.finish_reason),
                            cached_tokens=event.cached_tokens,
                        )
                        yield decode_pb2.DecodeResponse(tokens=tokens)

    def _job(self, request: decode_pb2.DecodeRequest, deadline: float) -> DecodeJob:
        if not request.request_id:
            raise InvalidRequest("request_id", "is empty")
        sampling = sampling_from_proto(request.sampling)
        remote = None
        if request.HasField("remote_kv"):
            check_transfer(request.remote_kv.transfer)
            try:
                parse_address(request.remote_kv.prefill_address)
            except ConfigError as error:
                raise InvalidRequest("remote_kv.prefill_address", str(error)) from None
            if sampling.needs_history:
                raise InvalidRequest("sampling", "penalties and json_schema are served colocated, not handed over")
            if sampling.max_tokens < 2:
                raise InvalidRequest("sampling.max_tokens", "an answer of one token needs no decode")
            transfer = request.remote_kv.transfer
            remote = RemoteKv(
                transfer.transfer_id,
                transfer.token,
                request.remote_kv.prefill_address,
                codec_from_proto(transfer.codec, "remote_kv.transfer.codec"),
            )
        return DecodeJob(
            request_id=request.request_id,
            prompt_token_ids=check_prompt(request.prompt_token_ids, self._max_model_len, self._vocab_size),
            sampling=sampling,
            remote=remote,
            trace_headers=trace_metadata(),
            deadline=deadline,
        )
