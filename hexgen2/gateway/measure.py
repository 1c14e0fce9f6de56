"""What a gateway measures of its requests over the last minute: rates, lengths, times. Pure; callers tell the time."""

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass

from hexgen2.plan import Measured
from hexgen2.routing import RouteKey

WINDOW_S = 60.0


@dataclass(frozen=True, slots=True)
class Ended:
    """A request that ended well, at ``at_s``, over ``route``. ``tpot_s`` counts where there was more than one token."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    ttft_s: float
    tpot_s: float
    route: RouteKey = ("", "")


class Measures:
    """Requests that arrived, ended and failed in the last ``window_s`` seconds; ``began_s`` is when it was made."""

    def __init__(self, began_s: float, window_s: float = WINDOW_S) -> None:
        self._began_s = began_s
        self._window_s = window_s
        self._arrived: deque[float] = deque()
        self._failed: deque[float] = deque()
        self._ended: deque[Ended] = deque()

    def arrived(self, now_s: float) -> None:
        """A request came in."""
        self._arrived.append(now_s)

    def failed(self, now_s: float) -> None:
        """One ended with an error that was not its own."""
        self._failed.append(now_s)

    def ended(self, ended: Ended) -> None:
        """One ended well."""
        self._ended.append(ended)

    def by_route(self, now_s: float) -> Mapping[RouteKey, int]:
        """How many ended well over each route in the window that ends now."""
        self._forget(now_s)
        return Counter(each.route for each in self._ended)

    def measured(self, now_s: float) -> Measured:
        """The window that ends now; shorter in the first minute."""
        self._forget(now_s)
        several = [each.tpot_s for each in self._ended if each.output_tokens > 1]
        return Measured(
            window_s=max(0.0, min(self._window_s, now_s - self._began_s)),
            num_arrived=len(self._arrived),
            num_finished=len(self._ended),
            num_failed=len(self._failed),
            mean_prompt_tokens=_mean([each.prompt_tokens for each in self._ended]),
            mean_output_tokens=_mean([each.output_tokens for each in self._ended]),
            mean_ttft_s=_mean([each.ttft_s for each in self._ended]),
            mean_tpot_s=_mean(several),
        )

    def _forget(self, now_s: float) -> None:
        since = now_s - self._window_s
        for times in (self._arrived, self._failed):
            while times and times[0] <= since:
                times.popleft()
        while self._ended and self._ended[0].at_s <= since:
            self._ended.popleft()


def _mean(values: "list[float] | list[int]") -> float:
    return sum(values) / len(values) if values else 0.0
