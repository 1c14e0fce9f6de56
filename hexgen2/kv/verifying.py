"""A thread that verifies what has landed while the next reads run. What it is given comes back in order."""

from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread
from typing import Generic, TypeVar

W = TypeVar("W")
R = TypeVar("R")


class Verifier(Generic[W, R]):
    """One thread gives work and collects what came of it; ``verify`` runs here or there, never in both at once.

    Args:
        verify: releases the GIL for most of its time, or a thread gains nothing.
        wake: called by the thread when there is something to collect; None: no thread, all is done as it is given.
    """

    def __init__(self, verify: Callable[[W], R], wake: Callable[[], None] | None) -> None:
        self._verify = verify
        self._wake = wake
        self._given: SimpleQueue[W | None] = SimpleQueue()
        #: By the thread, and by the caller itself.
        self._there: deque[tuple[W, R] | Exception] = deque()
        self._here: list[tuple[W, R]] = []
        self._num_there = 0
        self._thread: Thread | None = None

    def give(self, work: W, *, here: bool) -> None:
        """Verify ``work``: at once where ``here`` and the thread has nothing to do, which saves waking it."""
        if self._wake is None or (here and not self._num_there):
            self._here.append((work, self._verify(work)))
            return
        if self._thread is None:
            self._thread = Thread(target=self._main, args=(self._wake,), name="kv-verify", daemon=True)
            self._thread.start()
        self._num_there += 1
        self._given.put(work)

    def collect(self) -> list[tuple[W, R]]:
        """What is verified since the last call. Raises what ``verify`` raised."""
        collected: list[tuple[W, R]] = []
        while self._there:
            each = self._there.popleft()
            if isinstance(each, Exception):
                raise each
            self._num_there -= 1
            collected.append(each)
        collected += self._here
        self._here.clear()
        return collected

    def stop(self) -> None:
        """End the thread. Idempotent."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._given.put(None)
            thread.join()

    def _main(self, wake: Callable[[], None]) -> None:
        while (work := self._given.get()) is not None:
            try:
                self._there.append((work, self._verify(work)))
            except Exception as error:
                # The top of a thread: whoever collects raises it.
                self._there.append(error)
            wake()
