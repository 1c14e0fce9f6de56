"""One fleet's run: load, faults and meddling for so many seconds, then peace, and a look at what is left behind."""

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random

import httpx

from benchmarks.chaos.asks import Ask, check
from benchmarks.chaos.client import Client
from benchmarks.chaos.faults import Card, Strike, Striker
from benchmarks.chaos.house import REQUEST_TIMEOUT_S, House, HouseError
from benchmarks.chaos.meddler import Meddler
from benchmarks.chaos.oracle import Known
from benchmarks.chaos.outcome import End, Outcome
from benchmarks.chaos.verdict import Violation
from benchmarks.chaos.watch import QUARANTINE, RUNNING, USED, WAITING, SpanTail, rss_bytes, scrape, total
from hexgen2.cli.process import died
from hexgen2.text.tokenizer import TextModel
from hexgen2.worker.aio import owned

#: How long a fleet that is left alone may take until nothing is held: gRPC needs 30 s to find a peer that is gone.
QUIESCE_S = 60.0
#: Requests that a fleet left alone must answer, every one.
NUM_CHECKS = 24
WATCH_S = 0.5
LATENESS_S = 0.05
#: More requests than so many at a time wait for their turn.
MAX_IN_FLIGHT = 160
BURST_SIZE = 80

#: Told how many requests are over, how many were answered and how many faults there were.
Show = Callable[[int, int, int], None]


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked how fast. ``burst_every_s``: so often ``BURST_SIZE`` requests come at once (0: never)."""

    asks: Iterator[Ask]
    known: Sequence[Known]
    seconds: float
    rate: float
    seed: int
    burst_every_s: float
    #: Faults at a time.
    lanes: int
    #: How late an answer may be.
    grace_s: float


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident memory of one process, from soon after its (last) start to the end."""

    name: str
    starts: int
    seconds: float
    first_bytes: int
    last_bytes: int


@dataclass
class Seen:
    """What a run saw."""

    outcomes: list[Outcome] = field(default_factory=list)
    strikes: list[Strike] = field(default_factory=list)
    violations: list[Violation] = field(default_factory=list)
    meddling: dict[str, int] = field(default_factory=dict)
    memory: list[Memory] = field(default_factory=list)
    seconds: float = 0.0
    #: How late this process itself woke from 50 ms of sleep: how starved of CPU all of this was.
    late_p99_s: float = 0.0
    quiesce_s: float = 0.0
    max_used_bytes: float = 0.0
    max_quarantine_bytes: float = 0.0
    leaked_bytes: float = 0.0
    quarantine_bytes: float = 0.0


async def run(house: House, load: Load, cards: list[Card], text: TextModel, tail: SpanTail, show: Show) -> Seen:
    """Everything that happens to a fleet that is up."""
    seen = Seen()
    client = Client(house.grpc_address, house.http_address, text, REQUEST_TIMEOUT_S, load.grace_s)
    striker = Striker(house, cards, load.seed, load.lanes)
    meddler = Meddler(house, load.known, load.seed)
    watcher = _Watcher(house, seen)
    began = time.monotonic()
    try:
        async with owned(tail.run()), owned(watcher.run()), owned(watcher.measure_lateness()):
            async with owned(meddler.run()), asyncio.TaskGroup() as tasks:
                tasks.create_task(striker.run())
                await _ask_all(client, load, seen, striker, show)
                striker.rest()
            seen.strikes += striker.strikes
            seen.seconds = time.monotonic() - began
            await _quiesce(house, seen)
            await _check(client, load.known, seen)
            await _quiesce(house, seen)
    finally:
        await client.close()
    watcher.finish()
    seen.meddling = {f"{trick}: {status}": num for (trick, status), num in sorted(meddler.counts.items())}
    seen.violations += [Violation("meddling succeeded", what) for what in meddler.wrong]
    seen.violations += watcher.deaths
    return seen


async def _ask_all(client: Client, load: Load, seen: Seen, striker: Striker, show: Show) -> None:
    """An open loop: requests come when they come, however the fleet fares. Returns when all are over."""
    random = Random(f"arrivals/{load.seed}")
    room = asyncio.Semaphore(MAX_IN_FLIGHT)
    answered = 0

    async def one(ask: Ask) -> None:
        nonlocal answered
        async with room:
            outcome = await client.ask(ask)
        seen.outcomes.append(outcome)
        answered += outcome.end is End.ANSWERED
        show(len(seen.outcomes), answered, striker.num_dealt)

    began = time.monotonic()
    due, burst_due = began, began + load.burst_every_s
    async with asyncio.TaskGroup() as tasks:
        while (now := time.monotonic()) < began + load.seconds:
            if load.burst_every_s and now >= burst_due:
                burst_due = now + load.burst_every_s
                at_ns = time.time_ns()
                for _ in range(BURST_SIZE):
                    tasks.create_task(one(next(load.asks)))
                seen.strikes.append(Strike("burst: requests", "gateway", at_ns, at_ns + 1_000_000_000))
            if room.locked():
                # All turns are taken: what would come meanwhile never comes, as when clients hold back.
                due = time.monotonic() + 0.1
            else:
                tasks.create_task(one(next(load.asks)))
                due += random.expovariate(load.rate)
            await asyncio.sleep(max(0.0, due - time.monotonic()))


