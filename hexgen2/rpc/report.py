"""What a worker tells the coordinator, and what a gateway hears from it. Both outlive a coordinator that dies.

After a restart the coordinator knows nobody until workers have reported again, so a plan that lacks a replica
that the held plan has is taken over only once it has been so for ``SETTLE_S`` of an unbroken watch.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace

import grpc
import structlog

from hexgen2.calibration import Sample
from hexgen2.errors import HexgenError, Unavailable
from hexgen2.observed import Slo
from hexgen2.plan import GatewayLoad, Load, Plan, Replica, ReplicaState, ReplicaStatus, Role
from hexgen2.routing import RouteKey, ready, usable_routes
from hexgen2.rpc import plan_convert as convert
from hexgen2.rpc.calibration_convert import samples_to_proto
from hexgen2.rpc.client import channel, to_error
from hexgen2.security.tls import TlsFiles
from hexgen2.v1 import coordinator_pb2 as pb
from hexgen2.v1 import coordinator_pb2_grpc

REPORT_INTERVAL_S = 1.0
#: Of one report; also how long a silent coordinator can hold up the next.
REPORT_TIMEOUT_S = 2.0
RETRY_S = 0.5
#: Longer than a worker takes to find a restarted coordinator (reconnect back-off 2 s) and to report.
SETTLE_S = 5.0

log = structlog.get_logger(__name__)


class Reporter:
    """Reports a replica once a second, and at once when its ``state`` changes. ``run`` until STOPPED or cancelled.

    ``replica`` may be replaced (a worker learns its model while it starts). ``load`` is called for each report, and
    ``on_role`` with each new role that the plan gives a flexible replica and the first epoch of that role. ``samples``
    is what was measured since it was last called; what a report that fails carried is lost. ``on_leave`` is told in
    how many seconds the machine goes, while the worker is READY.
    """

    def __init__(
        self,
        coordinator_address: str,
        replica: Replica,
        load: Callable[[], Load],
        interval_s: float = REPORT_INTERVAL_S,
        tls: TlsFiles | None = None,
        on_role: Callable[[Role, int], None] = lambda role, epoch: None,
        samples: Callable[[], tuple[Sample, ...]] = tuple,
        on_leave: Callable[[float], None] = lambda within_s: None,
    ) -> None:
        self.replica = replica
        #: Why it stopped.
        self.reason = ""
        self._on_role = on_role
        self._on_leave = on_leave
        self._samples = samples
        self._address = coordinator_address
        self._tls = tls
        self._load = load
        self._interval_s = interval_s
        self._state = ReplicaState.STARTING
        self._changed = asyncio.Event()
        self._trouble: str | None = "not yet reported"

    @property
    def state(self) -> ReplicaState:
        """As last set; STARTING at first."""
        return self._state

    @state.setter
    def state(self, state: ReplicaState) -> None:
        self._state = state
        self._changed.set()

    async def run(self) -> None:
        """Report until cancelled, or until a last report that says STOPPED has been tried."""
        async with channel(self._address, self._tls) as peer:
            stub = coordinator_pb2_grpc.CoordinatorStub(peer)
            while True:
                self._changed.clear()
                last = self._state is ReplicaState.STOPPED
                request = pb.ReportRequest(
                    replica=convert.replica_to_proto(self.replica),
                    state=convert.state_to_proto(self._state),
                    load=convert.load_to_proto(self._load()),
                    reason=self.reason,
                    unix_time_s=time.time(),
                    samples=samples_to_proto(self._samples()),
                )
                try:
                    # The last one waits for a coordinator that is just coming back.
                    response = await stub.Report(request, timeout=REPORT_TIMEOUT_S, wait_for_ready=last)
                    self._note(None, response.plan_epoch)
                    self._take_role(response)
                    if response.HasField("leave_within_s") and self._state is ReplicaState.READY:
                        self._on_leave(response.leave_within_s)
                except grpc.aio.AioRpcError as error:
                    self._note(_reason(to_error(error)))
                if last:
                    return
                try:
                    async with asyncio.timeout(self._interval_s):
                        await self._changed.wait()
                except TimeoutError:
                    pass

    def _take_role(self, response: pb.ReportResponse) -> None:
        if not self.replica.flexible or not response.role:
            return
        role = convert.role_from_proto(response.role)
        if role is not self.replica.role:
            log.info("role", role=role.value, before=self.replica.role.value, plan_epoch=response.plan_epoch)
            self.replica = replace(self.replica, role=role)
            self._on_role(role, response.role_epoch)

    def _note(self, trouble: str | None, plan_epoch: int = 0) -> None:
        if _kind(trouble) == _kind(self._trouble):
            return
        self._trouble = trouble
        if trouble is None:
            log.info("coordinator_reached", coordinator=self._address, plan_epoch=plan_epoch)
        else:
            log.warning("report_failed", coordinator=self._address, reason=trouble)


async def report_gateway(
    coordinator_address: str,
    load: Callable[[], GatewayLoad],
    tls: TlsFiles | None = None,
    interval_s: float = REPORT_INTERVAL_S,
    on_slo: Callable[[Slo], None] = lambda slo: None,
) -> None:
    """Tell the coordinator once a second what a gateway has in flight and measures; runs until cancelled.

    ``on_slo`` is told what counts as good. A coordinator that is away is the plan watch's to log.
    """
    async with channel(coordinator_address, tls) as peer:
        stub = coordinator_pb2_grpc.CoordinatorStub(peer)
        while True:
            with suppress(grpc.aio.AioRpcError):
                request = pb.ReportGatewayRequest(gateway=convert.gateway_to_proto(load()))
                answer = await stub.ReportGateway(request, timeout=REPORT_TIMEOUT_S)
                on_slo(
                    Slo(
                        answer.slo_ttft_s if answer.HasField("slo_ttft_s") else None,
                        answer.slo_tpot_s if answer.HasField("slo_tpot_s") else None,
                    )
                )
            await asyncio.sleep(interval_s)


class PlanWatcher:
    """The plan in force and every replica's status, as a gateway sees them. ``run`` until cancelled."""

    def __init__(self, coordinator_address: str, settle_s: float = SETTLE_S, tls: TlsFiles | None = None) -> None:
        self.plan = Plan(0)
        self.statuses: Mapping[str, ReplicaStatus] = {}
        #: What every gateway has in flight, this one included, as it reported it.
        self.gateways: tuple[GatewayLoad, ...] = ()
        # The coordinator's plan; ``plan`` is another while it is held.
        self._heard = Plan(0)
        self._address = coordinator_address
        self._tls = tls
        self._settle_s = settle_s
        self._pending: tuple[Plan, Mapping[str, ReplicaStatus]] | None = None
        self._settling: asyncio.TimerHandle | None = None
        self._changed = asyncio.Event()
        self._trouble: str | None = "not reached yet"

    def in_flight_elsewhere(self, gateway_id: str) -> Mapping[RouteKey, int]:
        """What all gateways but that one have in flight, as they said a moment ago; nothing while nobody tells."""
        found: Counter[RouteKey] = Counter()
        for gateway in self.gateways:
            if gateway.gateway_id != gateway_id:
                for route in gateway.routes:
                    found[route.prefill_replica_id, route.decode_replica_id] += route.num_requests
        return found

    async def run(self) -> None:
        """Follow the coordinator until cancelled; keep the last plan while it is away."""
        try:
            async with channel(self._address, self._tls) as peer:
                stub = coordinator_pb2_grpc.CoordinatorStub(peer)
                while True:
                    try:
                        # No deadline: the stream lasts as long as the gateway; keepalive finds a silent coordinator.
                        async for message in stub.WatchPlan(pb.WatchPlanRequest()):
                            self._note(None)
                            self._hear(message)
                        self._note("it ended the watch")
                    except grpc.aio.AioRpcError as error:
                        self._note(_reason(to_error(error)))
                    except HexgenError as error:
                        self._note(f"it sent a plan that cannot be used: {error}")
                    # What an interrupted watch said last is no evidence of who is gone.
                    self._discard_pending()
                    self.gateways = ()
                    await asyncio.sleep(RETRY_S)
        finally:
            self._discard_pending()

    @property
    def ready(self) -> bool:
        """Whether a request can be served: over a route, or colocated on a decode replica."""
        if usable_routes(self.plan, self.statuses):
            return True
        return any(
            each.role is not Role.PREFILL and ready(self.statuses, each.replica_id) for each in self.plan.replicas
        )

    @property
    def holding(self) -> bool:
        """Whether the coordinator's plan lacks replicas and the one before it is held meanwhile."""
        return self._pending is not None

    async def changed(self) -> None:
        """Return at the next change of ``plan`` or ``statuses``."""
        await self._changed.wait()

    async def wait_ready(self, timeout_s: float) -> None:
        """Return once ``ready``.

        Raises:
            Unavailable: not within ``timeout_s``; says why.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while not self.ready:
                    await self.changed()
        except TimeoutError:
            raise Unavailable(f"no replica can serve after {timeout_s:g} s: {self._why()}") from None

    async def wait_changed(self) -> None:
        """Return at the next change of the plan or of a status."""
        await self._changed.wait()

    def _why(self) -> str:
        if self._trouble is not None:
            return f"coordinator {self._address}: {self._trouble}"
        if not self.plan.replicas:
            return f"no worker has registered at coordinator {self._address}"
        return ", ".join(f"{key} is {status.state}" for key, status in sorted(self.statuses.items()))

    def _hear(self, message: pb.WatchPlanResponse) -> None:
        if message.HasField("plan"):
            self._heard = convert.plan_from_proto(message.plan)
        plan, statuses = self._heard, convert.statuses_from_proto(message.statuses)
        self.gateways = tuple(convert.gateway_from_proto(each) for each in message.gateways)
        if covers(plan, self.plan, self.statuses):
            self._discard_pending()
            self._adopt(plan, statuses)
            return
        self._pending = plan, statuses
        if self._settling is None:
            missing = sorted({r.replica_id for r in self.plan.replicas} - {r.replica_id for r in plan.replicas})
            log.info("plan_held", plan_epoch=self.plan.epoch, missing=missing, settle_s=self._settle_s)
            self._settling = asyncio.get_running_loop().call_later(self._settle_s, self._settle)

    def _settle(self) -> None:
        pending = self._pending
        self._discard_pending()
        if pending is not None:
            self._adopt(*pending)

    def _discard_pending(self) -> None:
        self._pending = None
        if self._settling is not None:
            self._settling.cancel()
            self._settling = None

    def _adopt(self, plan: Plan, statuses: Mapping[str, ReplicaStatus]) -> None:
        if plan.epoch != self.plan.epoch:
            log.info("plan", plan_epoch=plan.epoch, replicas=len(plan.replicas), routes=len(plan.routes))
        self.plan, self.statuses = plan, statuses
        self._changed.set()
        self._changed = asyncio.Event()

    def _note(self, trouble: str | None) -> None:
        if _kind(trouble) == _kind(self._trouble):
            return
        self._trouble = trouble
        if trouble is None:
            log.info("coordinator_reached", coordinator=self._address)
        else:
            log.warning("coordinator_away", coordinator=self._address, reason=trouble, plan_epoch=self.plan.epoch)


def covers(new: Plan, old: Plan, statuses: Mapping[str, ReplicaStatus]) -> bool:
    """Whether ``new`` knows (be it as lost) every replica of ``old`` that was READY by ``statuses``."""
    known = {replica.replica_id for replica in new.replicas}
    return all(each.replica_id in known for each in old.replicas if ready(statuses, each.replica_id))


def _kind(trouble: str | None) -> str | None:
    """What counts as a change: the same kind of error comes in many wordings."""
    return trouble if trouble is None else trouble.partition(":")[0]


def _reason(error: HexgenError) -> str:
    # gRPC repeats the address and socket of each attempt; one line is for people.
    return f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"
