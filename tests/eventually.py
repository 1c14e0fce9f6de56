"""Waiting in tests for what nobody announces."""

import asyncio
from collections.abc import Awaitable, Callable

DEADLINE_S = 20.0


async def eventually(condition: Callable[[], bool]) -> None:
    """Return once ``condition`` holds; TimeoutError after ``DEADLINE_S``."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110, there is no event to wait for
            await asyncio.sleep(0.001)


async def eventually_async(condition: Callable[[], Awaitable[bool]]) -> None:
    """The same for a condition that must be asked for."""
    async with asyncio.timeout(DEADLINE_S):
        while not await condition():  # noqa: ASYNC110, as above
            await asyncio.sleep(0.05)
