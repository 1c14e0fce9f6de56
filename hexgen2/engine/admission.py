"""Lets so many in at a time, first come first served; how many may change while others wait."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Admission:
    """See the module. A lower ``limit`` sends nobody out."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._inside = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def limit(self) -> int:
        """How many may be inside."""
        return self._limit

    @limit.setter
    def limit(self, limit: int) -> None:
        self._limit = limit
        self._let_in()

    @asynccontextmanager
    async def inside(self) -> AsyncIterator[None]:
        """Wait for a place and hold it for the length of the block; who is cancelled leaves the line."""
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        self._let_in()
        try:
            await place
            yield
        finally:
            if place.done() and not place.cancelled():
                self._inside -= 1
            else:
                place.cancel()
                self._waiting.remove(place)
            self._let_in()

    def _let_in(self) -> None:
        while self._waiting and self._inside < self._limit:
            place = self._waiting.popleft()
            self._inside += 1
            place.set_result(None)
