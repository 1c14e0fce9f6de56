"""One attempt at a request: what each event of its two calls means, and what may still be tried. Pure.

Events go in, actions come out; the caller (``runner``) performs them. The rules:

* The first token reaches the client from prefill, the rest from decode, in that order, each once.
* Prefill's call is ended when decode has verified the KV. Losing it later does not matter; losing it earlier, but
  after the first token, is for decode to judge, which may have all bytes already.
* Decode lost before it verified costs no prefill: the same transfer goes to another decode replica. When what it
  says is that the transfer has ended, prefill's own end, which is on its way, tells why.
* A failure of a replica, or of the way to it, ends the attempt and not the request: what comes next is ``progress``'s
  to say, which knows what the client has seen.
"""

from dataclasses import dataclass
from enum import StrEnum

from hexgen2.engine.base import FinishReason, SampledToken
from hexgen2.errors import (
    EngineFailed,
    HexgenError,
    KvCorrupt,
    Overloaded,
    StaleEpoch,
    TransferEnded,
    TransferNotFound,
    TransferRefused,
    Unavailable,
)
from hexgen2.gateway.job import KvMoved

#: Failures of a replica or of the way to it, not of the request.
ELSEWHERE = (
    *(EngineFailed, KvCorrupt, Overloaded, StaleEpoch, Unavailable),
    *(TransferEnded, TransferNotFound, TransferRefused),
)


class Way(StrEnum):
    """How a request is served."""

    HAND_OVER = "hand_over"
    #: The answer is one token long: prefill alone.
    FIRST_ONLY = "first_only"
    #: Decode alone, prompt and all.
    COLOCATED = "colocated"


class Side(StrEnum):
    """Which call an event comes from."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class FirstToken:
    """From prefill."""

    token: SampledToken
    finish_reason: FinishReason | None
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class KvVerified:
    """From decode: all KV is there and right."""

    kv: KvMoved


@dataclass(frozen=True, slots=True)
class Tokens:
    """From decode."""

    tokens: tuple[SampledToken, ...]
    finish_reason: FinishReason | None
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Ended:
    """A call is over; ``error`` is None when its status was OK."""

    side: Side
    error: HexgenError | None


@dataclass(frozen=True, slots=True)
class NoDecodeLeft:
    """The answer to ``MoveDecode`` when there is no other decode replica; ``error`` is what ended the last one."""

    error: HexgenError


Event = FirstToken | KvVerified | Tokens | Ended | NoDecodeLeft


@dataclass(frozen=True, slots=True)
class Deliver:
    """Give tokens to the client; with a ``finish_reason`` the answer is complete and all calls end."""

    tokens: tuple[SampledToken, ...]
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class EndPrefill:
    """Cancel the prefill call: its KV is needed no more."""


@dataclass(frozen=True, slots=True)
class MoveDecode:
    """Give the same transfer to another decode replica, or answer ``NoDecodeLeft``."""

    error: HexgenError


@dataclass(frozen=True, slots=True)
class TryAgain:
    """The attempt is over, and another may do better. ``side`` is where the failure showed."""

    side: Side
    error: HexgenError


@dataclass(frozen=True, slots=True)
class Fail:
    """The request is over."""

    error: HexgenError


Action = Deliver | EndPrefill | MoveDecode | TryAgain | Fail


class Life:
    """See the module. ``over`` once the answer is complete, failed or to be tried again."""

    def __init__(self, way: Way) -> None:
        self.way = way
        self.over = False
        self.cached_tokens = 0
        self.kv: KvMoved | None = None
        self._first_seen = way is Way.COLOCATED
        self._delivered = False
        self._prefill_held = way is Way.HAND_OVER
        # Decode may overtake the first token on its way through the gateway.
        self._early: list[Tokens] = []
        self._decode_left = False
        # Decode was told that the transfer has ended, before we were.
        self._transfer_ended = False

    def on(self, event: Event) -> tuple[Action, ...]:
        """What to do now, in order."""
        if self.over:
            return ()
        match event:
            case FirstToken():
                return self._first(event)
            case KvVerified():
                self.kv = event.kv
                return self._let_go()
            case Tokens():
                return self._tokens(event)
            case Ended(Side.DECODE, None) if self.way is Way.HAND_OVER and not self._first_seen and self.kv is None:
                # It heard of a final first token before we did.
                self._decode_left = True
                return ()
            case Ended(side, error):
                error = error or Unavailable(f"{side} ended its call before the answer was complete")
                return self._prefill_ended(error) if side is Side.PREFILL else self._decode_ended(error)
            case NoDecodeLeft(error):
                return self._give_up(Side.DECODE, error)

    def _first(self, event: FirstToken) -> tuple[Action, ...]:
        if self._first_seen:
            return ()
        self._first_seen = True
        self.cached_tokens = event.cached_tokens
        actions: list[Action] = [self._deliver((event.token,), event.finish_reason), *self._let_go()]
        if self._decode_left and not self.over:
            return (*actions, *self._give_up(Side.DECODE, Unavailable("decode ended its call before it began")))
        for early in self._early:
            if not self.over:
                actions.append(self._deliver(early.tokens, early.finish_reason))
        self._early.clear()
        return tuple(actions)

    def _tokens(self, event: Tokens) -> tuple[Action, ...]:
        if not self._first_seen:
            self._early.append(event)
            return ()
        if self.way is Way.COLOCATED and not self._delivered:
            self.cached_tokens = event.cached_tokens
        return (self._deliver(event.tokens, event.finish_reason),)

    def _deliver(self, tokens: tuple[SampledToken, ...], finish_reason: FinishReason | None) -> Deliver:
        self._delivered = self._delivered or bool(tokens)
        self.over = finish_reason is not None
        return Deliver(tokens, finish_reason)

    def _let_go(self) -> tuple[Action, ...]:
        """End prefill's call once both of its products are here."""
        if self._prefill_held and self._first_seen and self.kv is not None and not self.over:
            self._prefill_held = False
            return (EndPrefill(),)
        return ()

    def _prefill_ended(self, error: HexgenError) -> tuple[Action, ...]:
        self._prefill_held = False
        if self._first_seen and self.way is Way.HAND_OVER and not self._transfer_ended:
            # Decode knows best whether it still needs prefill.
            return ()
        return self._give_up(Side.PREFILL, error)

    def _decode_ended(self, error: HexgenError) -> tuple[Action, ...]:
        if self._early and self._early[-1].finish_reason is not None:
            # It is done; only the first token is still on its way.
            return ()
        if self._prefill_held and isinstance(error, TransferEnded):
            self._transfer_ended = True
            return ()
        if self._prefill_held and self.kv is None and isinstance(error, ELSEWHERE):
            return (MoveDecode(error),)
        return self._give_up(Side.DECODE, error)

    def _give_up(self, side: Side, error: HexgenError) -> tuple[Action, ...]:
        self.over = True
        return (TryAgain(side, error),) if isinstance(error, ELSEWHERE) else (Fail(error),)


def for_client(error: HexgenError, *, broke_off: bool = False, why: str = "") -> HexgenError:
    """What a failure between our own processes is to the client: they know nothing of transfers and epochs.

    ``broke_off``: it has a part of the answer; ``why`` says what kept the rest from being made elsewhere.
    """
    if broke_off:
        return Unavailable(f"the answer broke off: {error}" + (f"; it cannot be continued: {why}" if why else ""))
    if isinstance(error, StaleEpoch | TransferEnded | TransferNotFound | TransferRefused):
        return Unavailable(f"the hand-over failed: {error}")
    return error
