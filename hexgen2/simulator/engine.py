"""One replica's engine: continuous batching with chunked prefill, KV memory with pre-emption, a pipeline of stages.

As vLLM's: requests in decode go first, prompts fill what a step has room for, first come first served; when KV memory
is full the latest request gives its own up and is computed again. Requests in decode are shared out over lanes
(micro-batches), as many as the pipeline needs. Each step costs the same however many requests it serves: a lane knows
in which of its steps a request will be complete.
"""

from collections import deque
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from math import ceil, inf, sqrt
from typing import Any, Protocol, TypeAlias

from hexgen2.simulator.clock import Clock
from hexgen2.simulator.step_times import Step, StepTimes

#: A part of a prompt in a step: so many tokens of a job, and whether they are its last.
Part: TypeAlias = "tuple[Job, int, bool]"

#: Steps of pure decode that are taken at once at most.
MOST_STEPS = 4096


@dataclass(frozen=True, slots=True)
class Limits:
    """What an engine may do at once.

    ``max_num_seqs`` and ``max_num_batched_tokens`` are per lane and step. Whole prompts share a step up to
    ``shared_tokens``; None: prompts fill a step to its last token, and may be cut anywhere.
    """

    kv_tokens: float = inf
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    shared_tokens: int | None = None
    num_lanes: int = 1
    #: Prompts in one step.
    max_prompts: int = 1_000_000
    #: Whether a step may hold both phases (chunked prefill); else each is of one, prefill first.
    mixes: bool = True


@dataclass(slots=True)
class Job:
    """One request in one engine: ``num_prompt`` tokens to compute, of which ``num_computed`` are; then ``num_outputs``.

    A job that starts with all but one token computed is one whose KV was handed over.
    """

    owner: Any
    order: int
    num_prompt: int
    num_outputs: int
    num_computed: int = 0
    num_made: int = 0
    #: Tokens in KV memory when it joined its lane, and the lane's steps at that time.
    kv_tokens: int = 0
    joined_step: int = 0
    handed_over: bool = False


class Owner(Protocol):
    """Who gives jobs to an engine."""

    def computing(self, job: Job, num_tokens: int, done_s: float) -> None:
        """So many of its prompt's tokens will have KV at that time."""

    def first(self, job: Job) -> None:
        """Its first token of this engine is there."""

    def done(self, job: Job) -> None:
        """All of its tokens are; its KV memory is free."""


@dataclass(slots=True)
class _Lane:
    """Requests in decode that step together. ``heap``: (step in which it will be complete, order, job)."""

    heap: list[tuple[int, int, Job]] = field(default_factory=list)
    joining: list[Job] = field(default_factory=list)
    num_steps: int = 0
    context_tokens: int = 0
    busy: bool = False

    @property
    def size(self) -> int:
        return len(self.heap) + len(self.joining)


@dataclass(slots=True)
class _Run:
    """Steps of pure decode in a row: the first takes ``first_s``, each further one ``growth_s`` longer."""

    lane: _Lane
    began_s: float
    num_steps: int
    first_s: float
    growth_s: float
    #: Mean seconds of a step in each part of the pipeline.
    parts_s: tuple[float, ...]

    def after(self, num_steps: int) -> float:
        return num_steps * self.first_s + self.growth_s * num_steps * (num_steps - 1) / 2

    def steps_by(self, seconds: float) -> int:
        """The fewest steps that take at least so long."""
        if self.first_s <= 0:
            return self.num_steps
        if self.growth_s * self.num_steps < 1e-9 * self.first_s:
            steps = seconds / self.first_s
        else:
            b = self.first_s - self.growth_s / 2
            steps = (sqrt(b * b + 2 * self.growth_s * seconds) - b) / self.growth_s
        return max(1, min(self.num_steps, ceil(steps - 1e-9)))


