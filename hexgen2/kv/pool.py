"""A bounded pool of equal pages with a bounded line of waiters, first come first served. Pure.

Time comes in as ``now`` and ``deadline``, seconds of one clock.
"""

from collections import OrderedDict
from dataclasses import dataclass
from math import inf

from hexgen2.errors import KvTooLarge, Overloaded


@dataclass(frozen=True, slots=True)
class Grant:
    """Pages that ``key`` now holds."""

    key: str
    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Wait:
    num_pages: int
    deadline: float


class PagePool:
    """Pages by number. A key waits until all it asked for is free, and none behind it overtakes.

    Invariant: every page is either free or held by exactly one key; a key waits or holds, never both.
    """

    def __init__(self, name: str, num_pages: int, max_queued: int) -> None:
        self.name = name
        self.num_pages = num_pages
        self.max_queued = max_queued
        self._free = list(range(num_pages - 1, -1, -1))
        self._held: dict[str, tuple[int, ...]] = {}
        self._line: OrderedDict[str, _Wait] = OrderedDict()

    @property
    def num_used(self) -> int:
        """Pages held."""
        return self.num_pages - len(self._free)

    @property
    def num_waiting(self) -> int:
        """Keys in line."""
        return len(self._line)

    def check(self, num_pages: int) -> None:
        """Whether so much could be asked for now; asks for nothing.

        Raises:
            KvTooLarge: more than the whole pool.
            Overloaded: the line is full.
        """
        if num_pages > self.num_pages:
            raise KvTooLarge(f"KV needs {num_pages} pages of {self.name}, which has {self.num_pages} in all")
        if (self._line or num_pages > len(self._free)) and len(self._line) >= self.max_queued:
            raise Overloaded(f"{self.name} is full and {len(self._line)} requests wait (limit {self.max_queued})")

    def request(self, key: str, num_pages: int, deadline: float = inf) -> Grant | None:
        """Pages at once, or None: the key waits in line, until ``deadline``, for a Grant from ``release``.

        Raises:
            KvTooLarge, Overloaded: as ``check``.
        """
        if key in self._held or key in self._line:
            raise ValueError(f"{key} already holds or awaits pages of {self.name}")
        self.check(num_pages)
        if not self._line and num_pages <= len(self._free):
            return self._grant(key, num_pages)
        self._line[key] = _Wait(num_pages, deadline)
        return None

    def release(self, key: str, now: float = -inf) -> list[Grant]:
        """Take the key's pages back, or its place in line, and serve the line. Unknown keys hold nothing.

        Who has waited past its deadline is passed over and leaves the line without a word: it has gone, or is going.
        """
        self._free.extend(self._held.pop(key, ()))
        self._line.pop(key, None)
        grants = []
        while self._line:
            waiting, wait = next(iter(self._line.items()))
            if now < wait.deadline and wait.num_pages > len(self._free):
                break
            del self._line[waiting]
            if now < wait.deadline:
                grants.append(self._grant(waiting, wait.num_pages))
        return grants

    def _grant(self, key: str, num_pages: int) -> Grant:
        pages = tuple(self._free.pop() for _ in range(num_pages))
        self._held[key] = pages
        return Grant(key, pages)
