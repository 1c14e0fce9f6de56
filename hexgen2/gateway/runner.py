"""Follows a request to its end: opens the calls, performs what ``life`` says, and tries once more where it may."""

import secrets
from collections import deque
from collections.abc import Awaitable, Callable
from time import monotonic

import grpc
import structlog
from opentelemetry import trace

from hexgen2.engine.base import FinishReason, SampledToken
from hexgen2.errors import HexgenError, StaleEpoch
from hexgen2.gateway.calls import Call, Calls
from hexgen2.gateway.dispatch import Dispatch, Targets
from hexgen2.gateway.job import Job
from hexgen2.gateway.life import (
    Action,
    Deliver,
    EndPrefill,
    Fail,
    Life,
    MoveDecode,
    NoDecodeLeft,
    Side,
    TryAgain,
    Way,
    for_client,
)
from hexgen2.gateway.peers import Peers
from hexgen2.plan import Replica
from hexgen2.rpc.client import trace_metadata
from hexgen2.rpc.convert import sampling_to_proto
from hexgen2.v1 import decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc, types_pb2

#: Gives tokens to the client; returns whether the answer is complete.
Give = Callable[[tuple[SampledToken, ...], FinishReason | None], Awaitable[bool]]

#: How long a request that a worker has refused for its old plan waits for a newer one.
NEWER_PLAN_S = 1.0

log = structlog.get_logger(__name__)


async def follow(job: Job, dispatch: Dispatch, peers: Peers, give: Give, deadline: float) -> "Attempt":
    """Serve the job until ``give`` says that the answer is complete. ``deadline`` is by ``time.monotonic``.

    Returns:
        The attempt that did it.

    Raises:
        HexgenError: what the client is to be told. Every call is over by then.
    """
    targets = dispatch.first(job.sampling, len(job.prompt_token_ids))
    for number in (1, 2):
        attempt = Attempt(job, number, targets, dispatch, peers, deadline)
        with dispatch.counted(targets):
            failure = await attempt.run(give)
        if failure is None:
            return attempt
        if isinstance(failure, Fail):
            raise failure.error
        log.warning("attempt_failed", attempt=number, way=targets.way, reason=str(failure.error))
        error = failure.error
        if number == 1:
            if isinstance(error, StaleEpoch):
                # The worker heard of the new plan before we did.
                await dispatch.newer_plan(targets.plan_epoch, min(NEWER_PLAN_S, max(0.0, deadline - monotonic())))
            targets = dispatch.again(job.sampling, targets, failure, len(job.prompt_token_ids))
    raise for_client(error)


class Attempt:
    """One try over one route. ``targets`` is where it goes; decode may change once."""

    def __init__(
        self, job: Job, number: int, targets: Targets, dispatch: Dispatch, peers: Peers, deadline: float
    ) -> None:
        self.targets = targets
        self.life = Life(targets.way)
        self.prefill = targets.prefill
        self.decode = targets.decode
        self._job = job
        # A worker may still be ending the first attempt.
        self._request_id = job.request_id if number == 1 else f"{job.request_id}-{number}"
        self._dispatch = dispatch
        self._peers = peers
        self._deadline = deadline
        # Also when decode changes: what has been written to the send buffer stays as it is.
        self._transfer = types_pb2.Transfer(
            transfer_id=secrets.token_hex(8), token=secrets.token_bytes(32), codec=targets.codec
        )
        self._failed_decodes: frozenset[str] = frozenset()

    async def run(self, give: Give) -> TryAgain | Fail | None:
        """None when the answer is complete."""
        self._tell_route()
        async with Calls(self._peers) as calls:
            if self.prefill is not None:
                calls.open(Side.PREFILL, self.prefill.address, self._start_prefill)
            if self.decode is not None:
                calls.open(Side.DECODE, self.decode.address, self._start_decode)
            actions: deque[Action] = deque()
            while True:
                while not actions:
                    actions.extend(self.life.on(await calls.events.get()))
                match actions.popleft():
                    case Deliver(tokens, finish_reason):
                        if await give(tokens, finish_reason):
                            return None
                    case EndPrefill():
                        await calls.close(Side.PREFILL)
                    case MoveDecode(error):
                        actions.extend(await self._move_decode(calls, error))
                    case TryAgain() | Fail() as over:
                        return over

    async def _move_decode(self, calls: Calls, error: HexgenError) -> tuple[Action, ...]:
        assert self.decode is not None
        self._failed_decodes |= {self.decode.replica_id}
        other = self._dispatch.other_decode(self.targets, self.decode, error, self._failed_decodes)
        if other is None:
            return self.life.on(NoDecodeLeft(error))
        log.warning("decode_moved", failed=self.decode.replica_id, to=other.replica_id, reason=str(error))
        await calls.close(Side.DECODE)
        self.decode = other
        self._tell_route()
        calls.open(Side.DECODE, other.address, self._start_decode)
        return ()

    def _tell_route(self) -> None:
        ends = (self.prefill, self.decode)
        route = ">".join(each.replica_id for each in ends if each is not None)
        trace.get_current_span().set_attributes({"hexgen2.route": route, "hexgen2.way": self.targets.way})

    def _start_prefill(self, channel: grpc.aio.Channel) -> Call:
        request = prefill_pb2.PrefillRequest(
            request_id=self._request_id,
            transfer=self._transfer,
            prompt_token_ids=self._job.prompt_token_ids,
            sampling=sampling_to_proto(self._job.sampling),
            plan_epoch=self.targets.plan_epoch,
            hand_over=self.targets.way is Way.HAND_OVER,
        )
        stub = prefill_pb2_grpc.PrefillStub(channel)
        return stub.Prefill(request, timeout=self._time_left_s(), metadata=trace_metadata())

    def _start_decode(self, channel: grpc.aio.Channel) -> Call:
        request = decode_pb2.DecodeRequest(
            request_id=self._request_id,
            prompt_token_ids=self._job.prompt_token_ids,
            sampling=sampling_to_proto(self._job.sampling),
            remote_kv=_remote_kv(self._transfer, self.prefill),
            plan_epoch=self.targets.plan_epoch,
        )
        stub = decode_pb2_grpc.DecodeStub(channel)
        return stub.Decode(request, timeout=self._time_left_s(), metadata=trace_metadata())

    def _time_left_s(self) -> float:
        return max(0.0, self._deadline - monotonic())


def _remote_kv(transfer: types_pb2.Transfer, prefill: Replica | None) -> decode_pb2.RemoteKv | None:
    if prefill is None:
        return None
    return decode_pb2.RemoteKv(transfer=transfer, prefill_address=prefill.address)
