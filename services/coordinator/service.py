"""Takes workers' reports and pushes the plan to gateways. ``hexgen2.coordinator.state`` decides what follows."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from functools import lru_cache
from typing import Any

import structlog
from opentelemetry import trace

from hexgen2 import metrics
from hexgen2.calibration import Sample
from hexgen2.coordinator.assignment import assignment_of
from hexgen2.coordinator.gateway_loads import GatewayLoads
from hexgen2.coordinator.outlook import Outlook
from hexgen2.coordinator.page.view import Fleet
from hexgen2.coordinator.promises import Promises
from hexgen2.coordinator.state import Change, FleetState, Snapshot
from hexgen2.errors import InvalidRequest, ReplicaConflict, ReplicaMismatch, Unavailable
from hexgen2.placement import Placement, from_json, to_json
from hexgen2.plan import PlanChange, ReplicaState, ReplicaStatus
from hexgen2.rpc import plan_convert as convert
from hexgen2.rpc.calibration_convert import calibration_to_proto, samples_from_proto
from hexgen2.rpc.client import traceparent
from hexgen2.v1 import coordinator_pb2 as pb
from hexgen2.v1 import coordinator_pb2_grpc, types_pb2

#: Loads change all the time; watchers hear of them at most this often.
LOAD_INTERVAL_S = 1.0
#: How often a coordinator looks whether it is time to take somebody for lost, at least.
TURN_S = 0.25
#: Looking later than this means that the whole process stood still.
STALL_S = 1.0
#: Ids whose refusal is remembered, so that it is logged once.
MAX_REFUSED = 1000

SERVICE = "hexgen2.v1.Coordinator"
#: One span a second and worker, and one that never ends: neither tells anything.
UNTRACED = frozenset({f"/{SERVICE}/Report", f"/{SERVICE}/WatchPlan"})

Save = Callable[[Snapshot], Awaitable[None]]
Record = Callable[[PlanChange], Awaitable[None]]


@lru_cache(maxsize=2)
def placement_of(plan_json: str) -> Placement | None:
    """The plan.yaml that is in force, read once."""
    return from_json(plan_json) if plan_json else None


log = structlog.get_logger(__name__)


async def not_kept(snapshot: Snapshot) -> None:
    """For a coordinator without a file."""


async def not_recorded(change: PlanChange) -> None:
    """For a coordinator without a file."""


class CoordinatorService(coordinator_pb2_grpc.CoordinatorServicer):
    """See the module. The owner runs ``run_expiry`` beside the server and calls ``close`` when it drains."""

    def __init__(
        self,
        state: FleetState,
        clock: Callable[[], float],
        load_interval_s: float = LOAD_INTERVAL_S,
        *,
        save: Save = not_kept,
        record: Record = not_recorded,
        outlook: Outlook | None = None,
        wall_clock: Callable[[], float] = time.time,
        max_clock_skew_s: float = 30.0,
    ) -> None:
        self._state = state
        # What watchers see: a plan is announced once it is kept, so that its epoch never means two things.
        self._plan = state.plan
        self._save = save
        self._record = record
        self._outlook = outlook or Outlook()
        self._clock = clock
        self._wall_clock = wall_clock
        self._max_clock_skew_s = max_clock_skew_s
        self._load_interval_s = load_interval_s
        self._closed = False
        # How often states or members (0) and loads (1) have changed, and what wakes those who wait for it.
        self._versions = (0, 0)
        self._changed = asyncio.Event()
        self._refused: dict[str, str] = {}
        self._gateways = GatewayLoads()
        #: How far the plan's times are off, for whoever plans anew.
        self.promises = Promises()

    async def Report(self, request: pb.ReportRequest, context: Any) -> pb.ReportResponse:
        """Registration, heartbeat and load of a worker."""
        replica = convert.replica_from_proto(request.replica)
        state = convert.state_from_proto(request.state)
        try:
            self._check_clock(replica.replica_id, request.unix_time_s)
            samples = samples_from_proto(request.samples)
            change = self._state.report(replica, state, convert.load_from_proto(request.load), self._clock())
        except (InvalidRequest, ReplicaConflict, ReplicaMismatch) as error:
            self._log_refusal(replica.replica_id, context.peer(), str(error))
            raise
        self._refused.pop(replica.replica_id, None)
        if change >= Change.STATE:
            why = {"reason": request.reason} if request.reason else {}
            log.info("replica", replica=replica.replica_id, state=state.value, address=replica.address, **why)
        await self._follow(change)
        self._calibrate(replica.replica_id, samples)
        member = self._state.member(replica.replica_id)
        if state is ReplicaState.STOPPED or member is None:
            return pb.ReportResponse(plan_epoch=self._plan.epoch)
        return pb.ReportResponse(
            role=convert.role_to_proto(member.replica.role),
            plan_epoch=self._plan.epoch,
            role_epoch=member.role_epoch,
            leave_within_s=self._state.leave_within_s(replica.replica_id, self._clock()),
        )

    async def ReportGateway(self, request: pb.ReportGatewayRequest, context: Any) -> pb.ReportGatewayResponse:
        """What a gateway has in flight and measures."""
        load, now_s = convert.gateway_from_proto(request.gateway), self._clock()
        self._gateways.report(load, now_s)
        self._outlook.series.report(load.gateway_id, load.tally, now_s)
        await self._follow(Change.LOAD)
        slo = self._outlook.slo
        return pb.ReportGatewayResponse(slo_ttft_s=slo.ttft_s, slo_tpot_s=slo.tpot_s)

    async def GetPlan(self, request: pb.GetPlanRequest, context: Any) -> pb.GetPlanResponse:
        """The plan and every replica's status, now."""
        return pb.GetPlanResponse(
            plan=convert.plan_to_proto(self._plan),
            statuses=self._statuses(),
            gateways=self._loads(),
            plan_json=self._state.applied or self._state.configured,
            calibration=calibration_to_proto(self.promises.calibration),
            changes=[convert.change_to_proto(change) for change in self._outlook.changes],
            forecasts=convert.forecasts_to_proto(self._outlook.contest.forecasts, self._outlook.contest.best),
        )

    async def ApplyPlan(self, request: pb.ApplyPlanRequest, context: Any) -> pb.ApplyPlanResponse:
        """Another plan for the replicas that are there."""
        await self.apply(from_json(request.plan_json), "applied", "by a person")
        return pb.ApplyPlanResponse(plan_epoch=self._plan.epoch)

    async def Preempt(self, request: pb.PreemptRequest, context: Any) -> pb.PreemptResponse:
        """A replica's machine goes."""
        change = self._state.preempt(request.replica_id, request.grace_s, self._clock())
        log.warning("preempted", replica=request.replica_id, grace_s=request.grace_s)
        await self._follow(change)
        return pb.PreemptResponse(plan_epoch=self._plan.epoch)

    @property
    def placement(self) -> Placement | None:
        """The plan.yaml in force; None when nobody planned."""
        return placement_of(self._state.applied or self._state.configured)

    @property
    def configured(self) -> Placement | None:
        """The one that this coordinator was started with, likewise."""
        return from_json(self._state.configured) if self._state.configured else None

    @property
    def statuses(self) -> tuple[ReplicaStatus, ...]:
        """Of every replica."""
        return self._state.statuses

    @property
    def roles(self) -> Mapping[str, str]:
        """What each replica does now, by its id."""
        return {each.replica_id: each.role.value for each in self._state.plan.replicas}

    async def apply(self, placement: Placement, what: str, why: str) -> None:
        """Another plan for the replicas that are there; ``what`` and ``why`` are for the history.

        Raises:
            ReplicaMismatch: it does not fit them; nothing has changed.
        """
        self._state.assign(assignment_of(placement))
        self._state.applied = to_json(placement)
        log.info("plan_applied", what=what, why=why, throughput_rps=placement.throughput_rps)
        await self._follow(Change.MEMBERS)
        await self.record(what, why)

    async def record(self, what: str, why: str) -> None:
        """Add to the plan's history."""
        change = PlanChange(self._wall_clock(), self._plan.epoch, what, why)
        self._outlook.changed(change)
        metrics.PLAN_CHANGES.labels(what).inc()
        try:
            await self._record(change)
        except OSError as error:
            log.error("change_not_recorded", error=str(error), what=what, why=why)

    async def members_changed(self) -> None:
        """Return when a replica came, went or changed its state."""
        states = self._versions[0]
        while self._versions[0] == states:
            await self._changed.wait()

    async def WatchPlan(self, request: pb.WatchPlanRequest, context: Any) -> AsyncIterator[pb.WatchPlanResponse]:
        """The plan now, at once when it or a state changes, and at most once a second when loads do."""
        sent: int | None = None
        while not self._closed:
            seen, sent_s, plan = self._versions, self._clock(), self._plan
            message = pb.WatchPlanResponse(statuses=self._statuses(), gateways=self._loads())
            # A plan of hundreds of replicas has thousands of routes, and loads change every second.
            if plan.epoch != sent:
                message.plan.CopyFrom(convert.plan_to_proto(plan))
                sent = plan.epoch
            yield message
            await self._news(seen, sent_s)
        raise Unavailable("the coordinator is stopping")

    async def run_expiry(self) -> None:
        """Mark silent replicas as lost when their time comes; runs until cancelled."""
        turned_s = now_s = self._clock()
        while True:
            # Whatever it stood still in, this process did not listen: who was silent meanwhile is not to blame.
            if (late_s := now_s - turned_s - TURN_S) > STALL_S:
                log.warning("stalled", late_s=round(late_s, 1))
                self._state.forgive(now_s)
            turned_s = now_s
            deadline = self._state.next_deadline()
            if deadline is None or now_s < deadline:
                await asyncio.sleep(TURN_S if deadline is None else min(TURN_S, deadline - now_s))
                now_s = self._clock()
                continue
            before = {status.replica_id: status.state for status in self._state.statuses}
            change = self._state.expire(now_s)
            for status in self._state.statuses:
                if status.state is ReplicaState.LOST and before[status.replica_id] is not ReplicaState.LOST:
                    log.warning("replica", replica=status.replica_id, state="lost")
            await self._follow(change)

    def fleet(self) -> Fleet:
        """What the page shows."""
        return Fleet(
            unix_s=self._wall_clock(),
            plan=self._plan,
            statuses={status.replica_id: status for status in self._state.statuses},
            gateways=self._gateways.current(self._clock()),
            placement=placement_of(self._state.applied or self._state.configured),
            changes=(*self._outlook.changes, *self._state.changes),
        )

    def close(self) -> None:
        """End every watch; those who watch come again, to the next coordinator."""
        self._closed = True
        self._wake()

    async def _follow(self, change: Change) -> None:
        if change is Change.NOTHING:
            return
        if change is Change.MEMBERS:
            with trace.get_tracer("hexgen2").start_as_current_span("coordinator.plan") as span:
                plan = self._state.replan(traceparent(), self._wall_clock())
                span.set_attribute("hexgen2.plan.epoch", plan.epoch)
                span.set_attribute("hexgen2.plan.replicas", [each.replica_id for each in plan.replicas])
                span.set_attribute("hexgen2.plan.routes", len(plan.routes))
                log.info("plan", plan_epoch=plan.epoch, replicas=len(plan.replicas), routes=len(plan.routes))
        if change >= Change.STATE:
            snapshot = self._state.snapshot
            await self._keep(snapshot)
            # Those who wait for an older snapshot at the same time come first, in order.
            self._plan = snapshot.plan
        states, loads = self._versions
        self._versions = (states, loads + 1) if change is Change.LOAD else (states + 1, loads)
        self._wake()

    async def _keep(self, snapshot: Snapshot) -> None:
        try:
            await self._save(snapshot)
        except OSError as error:
            # Serving goes on: workers register again should this process end before the disk is mended.
            log.error("state_not_saved", error=str(error), plan_epoch=snapshot.plan.epoch)

    def _calibrate(self, replica_id: str, samples: tuple[Sample, ...]) -> None:
        promises = self.promises
        promises.follow(self._state.applied or self._state.configured)
        ids = {each.address: each.replica_id for each in self._plan.replicas} if samples else {}
        if promises.add(replica_id, samples, ids):
            log.warning("plan_off", off=promises.calibration.off, why=promises.calibration.why)
        if samples:
            metrics.tell_calibration(promises.calibration)

    def _check_clock(self, replica_id: str, unix_time_s: float) -> None:
        ahead_s = unix_time_s - self._wall_clock() if unix_time_s else 0.0
        if abs(ahead_s) > self._max_clock_skew_s:
            side = "ahead of" if ahead_s > 0 else "behind"
            raise ReplicaMismatch(
                f"the clock of replica {replica_id!r} is {abs(ahead_s):.0f} s {side} "
                f"the coordinator's, more than {self._max_clock_skew_s:g} s: synchronise them (NTP)"
            )

    def _statuses(self) -> list[types_pb2.ReplicaStatus]:
        return [convert.status_to_proto(status) for status in self._state.statuses]

    def _loads(self) -> list[types_pb2.GatewayLoad]:
        return [convert.gateway_to_proto(load) for load in self._gateways.current(self._clock())]

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _news(self, seen: tuple[int, int], sent_s: float) -> None:
        """Return when there is something to send to a watcher that has ``seen`` these versions since ``sent_s``."""
        while not self._closed and self._versions[0] == seen[0]:
            left_s = None
            if self._versions[1] != seen[1]:
                left_s = sent_s + self._load_interval_s - self._clock()
                if left_s <= 0:
                    return
            try:
                async with asyncio.timeout(left_s):
                    await self._changed.wait()
            except TimeoutError:
                return

    def _log_refusal(self, replica_id: str, peer: str, reason: str) -> None:
        # A worker repeats its report every second; it is logged when its reason changes.
        if self._refused.get(replica_id) == reason:
            return
        if len(self._refused) >= MAX_REFUSED:
            self._refused.clear()
        self._refused[replica_id] = reason
        log.warning("report_refused", peer=peer, reason=reason)
