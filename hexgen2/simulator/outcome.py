"""What happened to the requests of a simulation: counted as they end, kept as distributions."""

from dataclasses import dataclass, field
from math import inf

from hexgen2.simulator.sketch import Sketch, Timeline


@dataclass(frozen=True, slots=True)
class Slo:
    """What a request may wait, in seconds."""

    ttft_s: float = inf
    tpot_s: float = inf


NO_SLO = Slo()


@dataclass(slots=True)
class Outcome:
    """Distributions are over requests that arrived from ``warmup_s`` on and ended well."""

    slo: Slo
    warmup_s: float = 0.0
    num_arrived: int = 0
    num_finished: int = 0
    num_good: int = 0
    num_retried: int = 0
    num_moved: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    output_tokens: int = 0
    first_arrival_s: float = inf
    last_arrival_s: float = 0.0
    last_end_s: float = 0.0
    last_first_s: float = 0.0
    ttft: Sketch = field(default_factory=Sketch)
    tpot: Sketch = field(default_factory=Sketch)
    e2e: Sketch = field(default_factory=Sketch)
    #: By how much the limits would have to be scaled for a request to keep both.
    slack: Sketch = field(default_factory=Sketch)
    ended: Timeline = field(default_factory=Timeline)
    tokens: Timeline = field(default_factory=Timeline)

    @property
    def failed_total(self) -> int:
        """Requests that ended badly, for whatever reason."""
        return sum(self.failed.values())

    def arrived(self, time_s: float) -> None:
        """Count a request that came."""
        self.num_arrived += 1
        self.first_arrival_s = min(self.first_arrival_s, time_s)
        self.last_arrival_s = time_s

    def finished(self, came_s: float, first_s: float, end_s: float, prompt_tokens: int, output_tokens: int) -> None:
        """Count a request that ended well."""
        self.num_finished += 1
        self.prompt_tokens += prompt_tokens
        self.output_tokens += output_tokens
        self.last_end_s = end_s
        self.last_first_s = max(self.last_first_s, first_s)
        self.ended.add(end_s)
        self.tokens.add(end_s, output_tokens)
        if came_s < self.warmup_s:
            return
        ttft_s = first_s - came_s
        # Clamped: the difference of two sums of the same times may be a rounding below zero.
        tpot_s = max(0.0, end_s - first_s) / (output_tokens - 1) if output_tokens > 1 else 0.0
        self.ttft.add(ttft_s)
        self.e2e.add(end_s - came_s)
        if output_tokens > 1:
            self.tpot.add(tpot_s)
        slo = self.slo
        if ttft_s <= slo.ttft_s and tpot_s <= slo.tpot_s:
            self.num_good += 1
        if slo.ttft_s < inf or slo.tpot_s < inf:
            self.slack.add(max(ttft_s / slo.ttft_s, tpot_s / slo.tpot_s))

    def fail(self, reason: str, time_s: float) -> None:
        """Count a request that ended badly."""
        self.failed[reason] = self.failed.get(reason, 0) + 1
        self.last_end_s = time_s
