"""Where a request goes, first and after a failure. Decides from the plan, the states and what is in flight; no I/O.

The coordinator takes seconds to find that a replica is lost (or may be away itself). Until then a replica that has just
failed is passed over where there is another.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from time import monotonic
from typing import Protocol

from hexgen2.engine.base import Sampling
from hexgen2.errors import EngineFailed, HexgenError, Overloaded, StaleEpoch, Unavailable
from hexgen2.gateway.life import Side, TryAgain, Way, for_client
from hexgen2.gateway.limits import max_prompt_tokens
from hexgen2.kv.codecs import NONE
from hexgen2.plan import Plan, Replica, ReplicaStatus, Role
from hexgen2.routing import RouteKey, Router, calm, pick_colocated, short_enough, usable_routes

#: How long a replica that failed is passed over.
SUSPECT_S = 2.0


class PlanSource(Protocol):
    """The newest plan and states: ``rpc.report.PlanWatcher``."""

    @property
    def plan(self) -> Plan:
        """The plan in force; an empty one before the first."""

    @property
    def statuses(self) -> Mapping[str, ReplicaStatus]:
        """States by replica id."""

    async def wait_changed(self) -> None:
        """Return at the next change of either."""


@dataclass(frozen=True, slots=True)
class Targets:
    """Who serves an attempt. ``prefill`` is None when colocated, ``decode`` when the first token is the last."""

    way: Way
    plan_epoch: int
    prefill: Replica | None
    decode: Replica | None
    #: Both ends of the route that the attempt counts against.
    key: RouteKey = ("", "")
    #: What the KV travels in.
    codec: str = NONE


class Dispatch:
    """Keeps the count of what is in flight and who failed lately. One per gateway; ``clock`` in seconds."""

    def __init__(
        self,
        plans: PlanSource,
        clock: Callable[[], float] = monotonic,
        elsewhere: Callable[[], Mapping[RouteKey, int]] = dict,
    ) -> None:
        self._plans = plans
        self._elsewhere_in_flight = elsewhere
        self._clock = clock
        # By incarnation: a replica that was started anew is innocent.
        self._suspect_until: dict[str, float] = {}
        self._router = Router()
        # What is served as a whole counts as on the route from its replica to itself.
        self._in_flight: Counter[RouteKey] = Counter()

    @property
    def plan(self) -> Plan:
        """The plan in force."""
        return self._plans.plan

    async def newer_plan(self, epoch: int, timeout_s: float) -> None:
        """Return once the plan is newer than ``epoch``, or after ``timeout_s``."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self.plan.epoch <= epoch:
                    await self._plans.wait_changed()

    def usable(self) -> bool:
        """Whether a request could be served now."""
        plan, statuses = self._plans.plan, self._plans.statuses
        return bool(usable_routes(plan, statuses) or pick_colocated(plan, statuses, {}))

    @property
    def in_flight(self) -> Mapping[RouteKey, int]:
        """This gateway's requests by route."""
        return self._in_flight

    def first(self, sampling: Sampling, prompt_tokens: int = 0) -> Targets:
        """For a new request.

        Raises:
            Unavailable: no replica that could serve it is ready.
        """
        suspects = self._suspects()
        targets = None
        if short_enough(self.plan, prompt_tokens) and sampling.max_tokens > 1:
            busy = (key for key, status in self._plans.statuses.items() if not calm(status.load))
            targets = self._on_decode(suspects.union(busy))
        if targets is None and not sampling.needs_history:
            targets = self._route(sampling, prompt_tokens, suspects)
            targets = targets or self._route(sampling, prompt_tokens, frozenset())
        targets = targets or self._on_decode(suspects) or self._on_decode(frozenset())
        if targets is None:
            raise Unavailable("no replica is ready to serve this request; try again shortly")
        return targets

    def again(
        self,
        sampling: Sampling,
        tried: Targets,
        failure: TryAgain,
        prompt_tokens: int = 0,
        kv_was_there: bool = False,
    ) -> Targets:
        """For another attempt: elsewhere as far as possible, else the same once more.

        ``kv_was_there``: decode had all of the KV, so that prefill, which has the prompt in its cache, has done well.

        Raises:
            HexgenError: the failure itself, where trying again cannot help.
        """
        if isinstance(failure.error, StaleEpoch):
            return self.first(sampling, prompt_tokens)
        self._suspect(tried.prefill if failure.side is Side.PREFILL else tried.decode, failure.error)
        found = self._elsewhere(sampling, prompt_tokens, tried, failure.side, kv_was_there)
        if found is None and not isinstance(failure.error, Overloaded):
            # A way round what failed, or the same replicas: the connection may have been all that was lost.
            if tried.way is Way.COLOCATED or failure.side is Side.PREFILL:
                found = self._on_decode(frozenset())
            else:
                found = self._on_decode(_ids(tried.decode) | self._suspects()) or self._on_decode(_ids(tried.decode))
                found = found or self._route(sampling, prompt_tokens, _ids(tried.prefill))
                found = found or self._route(sampling, prompt_tokens, frozenset())
        if found is None:
            raise for_client(failure.error)
        return found

    def other_decode(
        self, targets: Targets, lost: Replica, error: HexgenError, failed: frozenset[str]
    ) -> Replica | None:
        """Another decode replica than ``failed`` (ids) that the same prefill may hand over to."""
        assert targets.prefill is not None
        self._suspect(lost, error)
        prefill_id = targets.prefill.replica_id
        others = frozenset(r.replica_id for r in self.plan.replicas if r.role is not Role.DECODE) - {prefill_id}
        for exclude in (failed | others | self._suspects() - {prefill_id}, failed | others):
            route = self._router.pick(self.plan, self._plans.statuses, self._everywhere(), exclude)
            if route is not None:
                break
        return None if route is None else self.plan.replica(route.decode_replica_id)

    @contextmanager
    def counted(self, targets: Targets) -> Iterator[None]:
        """Counts the attempt as in flight."""
        self._in_flight[targets.key] += 1
        try:
            yield
        finally:
            self._in_flight[targets.key] -= 1
            if not self._in_flight[targets.key]:
                del self._in_flight[targets.key]

    def _everywhere(self) -> Mapping[RouteKey, int]:
        """What all gateways have in flight; of the others, as they said a moment ago."""
        return Counter(self._elsewhere_in_flight()) + self._in_flight

    def _suspect(self, replica: Replica | None, error: HexgenError) -> None:
        if replica is not None and isinstance(error, Unavailable | EngineFailed):
            self._suspect_until[replica.incarnation] = self._clock() + SUSPECT_S

    def _suspects(self) -> frozenset[str]:
        """Ids of replicas that failed lately."""
        now = self._clock()
        self._suspect_until = {key: until for key, until in self._suspect_until.items() if until > now}
        return frozenset(r.replica_id for r in self.plan.replicas if r.incarnation in self._suspect_until)

    def _elsewhere(
        self, sampling: Sampling, prompt_tokens: int, tried: Targets, side: Side, kv_was_there: bool
    ) -> Targets | None:
        prefill, decode, suspects = _ids(tried.prefill), _ids(tried.decode), self._suspects()
        if tried.way is Way.COLOCATED or sampling.needs_history:
            return self._on_decode(decode | suspects) or self._on_decode(decode)
        if side is Side.DECODE and kv_was_there:
            ladder = [decode | suspects, decode]
        else:
            # What prefill's call reports is prefill's failure; what decode's reports may be either's, and a decode
            # replica that may be gone is the last resort.
            ladder = [prefill] if side is Side.PREFILL else [decode, prefill | suspects]
            ladder = [prefill | decode | suspects, prefill | decode, *ladder]
        return next((found for exclude in ladder if (found := self._route(sampling, prompt_tokens, exclude))), None)

    def _route(self, sampling: Sampling, prompt_tokens: int, exclude: frozenset[str]) -> Targets | None:
        plan = self.plan
        route = self._router.pick(plan, self._plans.statuses, self._everywhere(), exclude)
        if route is None:
            return None
        key = (route.prefill_replica_id, route.decode_replica_id)
        prefill, decode = plan.replica(key[0]), plan.replica(key[1])
        if prefill is decode:
            return Targets(Way.COLOCATED, plan.epoch, None, decode, key)
        if any(0 < max_prompt_tokens(each) < prompt_tokens for each in (prefill, decode)):
            # An answer that is continued: with what there was of it, the prompt is too long to be handed over again.
            return None
        if sampling.max_tokens == 1:
            return Targets(Way.FIRST_ONLY, plan.epoch, prefill, None, key)
        return Targets(Way.HAND_OVER, plan.epoch, prefill, decode, key, route.codec)

    def _on_decode(self, exclude: frozenset[str]) -> Targets | None:
        plan = self.plan
        wholes = {decode: count for (prefill, decode), count in self._everywhere().items() if prefill == decode}
        replica_id = pick_colocated(plan, self._plans.statuses, wholes, exclude)
        if replica_id is None:
            return None
        return Targets(Way.COLOCATED, plan.epoch, None, plan.replica(replica_id), (replica_id, replica_id))


def _ids(replica: Replica | None) -> frozenset[str]:
    return frozenset({replica.replica_id} if replica is not None else ())
