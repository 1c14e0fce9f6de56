"""Small tools for calls that own memory: clean-up that cannot be cancelled, owned tasks, a queue for pages, a gate."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing, asynccontextmanager, suppress
from math import inf
from typing import TypeVar

from hexgen2 import metrics
from hexgen2.errors import DeadlineExceeded, StaleEpoch, Unavailable
from hexgen2.kv.pool import Grant, PagePool
from hexgen2.kv.wire import CHUNK_TOKENS

T = TypeVar("T")


async def uninterrupted(work: Coroutine[object, object, None]) -> None:
    """Run ``work`` to its end even when the caller is cancelled meanwhile; the cancellation follows."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            if task.cancelled():
                raise
            cancelled = error
    task.result()
    if cancelled is not None:
        raise cancelled


@asynccontextmanager
async def owned(work: Coroutine[object, object, None]) -> AsyncIterator[asyncio.Task[None]]:
    """``work`` as a task for the length of a block; at its end cancelled and awaited, which raises its own error."""
    task = asyncio.ensure_future(work)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait((task,))
        if not task.cancelled():
            task.result()


def now() -> float:
    """The running loop's clock, which is ``time.monotonic``; deadlines are by it."""
    return asyncio.get_running_loop().time()


async def bounded(items: AsyncGenerator[T, None], deadline: float) -> AsyncGenerator[T, None]:
    """The same items; closes ``items`` at its end.

    Raises:
        DeadlineExceeded: at ``deadline``, when it is still waiting for the next.
    """
    async with aclosing(items):
        while True:
            try:
                async with asyncio.timeout_at(None if deadline == inf else deadline):
                    item = await anext(items)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise DeadlineExceeded("the engine did not answer before the deadline") from None
            yield item


class Changes:
    """Wakes those who wait for a state machine to change. ``notify`` after each change."""

    def __init__(self) -> None:
        self._changed = asyncio.Event()

    def notify(self) -> None:
        """It has changed."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def next(self, deadline: float = inf) -> None:
        """Return at the next change, or at ``deadline``."""
        with suppress(TimeoutError):
            async with asyncio.timeout_at(None if deadline == inf else deadline):
                await self._changed.wait()


class PageQueue:
    """``PagePool`` with waiting: who is cancelled leaves the line, who is granted holds until ``release``."""

    def __init__(self, pool: PagePool, page_bytes: int) -> None:
        self._pool = pool
        self._page_bytes = page_bytes
        self._waiting: dict[str, asyncio.Future[tuple[int, ...]]] = {}
        metrics.KV_POOL_BYTES_TOTAL.labels(pool.name).set(self.bytes_total)
        self._report()

    @property
    def bytes_used(self) -> int:
        """Held now, over all ranks."""
        return self._pool.num_used * self._page_bytes

    @property
    def bytes_total(self) -> int:
        """Of the whole pool, over all ranks."""
        return self._pool.num_pages * self._page_bytes

    @property
    def max_tokens(self) -> int:
        """Of one prompt: all pages."""
        return self._pool.num_pages * CHUNK_TOKENS

    @property
    def num_waiting(self) -> int:
        """Requests in line."""
        return self._pool.num_waiting

    def check(self, num_pages: int) -> None:
        """Refuse at once what ``acquire`` would refuse now. Raises as it does."""
        self._pool.check(num_pages)

    async def acquire(self, key: str, num_pages: int, deadline: float = inf) -> tuple[int, ...]:
        """Pages, as soon as it is this request's turn.

        Raises:
            KvTooLarge: more than the whole pool.
            Overloaded: the line is full.
            DeadlineExceeded: ``deadline`` passed first.
        """
        grant = self._pool.request(key, num_pages, deadline)
        if grant is not None:
            self._report()
            return grant.pages
        future: asyncio.Future[tuple[int, ...]] = asyncio.get_running_loop().create_future()
        self._waiting[key] = future
        granted = False
        try:
            async with asyncio.timeout_at(None if deadline == inf else deadline):
                pages = await future
            granted = True
            return pages
        except TimeoutError:
            raise DeadlineExceeded(f"no room in {self._pool.name} before the deadline") from None
        finally:
            if not granted:
                self.release(key)

    def release(self, key: str) -> None:
        """Give pages, or the place in line, back. Idempotent."""
        self._waiting.pop(key, None)
        self._serve(self._pool.release(key, now()))

    def _serve(self, grants: list[Grant]) -> None:
        for grant in grants:
            future = self._waiting.pop(grant.key)
            if future.cancelled():
                self._serve(self._pool.release(grant.key, now()))
            else:
                future.set_result(grant.pages)
        self._report()

    def _report(self) -> None:
        metrics.KV_POOL_BYTES_USED.labels(self._pool.name).set(self.bytes_used)


class Gate:
    """Counts the calls inside; closed, it lets none in and tells when the last has left. Made closed.

    Calls that were routed by a plan before ``role_epoch`` took this replica for another role: they are refused.
    """

    def __init__(self) -> None:
        self.role_epoch = 0
        self._inside = 0
        self._refusal = "this replica is starting; try another or later"
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def num_inside(self) -> int:
        """Calls running."""
        return self._inside

    @asynccontextmanager
    async def enter(self, plan_epoch: int = 0) -> AsyncIterator[None]:
        """For the length of a call that was routed by the plan of ``plan_epoch``; 0: by none.

        Raises:
            Unavailable: the process is starting or stopping.
            StaleEpoch: the replica has had another role since that plan.
        """
        if self._refusal:
            raise Unavailable(self._refusal)
        if 0 < plan_epoch < self.role_epoch:
            raise StaleEpoch(
                f"routed by plan {plan_epoch}, but this replica has had another role since plan {self.role_epoch}"
            )
        self._inside += 1
        self._empty.clear()
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._empty.set()

    def open(self) -> None:
        """Let calls in."""
        self._refusal = ""

    def close(self) -> None:
        """Let nobody in any more."""
        self._refusal = "this replica is draining; try another"

    async def wait_empty(self, timeout_s: float) -> bool:
        """Whether all calls ended within ``timeout_s``."""
        try:
            await asyncio.wait_for(self._empty.wait(), timeout_s)
        except TimeoutError:
            return False
        return True
