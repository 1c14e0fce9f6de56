"""``hexgen2.v1.Prefill``: gRPC to and from ``hexgen2.worker.prefill``."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc

from hexgen2.errors import InvalidRequest, Unavailable
from hexgen2.kv.handoff import FetchMessage, FirstToken, Offer
from hexgen2.rpc.client import trace_metadata
from hexgen2.rpc.convert import codec_from_proto, sampling_from_proto
from hexgen2.rpc.kv_convert import first_token_to_proto, offer_to_proto, pieces_to_proto
from hexgen2.v1 import prefill_pb2, prefill_pb2_grpc, types_pb2
from hexgen2.worker.aio import Gate, now
from hexgen2.worker.limits import call_timeout_s, check_prompt, check_transfer
from hexgen2.worker.prefill import Admitted, PrefillJob, PrefillWorker

_Context = grpc.aio.ServicerContext[Any, Any]


class PrefillService(prefill_pb2_grpc.PrefillServicer):
    """Thin: checks, translates, delegates. FetchKv stays open to peers while the gate closes: running work needs it."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._worker: PrefillWorker | None = None

    def attach(self, worker: PrefillWorker, max_model_len: int, vocab_size: int) -> None:
        """The engine is up; the gate opens next."""
        self._worker = worker
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size

    async def Prefill(
        self, request: prefill_pb2.PrefillRequest, context: _Context
    ) -> AsyncIterator[prefill_pb2.PrefillResponse]:
        """See the proto."""
        async with self._gate.enter(request.plan_epoch):
            worker = self._attached()
            if not request.request_id:
                raise InvalidRequest("request_id", "is empty")
            if request.hand_over:
                check_transfer(request.transfer)
            job = PrefillJob(
                request_id=request.request_id,
                transfer_id=request.transfer.transfer_id,
                token=request.transfer.token,
                prompt_token_ids=check_prompt(request.prompt_token_ids, self._max_model_len, self._vocab_size),
                sampling=sampling_from_proto(request.sampling),
                hand_over=request.hand_over,
                codec=codec_from_proto(request.transfer.codec, "transfer.codec"),
                trace_headers=trace_metadata(),
                deadline=now() + call_timeout_s(context.time_remaining()),
            )
            if job.sampling.needs_history:
                raise InvalidRequest("sampling", "penalties and json_schema are served colocated, not handed over")
            async with aclosing(worker.run(job)) as events:
                async for event in events:
                    match event:
                        case Admitted():
                            yield prefill_pb2.PrefillResponse(admitted=prefill_pb2.Admitted(queue_s=event.queue_s))
                        case FirstToken():
                            yield prefill_pb2.PrefillResponse(first_token=first_token_to_proto(event))

    async def FetchKv(
        self, request: prefill_pb2.FetchKvRequest, context: _Context
    ) -> AsyncIterator[prefill_pb2.FetchKvResponse]:
        """See the proto."""
        check_transfer(types_pb2.Transfer(transfer_id=request.transfer_id, token=request.token))
        async with aclosing(
            self._attached().fetch(request.transfer_id, request.token, resume=request.resume)
        ) as messages:
            async for message in messages:
                yield _fetch_response(message)

    def _attached(self) -> PrefillWorker:
        if self._worker is None:
            raise Unavailable("this replica is starting; try another or later")
        return self._worker


def _fetch_response(message: FetchMessage) -> prefill_pb2.FetchKvResponse:
    match message:
        case Offer():
            return prefill_pb2.FetchKvResponse(header=offer_to_proto(message))
        case FirstToken():
            return prefill_pb2.FetchKvResponse(first_token=first_token_to_proto(message))
        case pieces:
            return prefill_pb2.FetchKvResponse(pieces=pieces_to_proto(pieces))
