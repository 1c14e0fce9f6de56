"""Requests on their way through a fleet: routed as the gateway does, handed over as the workers do.

Routes are picked by ``routing.Router`` and memory is given out by ``kv.pool.PagePool``: the very code that serves. A
request waits for pages of prefill's send buffer, is computed there and gives its first token; from the time that its
first KV is made it waits for pages of decode's staging, and then its KV travels while it is being made. When all of it
is there it goes to decode's engine, whose first step frees the staging.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from math import inf

from hexgen2.errors import ConfigError, KvTooLarge, Overloaded
from hexgen2.kv.pool import Grant, PagePool
from hexgen2.kv.wire import num_chunks
from hexgen2.plan import Load, Plan, Replica, ReplicaState, ReplicaStatus, Role, Route
from hexgen2.routing import RouteKey, Router, route_key
from hexgen2.simulator.blueprint import Arrival, Blueprint, ReplicaSpec
from hexgen2.simulator.clock import Clock
from hexgen2.simulator.engine import Engine, Job
from hexgen2.simulator.happenings import Happening
from hexgen2.simulator.links import NOTHING, Links, Path, Transfer
from hexgen2.simulator.outcome import NO_SLO, Outcome, Slo

#: As ``gateway.dispatch`` and ``config.CoordinatorConfig`` have them: how long a replica that failed is passed over,
#: how long one is silent before it is called lost, and how often a request is tried.
SUSPECT_S = 2.0
LOST_AFTER_S = 5.0
ATTEMPTS = 2

#: Between two reports of a worker.
REPORT_S = 1.0

#: Between two calls of ``progress``.
EVENTS_PER_LOOK = 20_000


@dataclass(frozen=True, slots=True)
class Settings:
    """``max_queued``: requests that may wait for pages of one pool; one more is refused.

    ``before_s`` and ``handover_s`` are what gateway, calls and verification add before prefill and before decode:
    figures of a machine, none by default.
    """

    slo: Slo = NO_SLO
    warmup_s: float = 0.0
    max_queued: int = 1_000_000
    before_s: float = 0.0
    handover_s: float = 0.0


@dataclass(eq=False, slots=True)
class _Request:
    arrival: Arrival
    number: int
    num_attempts: int = 0
    first_s: float = -1.0


@dataclass(eq=False, slots=True)
class _Attempt:
    """One try. ``prefill`` is ``decode`` when colocated."""

    request: _Request
    key: str
    route: Route
    prefill: "_Replica"
    decode: "_Replica"
    prefill_job: Job | None = None
    path: Path = field(default_factory=Path)
    transfer: Transfer | None = None
    #: KV made, and when what is being made will be.
    made_bytes: float = 0.0
    made_s: float = 0.0
    all_made: bool = False
    arriving: bool = False
    verified: bool = False
    over: bool = False
    num_moves: int = 0


@dataclass(eq=False, slots=True)
class _Replica:
    """One as it is now; ``involved`` are the attempts that need it."""

    replica_id: str
    role: str
    spec: ReplicaSpec
    engine: Engine
    send: PagePool
    staging: PagePool
    alive: bool = True
    involved: dict[_Attempt, None] = field(default_factory=dict)
    flip: Happening | None = None
    #: Of engines that it had before.
    busy_s: float = 0.0
    num_preemptions: int = 0
    born_s: float = 0.0


class Simulation:
    """See the module. The same arguments give the same outcome; ``arrivals`` are taken one by one, in order of time."""

    def __init__(
        self,
        blueprint: Blueprint,
        arrivals: Iterable[Arrival],
        settings: Settings,
        happenings: Iterable[Happening] = (),
    ) -> None:
        self.clock = Clock()
        self.outcome = Outcome(settings.slo, settings.warmup_s)
        self.links = Links(self.clock, blueprint.bandwidths)
        self.in_flight: Counter[RouteKey] = Counter()
        self._blueprint = blueprint
        self._settings = settings
        self._arrivals: Iterator[Arrival] = iter(arrivals)
        self._router = Router()
        self._suspect_until: dict[str, float] = {}
        self._states: dict[str, ReplicaStatus] = {}
        self.replicas = {name: self._make(name, role) for name, role in blueprint.roles.items()}
        self._plan = Plan(0)
        self._replan(blueprint.routes)
        for each in happenings:
            if each.replica not in self.replicas:
                raise ConfigError(f"events: replica: the plan has no `{each.replica}`")
            self.clock.at(each.at_s, self._happen, each)
        self._num_requests = 0
        self._reported_s = 0.0
        self._next()

    def run(self, progress: Callable[[int, float], None] | None = None) -> Outcome:
        """To the end of every request. ``progress`` hears how many are over and what time it is there."""
        clock = self.clock
        while clock.step():
            if progress is not None and clock.num_events % EVENTS_PER_LOOK == 0:
                progress(self.outcome.num_finished + self.outcome.failed_total, clock.now)
        return self.outcome

    # -- arrival and routing

    def _next(self) -> None:
        arrival = next(self._arrivals, None)
        if arrival is not None:
            self.clock.at(arrival.time_s, self._arrive, arrival)

    def _arrive(self, arrival: Arrival) -> None:
        self._next()
        self._num_requests += 1
        self.outcome.arrived(arrival.time_s)
        request = _Request(arrival, self._num_requests)
        if self._settings.before_s:
            self.clock.at(self.clock.now + self._settings.before_s, self._try, request)
        else:
            self._try(request)

    def _try(self, request: _Request, exclude: frozenset[str] = frozenset()) -> None:
        request.num_attempts += 1
        self._report()
        suspects = self._suspects()
        route = None
        for avoid in dict.fromkeys((exclude | suspects, exclude, frozenset[str]())):
            route = self._router.pick(self._plan, self._states, self.in_flight, avoid)
            if route is not None:
                break
        if route is None:
            self.outcome.fail("no replica is ready", self.clock.now)
            return
        prefill, decode = (self.replicas[end] for end in route_key(route))
        attempt = _Attempt(request, f"{request.number}/{request.num_attempts}", route, prefill, decode)
        self.in_flight[route_key(route)] += 1
        prefill.involved[attempt] = None
        decode.involved[attempt] = None
        if not prefill.alive or not decode.alive:
            # Nobody knows yet that it is lost: the call fails at once.
            self._suspect(decode if prefill.alive else prefill)
            self._again(attempt, "replica lost")
            return
        self._begin(attempt)

    def _begin(self, attempt: _Attempt) -> None:
        prompt, output = attempt.request.arrival[1:]
        prefill, decode = attempt.prefill, attempt.decode
        last = prefill if output == 1 else decode
        if not (prefill.engine.fits(prompt) and last.engine.fits(prompt + output)):
            self._fail(attempt, "longer than a replica's KV memory")
            return
        number = attempt.request.number
        if prefill is decode or output == 1:
            if prefill is not decode:
                del decode.involved[attempt]
            prefill.engine.submit(Job(attempt, number, prompt, output))
            return
        attempt.path = self._blueprint.path(prefill.replica_id, decode.replica_id)
        try:
            grant = prefill.send.request(attempt.key, num_chunks(prompt))
        except KvTooLarge:
            self._fail(attempt, "KV larger than the send buffer")
        except Overloaded:
            self._again(attempt, "prefill's queue is full")
        else:
            if grant is not None:
                self._send_held(attempt)

    def _send_held(self, attempt: _Attempt) -> None:
        prompt = attempt.request.arrival.prompt_tokens
        attempt.prefill_job = Job(attempt, attempt.request.number, prompt, 1)
        attempt.prefill.engine.submit(attempt.prefill_job)

    # -- the hand-over

    def _ask_staging(self, attempt: _Attempt) -> None:
        try:
            grant = attempt.decode.staging.request(attempt.key, num_chunks(attempt.request.arrival.prompt_tokens))
        except KvTooLarge:
            self._fail(attempt, "KV larger than staging")
        except Overloaded:
            self._again(attempt, "decode's queue is full")
        else:
            if grant is not None:
                self._staging_held(attempt)

    def _staging_held(self, attempt: _Attempt) -> None:
        transfer = attempt.transfer = Transfer(attempt.path, lambda: self._drained(attempt))
        self.links.put(transfer, attempt.made_bytes, self._made_rate(attempt, attempt.made_bytes))
        self._drained(attempt)

    def _made_rate(self, attempt: _Attempt, left_bytes: float) -> float:
        """While KV is being made it leaves no faster than it is made: layer by layer, over the whole of the step."""
        seconds = attempt.made_s - self.clock.now
        return left_bytes / seconds if seconds > 0 and not attempt.all_made else inf

    def _drained(self, attempt: _Attempt) -> None:
        """Nothing is left of what there is; if that is everything, it is verified when the last of it has landed."""
        transfer = attempt.transfer
        if attempt.over or attempt.arriving or transfer is None:
            return
        if attempt.all_made and transfer.left_bytes <= NOTHING:
            attempt.arriving = True
            delay_s = attempt.path.latency_s + self._settings.handover_s
            self.clock.at(self.clock.now + delay_s, self._verified, attempt, attempt.num_moves)

    def _verified(self, attempt: _Attempt, num_moves: int) -> None:
        if attempt.over or attempt.num_moves != num_moves:
            return
        attempt.verified = True
        prompt, output = attempt.request.arrival[1:]
        self._leave_prefill(attempt)
        job = Job(attempt, attempt.request.number, prompt + 1, output - 1, num_computed=prompt, handed_over=True)
        attempt.decode.engine.submit(job)

    def _granted(self, replica: _Replica, grants: list[Grant], act: Callable[[_Attempt], None]) -> None:
        if replica.alive and grants:
            waiting = {each.key: each for each in replica.involved}
            for grant in grants:
                act(waiting[grant.key])

    def _leave_prefill(self, attempt: _Attempt) -> None:
        prefill = attempt.prefill
        if attempt in prefill.involved:
            del prefill.involved[attempt]
            self._granted(prefill, prefill.send.release(attempt.key), self._send_held)
            self._look_drained(prefill)

    def _leave_staging(self, attempt: _Attempt) -> None:
        if attempt.transfer is not None:
            self.links.drop(attempt.transfer)
            attempt.transfer = None
        decode = attempt.decode
        self._granted(decode, decode.staging.release(attempt.key), self._staging_held)

    # -- what engines say

    def computing(self, job: Job, num_tokens: int, done_s: float) -> None:
        """See ``engine.Owner``."""
        attempt: _Attempt = job.owner
        if attempt.over or job is not attempt.prefill_job:
            return
        prompt = attempt.request.arrival.prompt_tokens
        num_bytes = self._blueprint.wire_bytes(attempt.route.codec, prompt) * num_tokens / prompt
        begins = not attempt.made_bytes
        attempt.made_bytes += num_bytes
        attempt.made_s = done_s
        if attempt.transfer is not None:
            left = attempt.transfer.left_bytes + num_bytes
            self.links.put(attempt.transfer, num_bytes, self._made_rate(attempt, left))
        elif begins:
            self._ask_staging(attempt)

    def first(self, job: Job) -> None:
        """See ``engine.Owner``."""
        attempt: _Attempt = job.owner
        if attempt.over:
            return
        if attempt.verified:
            self._leave_staging(attempt)
            return
        attempt.request.first_s = self.clock.now
        if job is attempt.prefill_job:
            attempt.all_made = True
            if attempt.transfer is not None:
                self.links.put(attempt.transfer, 0.0)
                self._drained(attempt)

    def done(self, job: Job) -> None:
        """See ``engine.Owner``."""
        attempt: _Attempt = job.owner
        if attempt.over or job is attempt.prefill_job:
            return
        request = attempt.request
        self._end(attempt)
        came, prompt, output = request.arrival
        self.outcome.finished(came, request.first_s, self.clock.now, prompt, output)

    # -- ends and failures

    def _end(self, attempt: _Attempt) -> None:
        """Nothing of an attempt is left anywhere (an engine may still compute what nobody waits for)."""
        attempt.over = True
        self._leave_route(attempt)
        self._leave_prefill(attempt)
        self._leave_staging(attempt)
        attempt.decode.involved.pop(attempt, None)
        self._look_drained(attempt.decode)

    def _fail(self, attempt: _Attempt, reason: str) -> None:
        self._end(attempt)
        self.outcome.fail(reason, self.clock.now)

    def _again(self, attempt: _Attempt, reason: str) -> None:
        """Try elsewhere, as long as the client has seen no token."""
        request = attempt.request
        if request.first_s >= 0 or request.num_attempts >= ATTEMPTS:
            self._fail(attempt, reason)
            return
        self._end(attempt)
        self.outcome.num_retried += 1
        self._try(request, frozenset(route_key(attempt.route)))

    def _leave_route(self, attempt: _Attempt) -> None:
        key = route_key(attempt.route)
        self.in_flight[key] -= 1
        if not self.in_flight[key]:
            del self.in_flight[key]

    def _move(self, attempt: _Attempt) -> None:
        """Decode is lost before it verified: the same transfer goes to another."""
        others = frozenset(name for name, each in self.replicas.items() if each.role == "prefill")
        exclude = (others | {attempt.decode.replica_id}) - {attempt.prefill.replica_id}
        route = self._router.pick(self._plan, self._states, self.in_flight, exclude)
        old = attempt.decode
        old.involved.pop(attempt, None)
        self._leave_staging(attempt)
        if route is None or not self.replicas[route.decode_replica_id].alive:
            self._again(attempt, "replica lost")
            return
        self.outcome.num_moved += 1
        self._leave_route(attempt)
        attempt.route = route
        self.in_flight[route_key(route)] += 1
        attempt.decode = self.replicas[route.decode_replica_id]
        attempt.decode.involved[attempt] = None
        attempt.path = self._blueprint.path(attempt.prefill.replica_id, attempt.decode.replica_id)
        attempt.num_moves += 1
        attempt.arriving = False
        if attempt.made_bytes:
            self._ask_staging(attempt)

    # -- what befalls replicas

    def _happen(self, happening: Happening) -> None:
        replica = self.replicas[happening.replica]
        if happening.what == "lost" and replica.alive:
            self._lose(replica)
        elif happening.what == "back" and not replica.alive:
            self._renew(replica, replica.role)
        elif happening.what == "flip" and replica.alive and replica.flip is None and happening.role != replica.role:
            replica.flip = happening
            self._state(replica, ReplicaState.DRAINING)
            self._look_drained(replica)

    def _lose(self, replica: _Replica) -> None:
        replica.alive = False
        replica.flip = None
        self._retire(replica)
        replica.engine.kill()
        self._suspect(replica)
        engine = replica.engine
        self.clock.at(self.clock.now + LOST_AFTER_S, self._notice, replica, engine)
        for attempt in list(replica.involved):
            if attempt.over:
                continue
            if attempt.decode is replica and attempt.prefill is not replica and not attempt.verified:
                self._move(attempt)
            else:
                self._again(attempt, "replica lost")

    def _notice(self, replica: _Replica, engine: Engine) -> None:
        if replica.engine is engine:
            self._state(replica, ReplicaState.LOST)

    def _look_drained(self, replica: _Replica) -> None:
        flip = replica.flip
        if flip is not None and flip.role is not None and not replica.involved:
            replica.flip = None
            self._retire(replica)
            replica.alive = False
            self.clock.at(self.clock.now + flip.takes_s, self._renew, replica, flip.role)

    def _renew(self, replica: _Replica, role: str) -> None:
        """A replica starts anew, maybe in another role; routes follow the roles."""
        if self.replicas[replica.replica_id] is not replica:
            return
        fresh = self._make(replica.replica_id, role)
        fresh.busy_s, fresh.num_preemptions = replica.busy_s, replica.num_preemptions
        changed = role != replica.role
        self.replicas[replica.replica_id] = fresh
        if changed:
            self._replan(self._blueprint.reroute({name: each.role for name, each in self.replicas.items()}))

    def _retire(self, replica: _Replica) -> None:
        replica.busy_s += max(replica.engine.busy_s)
        replica.num_preemptions += replica.engine.num_preemptions

    def _make(self, name: str, role: str) -> _Replica:
        spec = self._blueprint.replica(name, role)
        queued = self._settings.max_queued
        self._states[name] = ReplicaStatus(name, ReplicaState.READY, Load())
        return _Replica(
            name,
            role,
            spec,
            Engine(self.clock, spec.times, spec.limits, self),
            PagePool("send", spec.send_pages, queued),
            PagePool("staging", spec.staging_pages, queued),
            born_s=self.clock.now,
        )

    def _replan(self, routes: tuple[Route, ...]) -> None:
        replicas = tuple(
            Replica(name, Role.PREFILL if each.role == "prefill" else Role.DECODE, name, "", b"", name, 0, "")
            for name, each in self.replicas.items()
        )
        self._plan = Plan(self._plan.epoch + 1, replicas, routes)

    def _state(self, replica: _Replica, state: ReplicaState) -> None:
        self._states[replica.replica_id] = ReplicaStatus(replica.replica_id, state, Load())

    def _report(self) -> None:
        """Loads as workers report them, which the router may look at."""
        if self.clock.now < self._reported_s + REPORT_S:
            return
        self._reported_s = self.clock.now
        for name, replica in self.replicas.items():
            load = Load(
                replica.engine.num_running,
                replica.engine.num_waiting,
                replica.send.num_used + replica.staging.num_used,
                replica.send.num_pages + replica.staging.num_pages,
            )
            self._states[name] = ReplicaStatus(name, self._states[name].state, load)

    def _suspect(self, replica: _Replica) -> None:
        self._suspect_until[replica.replica_id] = self.clock.now + SUSPECT_S

    def _suspects(self) -> frozenset[str]:
        if not self._suspect_until:
            return frozenset()
        now = self.clock.now
        self._suspect_until = {name: until for name, until in self._suspect_until.items() if until > now}
        return frozenset(self._suspect_until)
