"""How much an engine may do at once, adapted to what its requests see against their limits. Pure.

Tokens that come too slowly: smaller parts of prompts beside them in a step, then fewer requests at once, at once by a
part of what there is. Room to spare while somebody waits: a little more of both, step by step (additive increase,
multiplicative decrease, as congestion control in networks), with a band between the two in which nothing changes.
"""

from dataclasses import dataclass, replace
from statistics import fmean

#: Where nothing changes: between this part of the limit of time per token, and the limit.
CALM = 0.85
#: What remains after a cut, and by how much limits are raised.
CUT_SEQS, CUT_TOKENS = 0.85, 0.7
RAISE_PART, RAISE_TOKENS_PART = 0.05, 0.15
#: Intervals after a cut in which nothing else is cut: requests that were admitted before still run.
HOLD = 4
#: Gaps, and first tokens, of one interval that are looked at.
MAX_SEEN = 4096


@dataclass(frozen=True, slots=True)
class Limits:
    """Requests that an engine works on at once, and tokens of one of its steps; vLLM's names."""

    max_num_seqs: int
    max_num_batched_tokens: int


@dataclass(frozen=True, slots=True)
class Seen:
    """Of one interval: the mean gap between tokens, which time per output token is the mean of; the longest wait for a
    first token (both 0: none was seen); requests in the engine and those that wait for it; whether it computed prompts.
    """

    tpot_s: float = 0.0
    ttft_s: float = 0.0
    num_running: int = 0
    num_waiting: int = 0
    prefilling: bool = False


@dataclass(frozen=True, slots=True)
class Targets:
    """What requests may wait; None: any time."""

    ttft_s: float | None = None
    tpot_s: float | None = None


class Batching:
    """See the module. ``most`` is what the engine was built for, ``least`` what it is never held below."""

    def __init__(self, targets: Targets, start: Limits, most: Limits, least: Limits | None = None) -> None:
        self._targets = targets
        self._most = most
        self._least = least or Limits(1, min(16, most.max_num_batched_tokens))
        self._hold = 0
        self.limits = self._within(start)

    def next(self, seen: Seen) -> Limits:
        """The limits for the next interval."""
        self._hold = max(0, self._hold - 1)
        tpot_s = self._targets.tpot_s
        if tpot_s is not None and seen.tpot_s > tpot_s:
            if not self._hold:
                self.limits = self._cut(seen)
                self._hold = HOLD
        elif seen.num_waiting and (tpot_s is None or seen.tpot_s < CALM * tpot_s):
            self.limits = self._raised(seen)
        return self.limits

    def _cut(self, seen: Seen) -> Limits:
        now = self.limits
        if seen.prefilling and now.max_num_batched_tokens > self._least.max_num_batched_tokens:
            return self._within(replace(now, max_num_batched_tokens=int(now.max_num_batched_tokens * CUT_TOKENS)))
        # From what runs, where that is less than what may: a limit that binds nobody helps nobody.
        bound = min(now.max_num_seqs, max(1, seen.num_running))
        return self._within(replace(now, max_num_seqs=int(bound * CUT_SEQS)))

    def _raised(self, seen: Seen) -> Limits:
        now, ttft_s = self.limits, self._targets.ttft_s
        # Who waits for longer than they may is worth larger steps up.
        hurry = 2 if ttft_s is not None and seen.ttft_s > ttft_s else 1
        seqs = now.max_num_seqs + hurry * max(1, int(now.max_num_seqs * RAISE_PART))
        tokens = now.max_num_batched_tokens + hurry * max(1, int(now.max_num_batched_tokens * RAISE_TOKENS_PART))
        return self._within(Limits(seqs, tokens))

    def _within(self, limits: Limits) -> Limits:
        least, most = self._least, self._most
        return Limits(
            min(max(limits.max_num_seqs, least.max_num_seqs), most.max_num_seqs),
            min(max(limits.max_num_batched_tokens, least.max_num_batched_tokens), most.max_num_batched_tokens),
        )


class Pace:
    """Collects what one interval saw. Times are one clock's."""

    def __init__(self) -> None:
        self._gaps_s: list[float] = []
        self._firsts_s: list[float] = []

    def first(self, seconds: float) -> None:
        """A request had its first token of this engine so long after it came."""
        if len(self._firsts_s) < MAX_SEEN:
            self._firsts_s.append(seconds)

    def gap(self, seconds: float, num_tokens: int) -> None:
        """Further tokens of a request came so long after the one before."""
        if len(self._gaps_s) < MAX_SEEN:
            self._gaps_s += [seconds / num_tokens] * num_tokens

    def take(self, num_running: int, num_waiting: int) -> Seen:
        """What was seen since the last time."""
        gaps, self._gaps_s = self._gaps_s, []
        firsts, self._firsts_s = self._firsts_s, []
        tpot_s = fmean(gaps) if gaps else 0.0
        return Seen(tpot_s, max(firsts, default=0.0), num_running, num_waiting, prefilling=bool(firsts))
