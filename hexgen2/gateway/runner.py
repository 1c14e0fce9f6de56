"""Follows a request to its end: opens the calls, performs what ``life`` says, and tries again as ``progress`` says."""

import asyncio
import secrets
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from time import monotonic

import grpc
import structlog
from opentelemetry import trace

from hexgen2 import metrics
from hexgen2.engine.base import FinishReason, SampledToken
from hexgen2.errors import HexgenError, Overloaded, StaleEpoch
from hexgen2.gateway.calls import Call, Calls
from hexgen2.gateway.dispatch import Dispatch, Targets
from hexgen2.gateway.job import Job, KvMoved
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
)
from hexgen2.gateway.peers import Peers
from hexgen2.gateway.progress import Progress
from hexgen2.plan import Replica
from hexgen2.rpc.client import trace_metadata
from hexgen2.rpc.convert import sampling_to_proto
from hexgen2.v1 import decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc, types_pb2

#: Gives tokens to the client; returns whether the answer is complete.
Give = Callable[[tuple[SampledToken, ...], FinishReason | None], Awaitable[bool]]

#: How long a request that a worker has refused for its old plan waits for a newer one.
NEWER_PLAN_S = 1.0

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Served:
    """Where the last attempt was served, what KV it moved, and how much of the client's prompt was cached."""

    targets: Targets
    kv: KvMoved | None
    cached_tokens: int


async def follow(job: Job, dispatch: Dispatch, peers: Peers, give: Give, deadline: float) -> Served:
    """Serve the job until ``give`` says that the answer is complete. ``deadline`` is by ``time.monotonic``.

    Raises:
        HexgenError: what the client is to be told. Every call is over by then.
    """
    progress = Progress(job)
    cached_tokens: int | None = None

    async def give_on(tokens: tuple[SampledToken, ...], finish_reason: FinishReason | None) -> bool:
        progress.give(tokens)
        return await give(tokens, finish_reason)

    targets = dispatch.first(job.sampling, len(job.prompt_token_ids))
    while True:
        attempt = Attempt(progress.job, progress.number, targets, dispatch, peers, deadline)
        with dispatch.counted(targets):
            failure = await attempt.run(give_on)
        if cached_tokens is None and (failure is None or progress.begun):
            # Of a continuation's prompt the client knows nothing.
            cached_tokens = attempt.life.cached_tokens
        if failure is None or (progress.complete and await give((), progress.complete)):
            return Served(attempt.targets, attempt.life.kv, cached_tokens or 0)
        if (told := progress.after(failure)) is not None:
            raise told
        assert isinstance(failure, TryAgain), "nothing else leads to another attempt"
        error = failure.error
        log.warning("attempt_failed", attempt=progress.number - 1, way=targets.way, reason=str(error))
        if progress.begun:
            _tell_continued(progress)
        try:
            targets = await _next(progress, dispatch, attempt, failure, deadline)
        except HexgenError as nowhere:
            raise progress.told(nowhere) from None


async def _next(
    progress: Progress, dispatch: Dispatch, attempt: "Attempt", failure: TryAgain, deadline: float
) -> Targets:
    """Where the next attempt goes; HexgenError when there is nowhere."""
    job, error = progress.job, failure.error
    left_s = max(0.0, deadline - monotonic())
    if isinstance(error, StaleEpoch):
        # The worker heard of the new plan before we did.
        await dispatch.newer_plan(attempt.targets.plan_epoch, min(NEWER_PLAN_S, left_s))
    elif isinstance(error, Overloaded) and progress.begun:
        # Half an answer is worth waiting for room.
        await asyncio.sleep(min(error.retry_after_s, left_s))
        return dispatch.first(job.sampling, len(job.prompt_token_ids))
    kv_was_there = attempt.life.kv is not None
    return dispatch.again(job.sampling, attempt.targets, failure, len(job.prompt_token_ids), kv_was_there)


def _tell_continued(progress: Progress) -> None:
    num_tokens = progress.num_given
    metrics.REQUEST_CONTINUATIONS.inc()
    log.info("continued", attempt=progress.number, output_tokens=num_tokens)
    trace.get_current_span().add_event("continued", {"hexgen2.output_tokens": num_tokens})


class Attempt:
    """One try over one route. ``targets`` is where it goes; its decode may change."""

    def __init__(
        self, job: Job, number: int, targets: Targets, dispatch: Dispatch, peers: Peers, deadline: float
    ) -> None:
        self.targets = targets
        self.life = Life(targets.way)
        self._job = job
        # A worker may still be ending the attempt before.
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
            if (prefill := self.targets.prefill) is not None:
                calls.open(Side.PREFILL, prefill.address, self._start_prefill)
            if (decode := self.targets.decode) is not None:
                calls.open(Side.DECODE, decode.address, self._start_decode)
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
        failed = self.targets.decode
        assert failed is not None
        self._failed_decodes |= {failed.replica_id}
        other = self._dispatch.other_decode(self.targets, failed, error, self._failed_decodes)
        if other is None:
            return self.life.on(NoDecodeLeft(error))
        log.warning("decode_moved", failed=failed.replica_id, to=other.replica_id, reason=str(error))
        await calls.close(Side.DECODE)
        self.targets = replace(self.targets, decode=other)
        self._tell_route()
        calls.open(Side.DECODE, other.address, self._start_decode)
        return ()

    def _tell_route(self) -> None:
        ends = (self.targets.prefill, self.targets.decode)
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
            remote_kv=_remote_kv(self._transfer, self.targets.prefill),
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