async def _quiesce(house: House, seen: Seen) -> None:
    """Wait until everyone serves and nobody holds anything; whatever is left then is leaked."""
    began = time.monotonic()
    left: dict[str, dict[str, float]] = {}
    late: list[str] = []
    async with httpx.AsyncClient(timeout=2.0) as client:
        while time.monotonic() < began + QUIESCE_S:
            late = await house.not_ready()
            left = {} if late else await _left(house, client)
            if not late and not left:
                break
            await asyncio.sleep(0.25)
    seen.quiesce_s = max(seen.quiesce_s, time.monotonic() - began)
    seen.leaked_bytes = sum(each.get(USED, 0.0) for each in left.values())
    seen.quarantine_bytes = sum(each.get(QUARANTINE, 0.0) for each in left.values())
    for name in late:
        seen.violations.append(Violation("does not serve", f"{name}, left alone for {QUIESCE_S:.0f} s"))
    for name, values in left.items():
        held = ", ".join(f"{metric.partition(':')[2]} {value:.0f}" for metric, value in values.items())
        seen.violations.append(Violation("leak", f"{name}, left alone for {QUIESCE_S:.0f} s: {held}"))


async def _left(house: House, client: httpx.AsyncClient) -> dict[str, dict[str, float]]:
    """What each process still holds."""
    left = {}
    for member in house.workers:
        metrics = await scrape(client, member.metrics_address)
        held = {name: value for name in (USED, QUARANTINE, RUNNING, WAITING) if (value := total(metrics, name))}
        if not metrics:
            held = {"unreachable": 1.0}
        if held:
            left[member.name] = held
    running = total(await scrape(client, house.http_address), RUNNING)
    return left | ({"gateway": {RUNNING: running}} if running else {})


async def _check(client: Client, known: Sequence[Known], seen: Seen) -> None:
    """A fleet that is left alone answers everything."""
    checks = [check(-number, known[number % len(known)]) for number in range(1, NUM_CHECKS + 1)]
    for outcome in await asyncio.gather(*(client.ask(each) for each in checks)):
        seen.outcomes.append(outcome)
        if outcome.end is not End.ANSWERED:
            detail = f"{outcome.status}: {outcome.detail}"
            seen.violations.append(Violation("not answered in peace", detail, outcome.trace_id))


class _Watcher:
    """Looks at every process from time to time: who died by itself, how much is held, how large it grows."""

    def __init__(self, house: House, seen: Seen) -> None:
        self.deaths: list[Violation] = []
        self._house = house
        self._seen = seen
        self._first: dict[str, tuple[int, float, int]] = {}
        self._late: list[float] = []

    async def run(self) -> None:
        """Until cancelled."""
        async with httpx.AsyncClient(timeout=1.0) as client:
            while True:
                for member in self._house.members.values():
                    process = member.process
                    if process.returncode is not None and not member.struck:
                        member.struck = True
                        self.deaths.append(Violation("died by itself", died(process)))
                        # Whoever holds the lock starts it himself.
                        if not member.lock.locked():
                            await self._house.start_one(member)
                    elif self._first.get(member.name, (0, 0.0, 0))[0] != process.pid and process.age_s > 8.0:
                        self._first[member.name] = process.pid, process.age_s, rss_bytes(process.pid)
                for member in self._house.workers:
                    if not member.lock.locked():
                        metrics = await scrape(client, member.metrics_address)
                        seen = self._seen
                        seen.max_used_bytes = max(seen.max_used_bytes, total(metrics, USED))
                        seen.max_quarantine_bytes = max(seen.max_quarantine_bytes, total(metrics, QUARANTINE))
                await asyncio.sleep(WATCH_S)

    async def measure_lateness(self) -> None:
        """Until cancelled."""
        while True:
            due = time.monotonic() + LATENESS_S
            await asyncio.sleep(LATENESS_S)
            self._late.append(time.monotonic() - due)

    def finish(self) -> None:
        """Note the memory of every process at the end, and how late we were."""
        late = sorted(self._late) or [0.0]
        self._seen.late_p99_s = late[int(len(late) * 0.99)]
        for member in self._house.members.values():
            pid, _, first = self._first.get(member.name, (0, 0.0, 0))
            process = member.process
            now = rss_bytes(process.pid) if process.returncode is None else 0
            if pid == process.pid and now:
                self._seen.memory.append(Memory(member.name, member.starts, process.age_s, first, now))


def retried(house: House) -> frozenset[str]:
    """Traces of requests that the gateway tried a second time, or moved to another decode replica."""
    traces = set()
    for line in house.members["gateway"].process.log_file.read_text(errors="replace").splitlines():
        if '"attempt_failed"' in line or '"decode_moved"' in line:
            try:
                traces.add(json.loads(line).get("trace_id", ""))
            except ValueError:
                continue
    return frozenset(traces)


def crashes(house: House) -> list[Violation]:
    """Errors of ours in the logs: what a client was told of as INTERNAL, and what nobody was told of."""
    found = []
    for member in house.members.values():
        for line in member.process.log_file.read_text(errors="replace").splitlines():
            if '"level": "error"' in line or line.startswith("Traceback"):
                found.append(Violation("error in a log", f"{member.name}: {line[:600]}"))
    return found


__all__ = ["HouseError", "Load", "Memory", "Seen", "crashes", "retried", "run"]
