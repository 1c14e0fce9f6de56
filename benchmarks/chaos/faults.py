"""Faults, and the hand that deals them: every kind at every role, in random order, a few at a time."""

import asyncio
import signal
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

import httpx

from benchmarks.chaos.house import House, Member
from benchmarks.chaos.watch import OPEN, labelled, scrape
from hexgen2.bench.netns import Link

#: Between two faults of a lane.
PAUSE_S = (0.2, 3.0)
#: A process that starts again serves within this, also on a busy machine.
RESTART_S = 90.0
#: gRPC finds a stopped peer within 30 s; the fleet's own limit for a lost worker is 5 s.
VERY_LONG_S = 33.0


@dataclass(frozen=True, slots=True)
class Strike:
    """One fault. ``ended_ns``: mended, and whoever was killed serves again. ``states``: the transfers under way at the
    target just before, by state.
    """

    kind: str
    target: str
    began_ns: int
    ended_ns: int
    states: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Card:
    """One fault to come: what to do to whom. ``role`` is a worker's, or the name of a process."""

    kind: str
    role: str
    act: Callable[["Striker", Member], Awaitable[None]]


async def _kill(striker: "Striker", member: Member) -> None:
    house = striker.house
    await house.kill(member)
    await asyncio.sleep(striker.random.choice((0.0, 0.0, 0.5, 2.0)))
    await house.start_one(member)
    await striker.wait_serving(member)


async def _restart(striker: "Striker", member: Member) -> None:
    """As an operator does: SIGTERM, let it drain, start again."""
    member.struck = True
    member.process.send(signal.SIGTERM)
    await member.process.wait()
    await striker.house.start_one(member)
    await striker.wait_serving(member)


def _pause(shortest_s: float, longest_s: float) -> Callable[["Striker", Member], Awaitable[None]]:
    async def act(striker: "Striker", member: Member) -> None:
        member.process.send(signal.SIGSTOP)
        try:
            await asyncio.sleep(striker.random.uniform(shortest_s, longest_s))
        finally:
            member.process.send(signal.SIGCONT)

    return act


def _link(
    begin: Callable[[Link], None], end: Callable[[Link], None], shortest_s: float, longest_s: float
) -> Callable[["Striker", Member], Awaitable[None]]:
    async def act(striker: "Striker", member: Member) -> None:
        link = member.link
        assert link is not None
        await asyncio.to_thread(begin, link)
        try:
            await asyncio.sleep(striker.random.uniform(shortest_s, longest_s))
        finally:
            await asyncio.to_thread(end, link)

    return act


def deck(*, roles: Sequence[str], links: bool, seconds: float) -> list[Card]:
    """Every fault once. Those of links only where there are links; the longest only where there is time."""
    cards = [Card("kill -9", "coordinator", _kill), Card("kill -9", "gateway", _kill)]
    cards += [Card("stop, continue", "coordinator", _pause(0.2, 3.0))]
    for role in roles:
        cards += [
            Card("kill -9", role, _kill),
            Card("restart", role, _restart),
            Card("stop, continue", role, _pause(0.05, 0.6)),
            Card("stop, continue", role, _pause(0.6, 3.0)),
            Card("stopped until lost", role, _pause(6.0, 9.0)),
        ]
        if seconds >= 240.0:
            cards.append(Card("stopped past keepalive", role, _pause(VERY_LONG_S, VERY_LONG_S + 3.0)))
        if not links:
            continue
        cards += [
            Card("link down", role, _link(Link.down, Link.up, 0.2, 3.0)),
            Card("link silent", role, _link(Link.silence, Link.speak, 0.2, 3.0)),
            Card("link silent", role, _link(Link.silence, Link.speak, 6.0, 9.0)),
        ]
        for megabits in (2.0, 20.0):
            cards.append(Card("link shaped", role, _link(_shaper(megabits * 1e6), Link.unshape, 1.0, 4.0)))
    return cards


def _shaper(bits_per_s: float) -> Callable[[Link], None]:
    return lambda link: link.shape(bits_per_s)


class Striker:
    """Deals the deck until cancelled, ``lanes`` faults at a time; a fault under way is ended first."""

    def __init__(self, house: House, cards: list[Card], seed: int, lanes: int) -> None:
        self.house = house
        self.random = Random(f"faults/{seed}")
        self.strikes: list[Strike] = []
        self.num_dealt = 0
        self._cards = cards
        self._deck: deque[Card] = deque()
        self._lanes = lanes
        self._resting = asyncio.Event()

    async def run(self) -> None:
        """Until ``rest``."""
        async with httpx.AsyncClient(timeout=0.5) as client, asyncio.TaskGroup() as tasks:
            for _ in range(self._lanes):
                tasks.create_task(self._lane(client))

    def rest(self) -> None:
        """No more faults; ``run`` ends once those under way are over."""
        self._resting.set()

    async def wait_serving(self, member: Member) -> None:
        """Until a process that was started again serves."""
        deadline = time.monotonic() + RESTART_S
        # The coordinator may still take it for the one before.
        while time.monotonic() < deadline and member.process.returncode is None:
            if await self.house.serves(member):
                return
            await asyncio.sleep(0.2)

    async def _lane(self, client: httpx.AsyncClient) -> None:
        while not self._resting.is_set():
            if not self._deck:
                self._deck.extend(self.random.sample(self._cards, len(self._cards)))
            card = self._deck.popleft()
            candidates = [m for m in self.house.members.values() if card.role in (m.role, m.name)]
            if any(member.lock.locked() for member in candidates):
                # One of each role at a time: the others must carry on.
                self._deck.append(card)
                await asyncio.sleep(0.1)
                continue
            member = self.random.choice(candidates)
            async with member.lock:
                self.num_dealt += 1
                await self._strike(card, member, client)
            try:
                async with asyncio.timeout(self.random.uniform(*PAUSE_S)):
                    await self._resting.wait()
            except TimeoutError:
                pass

    async def _strike(self, card: Card, member: Member, client: httpx.AsyncClient) -> None:
        states: dict[str, int] = {}
        if member.role is not None:
            found = labelled(await scrape(client, member.metrics_address), OPEN, "state")
            states = {state: int(num) for state, num in found.items() if num}
        began_ns = time.time_ns()
        try:
            await card.act(self, member)
        finally:
            self.strikes.append(Strike(f"{card.kind}: {card.role}", member.name, began_ns, time.time_ns(), states))
