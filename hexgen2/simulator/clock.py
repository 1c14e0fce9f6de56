"""Simulated time: what happens next, in order of time and, at equal times, of when it was planned."""

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

#: Anything that is done at a time, with its arguments.
Action = Callable[..., None]


class Clock:
    """``now`` is in seconds and never goes back."""

    def __init__(self) -> None:
        self.now = 0.0
        self.num_events = 0
        self._heap: list[tuple[float, int, Action, tuple[Any, ...]]] = []
        self._planned = 0

    def at(self, time_s: float, action: Action, *args: Any) -> None:
        """Plan an action. Raises ValueError for a time that is over."""
        if time_s < self.now:
            raise ValueError(f"an action is planned for {time_s} s, which is before {self.now} s")
        self._planned += 1
        heappush(self._heap, (time_s, self._planned, action, args))

    def step(self) -> bool:
        """Do what is next; False when nothing is."""
        if not self._heap:
            return False
        time_s, _, action, args = heappop(self._heap)
        self.now = time_s
        self.num_events += 1
        action(*args)
        return True
