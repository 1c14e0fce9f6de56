"""One request over all its attempts: what its client has been given, and what the next attempt is to ask for. Pure.

An answer that breaks off is continued: the prompt and the tokens that the client has are the prompt of the next
attempt, and what the client asked for shrinks by them. Nothing that the client has seen is sampled twice. Where the
tokens to come depend on more than the tokens so far, no continuation would be right, and the client is told instead.
"""

from dataclasses import replace

from hexgen2.engine.base import FinishReason, SampledToken, Sampling
from hexgen2.errors import HexgenError, InvalidRequest, KvTooLarge, Overloaded
from hexgen2.gateway.job import Job
from hexgen2.gateway.life import Fail, TryAgain, for_client

#: Of one request, the first included.
ATTEMPTS = 3
#: Of one whose client has seen nothing and that finds every queue full: asking on makes queues longer.
ATTEMPTS_WHEN_FULL = 2


def why_not_continued(sampling: Sampling) -> str:
    """What keeps an answer from being continued by an engine that takes its tokens for prompt; empty: nothing does.

    Greedy and random sampling need the tokens so far and no more, and so do a repetition penalty, which counts prompt
    and answer alike, and logprobs.
    """
    if sampling.seed is not None and sampling.temperature > 0:
        return "it is sampled with a seed, whose random numbers are lost with the replica"
    if sampling.presence_penalty or sampling.frequency_penalty:
        return "presence and frequency penalties count the answer's tokens, not the prompt's"
    if sampling.json_schema is not None:
        return "its grammar's state is lost with the replica"
    return ""


class Progress:
    """See the module. ``number`` is the current attempt's, from 1; ``job`` is what it asks for."""

    def __init__(self, job: Job) -> None:
        self.number = 1
        self.job = job
        self._asked = job
        self._given: list[int] = []

    @property
    def begun(self) -> bool:
        """Whether the client has tokens."""
        return bool(self._given)

    @property
    def num_given(self) -> int:
        """How many it has."""
        return len(self._given)

    @property
    def complete(self) -> FinishReason | None:
        """Why nothing is left to ask for, if so: the last token came, though its replica did not say that it was."""
        sampling = self._asked.sampling
        if len(self._given) < sampling.max_tokens:
            return None
        return FinishReason.STOP if self._given[-1] in sampling.stop_token_ids else FinishReason.LENGTH

    def give(self, tokens: tuple[SampledToken, ...]) -> None:
        """The client gets them."""
        self._given += [token.token_id for token in tokens]

    def after(self, failure: TryAgain | Fail) -> HexgenError | None:
        """What to tell the client now that the attempt has failed; None for another attempt, at ``job``."""
        error = failure.error
        if isinstance(failure, Fail):
            # What is wrong with a continuation is not the client's doing.
            ours = self.number > 1 and isinstance(error, InvalidRequest | KvTooLarge)
            return self.told(error) if ours else error
        attempts = ATTEMPTS_WHEN_FULL if isinstance(error, Overloaded) and not self.begun else ATTEMPTS
        if self.number >= attempts:
            return self.told(error)
        if self.begun and (why := why_not_continued(self._asked.sampling)):
            return for_client(error, broke_off=True, why=why)
        self.number += 1
        self.job = self._rest()
        return None

    def told(self, error: HexgenError) -> HexgenError:
        """The error as the client is to hear of it."""
        return for_client(error, broke_off=self.begun)

    def _rest(self) -> Job:
        asked, num = self._asked, len(self._given)
        sampling = replace(
            asked.sampling,
            max_tokens=asked.sampling.max_tokens - num,
            min_tokens=max(0, asked.sampling.min_tokens - num),
        )
        return replace(asked, prompt_token_ids=(*asked.prompt_token_ids, *self._given), sampling=sampling)
