"""Tokens to text, one token at a time.

A character may take several tokens and a word's leading space depends on the token before, so each step decodes a
small window that starts with text already given out. What may still change is held back until it cannot.
"""

from collections.abc import Callable, Sequence

#: Tokens of the prompt that give the first output token its context.
CONTEXT_TOKENS = 5
#: A UTF-8 character is at most 4 bytes and a token at least one: after so many more, text is final.
_MAX_CHARACTER_TOKENS = 4
_REPLACEMENT = "\ufffd"


class Detokenizer:
    """Text of one answer. ``decode`` turns ids into text, skipping special tokens; ``skip`` tells those.

    The concatenation of all ``step`` results and ``flush`` is the decoded answer.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], skip: Callable[[int], bool], prompt_token_ids: Sequence[int] = ()
    ) -> None:
        self._decode = decode
        self._skip = skip
        # The window: tokens given out before (context), then those that are still held.
        self._ids = [token_id for token_id in prompt_token_ids[-CONTEXT_TOKENS:] if not skip(token_id)]
        self._given = len(self._ids)
        self._given_text = decode(self._ids) if self._ids else ""

    def step(self, token_id: int) -> str:
        """The text that this token makes certain; empty while a character is incomplete."""
        if self._skip(token_id):
            return ""
        self._ids.append(token_id)
        text = self._window()
        if not text.endswith(_REPLACEMENT):
            return self._give(text, len(self._ids)) if len(text) > len(self._given_text) else ""
        settled = len(self._ids) - _MAX_CHARACTER_TOKENS
        if settled > self._given:
            # Bytes that are no UTF-8 at all: give out all but the last, which may begin a character.
            head = self._decode(self._ids[:settled])
            if text.startswith(head) and len(head) > len(self._given_text):
                return self._give(head, settled)
        return ""

    def flush(self) -> str:
        """What is held at the end of the answer, complete or not."""
        if len(self._ids) == self._given:
            return ""
        return self._give(self._window(), len(self._ids))

    def _window(self) -> str:
        text = self._decode(self._ids)
        if not text.startswith(self._given_text):
            # New bytes changed the reading of old ones, which are with the client already: begin afresh after them.
            del self._ids[: self._given]
            self._given, self._given_text = 0, ""
            text = self._decode(self._ids)
        return text

    def _give(self, text: str, num_tokens: int) -> str:
        new = text[len(self._given_text) :]
        # Tokens given out now are the next window's context; those before them are no longer needed.
        del self._ids[: self._given]
        self._given = num_tokens - self._given
        self._given_text = self._decode(self._ids[: self._given])
        return new