class Engine:
    """See the module. ``owner`` hears what happens to jobs."""

    def __init__(self, clock: Clock, times: StepTimes, limits: Limits, owner: Owner) -> None:
        self.limits = limits
        self.kv_used = 0
        self.num_preemptions = 0
        self.busy_s = [0.0] * times.num_parts
        self.num_steps = 0
        self._clock, self._times, self._owner = clock, times, owner
        self._waiting: deque[Job] = deque()
        self._partial: list[Job] = []
        self._lanes = [_Lane() for _ in range(limits.num_lanes)]
        self._idle: deque[_Lane] = deque(self._lanes)
        self._free_s = [0.0] * times.num_parts
        self._run: _Run | None = None
        #: Counts what makes planned events void: a run cut short, the end of the engine.
        self._version = 0
        self._wake_s = -1.0
        self._held = False
        self._dead = False
        self._num_running = 0
        self._kv_seconds = 0.0
        self._kv_since = 0.0

    @property
    def num_running(self) -> int:
        """Requests that hold KV memory."""
        return self._num_running

    @property
    def num_waiting(self) -> int:
        """Requests that hold none yet, or no more."""
        return len(self._waiting)

    @property
    def mean_kv_tokens(self) -> float:
        """Over the time so far."""
        self._count_kv()
        return self._kv_seconds / self._clock.now if self._clock.now > 0 else 0.0

    def fits(self, num_tokens: int) -> bool:
        """Whether a request of that length, prompt and answer, could be served at all."""
        return num_tokens <= self.limits.kv_tokens

    def submit(self, job: Job) -> None:
        """Take a request; ``fits`` must hold for it."""
        self._waiting.append(job)
        if self._run is not None and self._admits(self._waiting[0]):
            self._cut(self._run)
        self._kick()

    def kill(self) -> None:
        """Forget everything; nobody hears of it."""
        self._dead = True
        self._version += 1
        self._count_kv()
        self.kv_used = 0
        self._num_running = 0
        self._waiting.clear()

    def _admits(self, job: Job) -> bool:
        """Whether there is memory for it now. An engine without requests admits whatever fits at all."""
        limits = self.limits
        if self._num_running == 0:
            return True
        needed = job.num_computed if job.handed_over else job.num_prompt
        return (
            self._num_running < limits.max_num_seqs * limits.num_lanes
            # vLLM's watermark: room for running requests to grow.
            and self.kv_used + needed <= 0.99 * limits.kv_tokens
        )

    def _count_kv(self) -> None:
        now = self._clock.now
        self._kv_seconds += self.kv_used * (now - self._kv_since)
        self._kv_since = now

    def _hold_kv(self, num_tokens: int) -> None:
        self._count_kv()
        self.kv_used += num_tokens

    def _kick(self) -> None:
        """Start what can start now."""
        if self._held or self._dead:
            return
        if self._waiting and self._waiting[0].handed_over:
            self._join_handed_over()
        now = self._clock.now
        while self._idle and self._free_s[0] <= now:
            for _ in range(len(self._idle)):
                lane = self._idle.popleft()
                if self._start(lane):
                    break
                self._idle.append(lane)
            else:
                return
        # The first stage is at work: look again when it is free, if there is anything to start then.
        if self._idle and self._wake_s < self._free_s[0]:
            work = self._waiting or self._partial
            if not work:
                for lane in self._idle:
                    if lane.heap or lane.joining:
                        break
                else:
                    return
            self._wake_s = self._free_s[0]
            self._clock.at(self._wake_s, self._kick)

    def _join_handed_over(self) -> None:
        """Requests whose KV is there go straight to the lane with the fewest."""
        while self._waiting and self._waiting[0].handed_over and self._admits(self._waiting[0]):
            job = self._waiting.popleft()
            self._num_running += 1
            job.kv_tokens = job.num_computed
            self._hold_kv(job.num_computed)
            self._join(job)

    def _join(self, job: Job) -> None:
        min(self._lanes, key=lambda lane: lane.size).joining.append(job)

    def _start(self, lane: _Lane) -> bool:
        """One step of a lane, or several of pure decode; False when it has nothing to do."""
        if not self.limits.mixes and (self._waiting or self._partial):
            parts = self._take(0)
            if parts:
                self._start_step(lane, 0, parts, [])
                return True
        new = []
        for job in lane.joining:
            if job.num_made == 0:
                new.append(job)
            job.joined_step = lane.num_steps
            heappush(lane.heap, (lane.num_steps + job.num_outputs - job.num_made, job.order, job))
            lane.context_tokens += job.kv_tokens
        lane.joining.clear()
        while lane.heap and self.kv_used + len(lane.heap) > self.limits.kv_tokens:
            self._preempt(lane, new)
        batch = len(lane.heap)
        parts = self._take(batch) if self.limits.mixes and (self._waiting or self._partial) else []
        if not batch and not parts:
            return False
        if not parts and not new and self._start_run(lane, batch):
            return True
        self._start_step(lane, batch, parts, new)
        return True

    def _start_step(self, lane: _Lane, batch: int, parts: list[Part], new: list[Job]) -> None:
        """Prompts, decode or both; ``batch`` 0 leaves the lane's requests as they are."""
        lane.busy = True
        self.num_steps += 1
        end = self._pass(self._times.parts(self._step(lane, batch, parts)))
        for job, num_tokens, _ in parts:
            self._owner.computing(job, num_tokens, end)
        self._clock.at(end, self._end, self._version, lane, min(batch, 1), parts, new)

    def _start_run(self, lane: _Lane, batch: int) -> bool:
        """Several steps of decode as one event, where nothing else can happen meanwhile."""
        for other in self._lanes:
            if other is not lane and (other.busy or other.heap or other.joining):
                return False
        room = self.limits.kv_tokens - self.kv_used
        num_steps = min(lane.heap[0][0] - lane.num_steps, MOST_STEPS)
        if room < num_steps * batch:
            num_steps = int(room // batch)
        if num_steps < 2:
            return False
        first = self._times.parts(self._step(lane, batch, []))
        grown = lane.context_tokens + (num_steps - 1) * batch
        last = self._times.parts(Step(0, 0.0, 0, 0, batch, grown, batch))
        first_s, last_s = sum(first), sum(last)
        parts_s = tuple((a + b) / 2 for a, b in zip(first, last, strict=True))
        growth_s = (last_s - first_s) / (num_steps - 1)
        lane.busy = True
        self.num_steps += 1
        self._run = _Run(lane, self._clock.now, num_steps, first_s, growth_s, parts_s)
        self._plan_run_end(self._run)
        return True

    def _plan_run_end(self, run: _Run) -> None:
        end = max(self._clock.now, run.began_s + run.after(run.num_steps))
        self._free_s = [end] * len(self._free_s)
        self._clock.at(end, self._end, self._version, run.lane, run.num_steps, [], [])

    def _cut(self, run: _Run) -> None:
        """End the run with the step that is under way."""
        num_steps = run.steps_by(self._clock.now - run.began_s)
        if num_steps < run.num_steps:
            # Nothing but the run's end is planned while it lasts: that becomes void.
            self._version += 1
            run.num_steps = num_steps
            self._plan_run_end(run)

    def _step(self, lane: _Lane, batch: int, parts: list[Part]) -> Step:
        tokens = shared = finishing = 0
        attended = 0.0
        for number, (job, num_tokens, last) in enumerate(parts):
            tokens += num_tokens
            before = job.num_computed - num_tokens
            attended += num_tokens * (before + num_tokens / 2)
            shared += num_tokens if number else 0
            finishing += last
        context = lane.context_tokens if batch else 0
        return Step(tokens, attended, shared, len(parts), batch, context, batch + finishing)

    def _pass(self, seconds: tuple[float, ...]) -> float:
        """Send a step through the pipeline: each part begins it when it and the one before are done."""
        time_s, free_s = self._clock.now, self._free_s
        for part, needed in enumerate(seconds):
            if free_s[part] > time_s:
                time_s = free_s[part]
            time_s += needed
            free_s[part] = time_s
            self.busy_s[part] += needed
        return time_s

    def _take(self, batch: int) -> list[Part]:
        """Parts of prompts for a step that has ``batch`` requests in decode already."""
        limits = self.limits
        budget = limits.max_num_batched_tokens - batch
        parts: list[Part] = []
        taken = 0
        while budget > 0 and len(parts) < limits.max_prompts:
            if self._partial:
                job = self._partial[0]
            elif self._waiting and not self._waiting[0].handed_over and self._admits(self._waiting[0]):
                job = self._waiting[0]
            else:
                break
            missing = job.num_prompt - job.num_computed
            if parts and limits.shared_tokens is not None and taken + missing > limits.shared_tokens:
                break
            if not self._partial:
                self._waiting.popleft()
                self._num_running += 1
                job.kv_tokens = job.num_prompt
                self._hold_kv(job.num_prompt)
                self._partial.append(job)
            num_tokens = min(budget, missing)
            job.num_computed += num_tokens
            last = job.num_computed == job.num_prompt
            if last:
                self._partial.pop()
            parts.append((job, num_tokens, last))
            budget -= num_tokens
            taken += num_tokens
        return parts

    def _preempt(self, lane: _Lane, new: list[Job]) -> None:
        """The latest request that no step is computing gives up its memory, and waits in front of the others."""
        lanes = [other for other in self._lanes if not other.busy and other.heap]
        lane_of_latest = max(lanes, key=lambda each: max(order for _, order, _ in each.heap))
        latest = max(lane_of_latest.heap, key=lambda entry: entry[1])
        lane_of_latest.heap.remove(latest)
        heapify(lane_of_latest.heap)
        job = latest[2]
        done = lane_of_latest.num_steps - job.joined_step
        held = job.kv_tokens + done
        lane_of_latest.context_tokens -= held
        self._hold_kv(-held)
        self._num_running -= 1
        self.num_preemptions += 1
        job.num_made += done
        # What it has made is prompt now.
        job.num_prompt = held + 1
        job.num_computed = 0
        job.handed_over = False
        if job in new:
            new.remove(job)
        self._waiting.appendleft(job)

    def _end(self, version: int, lane: _Lane, num_steps: int, parts: list[Part], new: list[Job]) -> None:
        if version != self._version:
            return
        self._held = True
        if self._run is not None:
            for part, seconds in enumerate(self._run.parts_s):
                self.busy_s[part] += seconds * num_steps
            self._run = None
        lane.busy = False
        self._idle.append(lane)
        batch = len(lane.heap)
        lane.num_steps += num_steps
        lane.context_tokens += batch * num_steps
        self._hold_kv(batch * num_steps)
        for job in new:
            self._owner.first(job)
        while lane.heap and lane.heap[0][0] == lane.num_steps:
            _, _, job = heappop(lane.heap)
            done = lane.num_steps - job.joined_step
            job.num_made += done
            held = job.kv_tokens + done
            lane.context_tokens -= held
            self._free(job, held)
        for job, _, last in parts:
            if last:
                self._prompt_done(job)
        self._held = False
        self._kick()

    def _prompt_done(self, job: Job) -> None:
        job.num_made += 1
        if job.num_made == 1:
            self._owner.first(job)
        if job.num_made == job.num_outputs:
            self._free(job, job.kv_tokens)
        else:
            self._join(job)

    def _free(self, job: Job, num_tokens: int) -> None:
        self._hold_kv(-num_tokens)
        self._num_running -= 1
        self._owner.done(job)
