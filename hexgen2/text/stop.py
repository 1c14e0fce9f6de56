"""Stop texts in a stream: found across token boundaries, never given out, not even in part. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Found:
    """A stop text was met; ``text`` is what precedes it."""

    text: str
    stop: str


class StopMatcher:
    """Feed text; get back what can be given out.

    The end of the text is held back exactly while it may be the beginning of a stop text. Of several stop texts the one
    that is complete first wins; of those complete at the same character, the first of the list.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def feed(self, text: str, *, armed: bool = True) -> str | Found:
        """Add text. With ``armed`` false a stop text that becomes complete in it does not count (``min_tokens``)."""
        if not self._stops:
            return text
        seen, text = len(self._held), self._held + text
        if armed and (found := self._find(text, seen)):
            return found
        keep = self._partial(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What is held, when no more text will come."""
        held, self._held = self._held, ""
        return held

    def _find(self, text: str, seen: int) -> Found | None:
        best: tuple[int, str] | None = None
        for stop in self._stops:
            # It must end in the new text.
            start = text.find(stop, max(0, seen - len(stop) + 1))
            if start >= 0 and (best is None or start + len(stop) < best[0]):
                best = (start + len(stop), stop)
        if best is None:
            return None
        end, stop = best
        return Found(text[: end - len(stop)], stop)

    def _partial(self, text: str) -> int:
        """Length of the longest end of ``text`` that begins a stop text without being all of it."""
        for length in range(min(len(text), max(map(len, self._stops)) - 1), 0, -1):
            end = text[len(text) - length :]
            if any(len(stop) > length and stop.startswith(end) for stop in self._stops):
                return length
        return 0
