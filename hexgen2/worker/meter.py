"""What a worker measures of its own engine, so that the plan's times can be held against it. Pure.

Only what one phase does by itself is counted: samples during which the engine did the other phase as well, or requests
as a whole, are left out, because no curve foretells them. Times are one clock's.
"""

from dataclasses import dataclass
from typing import Literal

from hexgen2.batching import Pace
from hexgen2.calibration import Sample, Term

Work = Literal["prefill", "decode", "whole"]

#: Samples and prompts that are kept for one report; what is over is not told.
MAX_SAMPLES, MAX_PROMPTS = 64, 256
#: Prompts that end within so long of each other were in one step of the engine, and count as one of their length.
TOGETHER_S = 0.003
#: A time of nothing cannot be compared.
LEAST_S = 1e-6


@dataclass(slots=True)
class Answer:
    """A request in decode: since when, and the area under the number of requests until then."""

    began_s: float
    area: float


class Meter:
    """Of one worker. Each ``began`` is followed by one ``ended``, ``stepped`` at most once between them."""

    def __init__(self) -> None:
        #: What requests see, for whoever adapts the engine's limits to it.
        self.pace = Pace()
        self._active: dict[Work, int] = {"prefill": 0, "decode": 0, "whole": 0}
        self._last_seen_s: dict[Work, float] = {}
        # Of prefill: since when the engine has been busy with what has not ended, and what ended until then.
        self._mark_s = 0.0
        self._busy_s = 0.0
        self._prompts: list[int] = []
        # Of decode: how many are past their first step, and the area under that.
        self._stepping = 0
        self._area, self._area_s = 0.0, 0.0
        self._samples: list[Sample] = []

    def began(self, work: Work, now_s: float) -> None:
        """The engine has one more."""
        if work == "prefill" and not self._active[work]:
            self._mark_s = now_s
        self._active[work] += 1

    def ended(self, work: Work, now_s: float) -> None:
        """And one fewer, however it ended."""
        self._active[work] -= 1
        self._last_seen_s[work] = now_s

    def prefilled(self, tokens: int, now_s: float) -> None:
        """A prompt has its first token, ``tokens`` of it having been computed."""
        since_s, self._mark_s = self._mark_s, now_s
        if self._disturbed("prefill", since_s) or tokens < 1 or len(self._prompts) >= MAX_PROMPTS:
            return
        self._busy_s += now_s - since_s
        if self._prompts and now_s - since_s < TOGETHER_S:
            self._prompts[-1] += tokens
        else:
            self._prompts.append(tokens)

    def stepping(self, now_s: float) -> Answer:
        """A request in decode has its first token from here; ``stepped`` must follow."""
        self._advance(now_s)
        self._stepping += 1
        return Answer(now_s, self._area)

    def stepped(self, answer: Answer, num_steps: int, now_s: float) -> None:
        """It has ended, so many tokens after that."""
        self._advance(now_s)
        self._stepping -= 1
        seconds = now_s - answer.began_s
        if num_steps > 0 and seconds > 0 and not self._disturbed("decode", answer.began_s):
            batch = (self._area - answer.area) / seconds
            self._add(Sample(Term.DECODE, seconds, (num_steps,), batch))

    def transferred(self, tokens: int, seconds: float, peer: str) -> None:
        """The KV of a prompt is verified, so long after all of it was there to be read."""
        self._add(Sample(Term.TRANSFER, max(seconds, LEAST_S), (tokens,), peer=peer))

    def take(self) -> tuple[Sample, ...]:
        """What there is to report; it is told once."""
        samples, self._samples = self._samples, []
        if self._prompts and self._busy_s > 0:
            samples.append(Sample(Term.PREFILL, self._busy_s, tuple(self._prompts)))
        self._prompts, self._busy_s = [], 0.0
        return tuple(samples)

    def _add(self, sample: Sample) -> None:
        if len(self._samples) < MAX_SAMPLES:
            self._samples.append(sample)

    def _advance(self, now_s: float) -> None:
        self._area += self._stepping * (now_s - self._area_s)
        self._area_s = now_s

    def _disturbed(self, work: Work, since_s: float) -> bool:
        """Whether the engine has done anything else since then."""
        others = [each for each in self._active if each != work]
        return any(self._active[each] or self._last_seen_s.get(each, -1.0) > since_s for each in others)
