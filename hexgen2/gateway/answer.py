"""The text of one answer, made from tokens as they come: detokenised, cut at a stop text, counted. Pure."""

from hexgen2.engine.base import FinishReason, SampledToken
from hexgen2.gateway.job import Job, Piece
from hexgen2.text.detokenize import Detokenizer
from hexgen2.text.stop import Found, StopMatcher


class Answer:
    """See the module. ``finished`` once a piece with a finish reason was made."""

    def __init__(self, job: Job, detokenizer: Detokenizer) -> None:
        self._detokenizer = detokenizer
        self._matcher = StopMatcher(job.stop)
        self._min_tokens = job.sampling.min_tokens
        self._stop_token_ids = frozenset(job.sampling.stop_token_ids)
        self.num_tokens = 0
        self.finished = False

    def add(self, tokens: tuple[SampledToken, ...], finish_reason: FinishReason | None) -> Piece:
        """The next piece. A stop text ends the answer whatever the engine still says; later tokens are dropped."""
        text = ""
        for index, token in enumerate(tokens):
            self.num_tokens += 1
            last = finish_reason is FinishReason.STOP and index == len(tokens) - 1
            if last and token.token_id in self._stop_token_ids:
                # It ends the answer and is no part of its text.
                continue
            found = self._feed(self._detokenizer.step(token.token_id))
            if isinstance(found, Found):
                return self._stopped(text + found.text, tokens[: index + 1], found)
            text += found
        if finish_reason is None:
            return Piece(text, tokens)
        found = self._feed(self._detokenizer.flush())
        if isinstance(found, Found):
            return self._stopped(text + found.text, tokens, found)
        self.finished = True
        return Piece(text + found + self._matcher.flush(), tokens, finish_reason)

    def _feed(self, text: str) -> str | Found:
        return self._matcher.feed(text, armed=self.num_tokens > self._min_tokens)

    def _stopped(self, text: str, tokens: tuple[SampledToken, ...], found: Found) -> Piece:
        self.finished = True
        return Piece(text, tokens, FinishReason.STOP, found.stop)
