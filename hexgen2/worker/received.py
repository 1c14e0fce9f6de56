"""What a worker tells of the KV that it received: sums over the last minute, and what went wrong. Pure."""

from collections import deque
from dataclasses import dataclass

from hexgen2.plan import KvReceived

WINDOW_S = 60.0


@dataclass(frozen=True, slots=True)
class _Transfer:
    at_s: float
    num_bytes: int
    seconds: float


class Received:
    """Of one worker. Times are one clock's."""

    def __init__(self, window_s: float = WINDOW_S) -> None:
        self._window_s = window_s
        self._transfers: deque[_Transfer] = deque()
        self._num_corrupt = 0

    def verified(self, num_bytes: int, seconds: float, now_s: float) -> None:
        """A hand-off of so many bytes is complete; it took so long."""
        self._forget(now_s)
        self._transfers.append(_Transfer(now_s, num_bytes, seconds))

    def corrupt(self) -> None:
        """One was refused: its bytes did not match their digest."""
        self._num_corrupt += 1

    def told(self, now_s: float, quarantine_bytes: int) -> KvReceived:
        """For a report that is made now."""
        self._forget(now_s)
        return KvReceived(
            num_bytes=sum(each.num_bytes for each in self._transfers),
            seconds=sum(each.seconds for each in self._transfers),
            num_transfers=len(self._transfers),
            num_corrupt=self._num_corrupt,
            quarantine_bytes=quarantine_bytes,
        )

    def _forget(self, now_s: float) -> None:
        while self._transfers and self._transfers[0].at_s <= now_s - self._window_s:
            self._transfers.popleft()
