"""Plans anew while the fleet serves. ``hexgen2.coordinator.replan`` decides; here it is looked, searched and applied.

A change of plan is made before what it replaces is broken: roles and routes change with the epoch, requests under way
end where they are, KV that a former prefill replica holds is fetched from it as ever.
"""

import asyncio
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from types import TracebackType

import structlog

from hexgen2 import metrics
from hexgen2.config import ReplanConfig
from hexgen2.coordinator.outlook import Outlook
from hexgen2.coordinator.replan import (
    PATIENCE_AFTER_ROLLBACK,
    InForce,
    Policy,
    Situation,
    Watch,
    judge,
    why_back,
    why_search,
    workload_now,
)
from hexgen2.device_factors import Factors, device_factors, further
from hexgen2.errors import HexgenError, ReplicaMismatch
from hexgen2.forecast import LSTM, SEASONAL, seasonal
from hexgen2.observed import Slo
from hexgen2.placement import Placement
from hexgen2.plan import ReplicaState
from hexgen2.workload import Workload
from services.coordinator.background import Background, learn, search, warm_up
from services.coordinator.service import CoordinatorService

#: Forecasts are in no hurry.
LESSONS_NICE = 10

log = structlog.get_logger(__name__)


class Replanner:
    """See the module. A context manager; the owner runs ``run`` beside the server. ``clock`` is the service's."""

    def __init__(
        self,
        config: ReplanConfig,
        service: CoordinatorService,
        outlook: Outlook,
        placement: Placement,
        workload: Workload,
        clock: Callable[[], float],
        background: Callable[[int], Background] = Background,
    ) -> None:
        self._config = config
        self._service = service
        self._outlook = outlook
        self._clock = clock
        self._policy = Policy(
            **{name: getattr(config, name) for name in Policy.__dataclass_fields__}  # one name, one meaning
        )
        self._placement = placement
        # Where every replica stands that was ever in a plan, also while it is gone.
        configured = service.configured or placement
        self._known = {each.id: each for each in (*configured.replicas, *placement.replicas)}
        self._plan = InForce(workload, placement.throughput_rps, clock(), frozenset())
        # How much longer than the cost model says devices take by the plan in force, and what of it was looked at.
        self._factors: Factors = {}
        self._seen_off: frozenset[str] = frozenset()
        self._before: Placement | None = None
        self._watch: Watch | None = None
        self._forecast_due_s = clock()
        self._stack = ExitStack()
        self._searches, self._lessons = background(0), background(LESSONS_NICE)
        outlook.slo = Slo(workload.ttft_s, workload.tpot_s)

    def __enter__(self) -> "Replanner":
        self._stack.enter_context(self._searches)
        self._stack.enter_context(self._lessons)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    async def run(self) -> None:
        """Look at every change of members, and once in a bucket's time; runs until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._warm_up())
            tasks.create_task(self._foresee())
            while True:
                try:
                    await self.look()
                except ReplicaMismatch as error:
                    # Somebody went meanwhile: the next look sees who.
                    log.warning("replan_overtaken", reason=str(error))
                except HexgenError as error:
                    # What cannot be planned now is not tried at every look, also for replicas that are gone.
                    log.error("replan_failed", reason=str(error))
                    there, settled_s = self._situation().there, self._clock() + self._config.interval_s
                    self._plan = replace(self._plan, replicas=self._plan.replicas & there, settled_s=settled_s)
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._config.bucket_s):
                        await self._service.members_changed()

    async def _warm_up(self) -> None:
        try:
            await self._searches.run(warm_up)
        except HexgenError as error:
            # The first search will try again, and say what it says.
            log.warning("search_not_ready", reason=str(error))

    async def look(self) -> None:
        """One look: is there a reason to plan anew, was the last change good?"""
        placement = self._service.placement
        if placement is not None and placement != self._placement:
            self._adopt(placement)
        seen = self._situation()
        planned = {each.id for each in self._placement.replicas}
        self._plan = replace(self._plan, replicas=self._plan.replicas | (seen.there & planned))
        if self._watch is not None and seen.now_s >= self._watch.until_s:
            await self._review(self._watch)
            return
        reason = why_search(self._policy, self._plan, seen)
        if reason and seen.there:
            await self._search(reason, seen)

    def _situation(self) -> Situation:
        now_s = self._clock()
        contest = self._outlook.contest
        forecast = contest.forecasts.get(contest.best)
        return Situation(
            now_s,
            self._outlook.series.window(self._config.window_s, now_s),
            forecast.rps if forecast is not None else 0.0,
            frozenset(
                each.replica_id
                for each in self._service.statuses
                if each.state is ReplicaState.READY and each.replica_id in self._known
            ),
            self._off,
        )

    @property
    def _off(self) -> str:
        """What of the plan's times is off that no search has seen."""
        found = self._service.promises.calibration
        self._seen_off &= found.beyond
        return found.why if found.beyond - self._seen_off else ""

    def _adopt(self, placement: Placement) -> None:
        """A person has applied a plan: what it was made for is not told, so what is asked now stands for it."""
        self._placement = placement
        self._known |= {each.id: each for each in placement.replicas}
        now_s = self._clock()
        self._watch, self._before = None, None
        self._plan = InForce(
            workload_now(self._plan, self._situation()),
            placement.throughput_rps,
            now_s,
            frozenset(),
            now_s + self._config.interval_s,
        )

    async def _search(self, reason: str, seen: Situation) -> None:
        workload = workload_now(self._plan, seen)
        roles = {key: role for key, role in self._service.roles.items() if key in seen.there}
        base = self._placement.model_copy(update={"replicas": tuple(self._known.values())})
        log.info("replan_search", reason=reason, replicas=len(roles), requests_per_s=round(seen.rps, 3))
        calibration = self._service.promises.calibration
        # A plan whose times hold is searched for by the same figures again.
        factors = further(self._factors, device_factors(base, calibration)) if calibration.off else self._factors
        cluster, evaluations = self._config.cluster or base.cluster, self._config.evaluations
        found = await self._searches.run(search, cluster, base, workload, roles, evaluations, factors)
        self._seen_off = calibration.beyond
        verdict = judge(self._policy, reason, seen.rps, found.current_rps, found.rps, len(found.flipped), len(roles))
        now_s = self._clock()
        settled_s = now_s + self._config.interval_s
        if not verdict.change:
            self._plan = InForce(workload, found.current_rps, self._plan.since_s, seen.there, settled_s)
            await self._service.record("kept", verdict.why)
            return
        before, window = self._placement, self._outlook.series.window(self._config.window_s, now_s)
        await self._service.apply(found.placement, "re-planned", verdict.why)
        self._placement = found.placement
        self._factors = factors
        self._plan = InForce(workload, found.rps, now_s, seen.there, settled_s)
        # A plan whose replicas are gone is nothing to go back to.
        able = {each.id for each in before.replicas} <= seen.there
        self._before = before if able else None
        self._watch = Watch(window, now_s, now_s + self._config.watch_s) if able else None

    async def _review(self, watch: Watch) -> None:
        now_s, before = self._clock(), self._before
        self._watch, self._before = None, None
        # The first third still has answers that the plan before has begun.
        after = self._outlook.series.window((now_s - watch.since_s) * 2 / 3, now_s)
        why = why_back(self._policy, watch, after)
        if not why or before is None:
            return
        await self._service.apply(before, "rolled back", why)
        self._placement = before
        settled_s = now_s + PATIENCE_AFTER_ROLLBACK * self._config.interval_s
        self._plan = InForce(self._plan.workload, before.throughput_rps, now_s, frozenset(), settled_s)

    async def _foresee(self) -> None:
        """Forecast arrivals from time to time, and see what became of earlier forecasts."""
        config, series, contest = self._config, self._outlook.series, self._outlook.contest
        horizon = max(1, round(config.horizon_s / config.bucket_s))
        season = max(horizon, round(config.season_s / config.bucket_s))
        while True:
            await asyncio.sleep(config.forecast_s)
            now_s = self._clock()
            series.advance(now_s)
            rates = series.rates
            if contest.due(now_s):
                contest.settle(sum(rates[-horizon:]) / max(1, len(rates[-horizon:])), now_s)
            if rates:
                contest.say(SEASONAL, seasonal(rates, horizon, season), now_s)
            if config.lstm:
                try:
                    said = await self._lessons.run(learn, rates, horizon, season, config.lstm_train_s)
                except HexgenError as error:
                    log.error("forecast_failed", reason=str(error))
                    said = None
                if said is not None:
                    contest.say(LSTM, said, now_s)
            for who, each in contest.forecasts.items():
                metrics.FORECAST_RPS.labels(who).set(each.rps)
                if each.error is not None:
                    metrics.FORECAST_ERROR.labels(who).set(each.error)
