"""The request's life as a state machine, in every order of events that two calls can have."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexgen2.engine.base import FinishReason, SampledToken
from hexgen2.errors import (
    HexgenError,
    InvalidRequest,
    KvTooLarge,
    Overloaded,
    StaleEpoch,
    TransferEnded,
    Unavailable,
)
from hexgen2.gateway.job import KvMoved
from hexgen2.gateway.life import (
    Action,
    Deliver,
    Ended,
    EndPrefill,
    Event,
    Fail,
    FirstToken,
    KvVerified,
    Life,
    MoveDecode,
    NoDecodeLeft,
    Side,
    Tokens,
    TryAgain,
    Way,
)

STOP = FinishReason.STOP
VERIFIED = KvVerified(KvMoved(1, 1, "memory", "none", 0.0))
FIRST = FirstToken(SampledToken(0), None, cached_tokens=3)
LOST = Unavailable("gone")
USED_UP = TransferEnded("the transfer has ended")
PREFILL_LOST, DECODE_LOST = Ended(Side.PREFILL, LOST), Ended(Side.DECODE, LOST)


def more(*token_ids: int, finish: FinishReason | None = None) -> Tokens:
    return Tokens(tuple(SampledToken(each) for each in token_ids), finish, 9)


@dataclass
class Run:
    """What a client and the calls saw."""

    tokens: list[int]
    actions: list[Action]
    outcome: Action | None

    @property
    def complete(self) -> bool:
        return isinstance(self.outcome, Deliver)


def play(life: Life, events: list[Event]) -> Run:
    """Feed events; ``MoveDecode`` finds no other decode."""
    run = Run([], [], None)
    for event in events:
        actions = list(life.on(event))
        while actions:
            action = actions.pop(0)
            assert run.outcome is None, "an action after the end"
            run.actions.append(action)
            match action:
                case Deliver(tokens, finish_reason):
                    run.tokens += [token.token_id for token in tokens]
                    if finish_reason is not None:
                        run.outcome = action
                case MoveDecode(error):
                    actions += life.on(NoDecodeLeft(error))
                case TryAgain() | Fail():
                    run.outcome = action
                case EndPrefill():
                    pass
    return run


@st.composite
def two_calls(draw: st.DrawFn) -> list[Event]:
    """What prefill and decode send, each in its order, interleaved in any way, each cut off anywhere."""
    prefill: list[Event] = [FIRST]
    decode: list[Event] = [VERIFIED, more(1), more(2, 3), more(4, finish=STOP), Ended(Side.DECODE, None)]
    errors = st.sampled_from([LOST, None, Overloaded("full"), StaleEpoch("old"), InvalidRequest("x", "y"), USED_UP])
    if draw(st.booleans()):
        prefill = [*prefill[: draw(st.integers(0, 1))], Ended(Side.PREFILL, draw(errors))]
    if draw(st.booleans()):
        decode = [*decode[: draw(st.integers(0, 4))], Ended(Side.DECODE, draw(errors))]
    events: list[Event] = []
    while prefill or decode:
        source = prefill if prefill and (not decode or draw(st.booleans())) else decode
        events.append(source.pop(0))
    return events


@given(two_calls())
def test_tokens_come_in_order_once_and_the_end_is_told_once(events: list[Event]) -> None:
    run = play(Life(Way.HAND_OVER), events)
    assert run.tokens == [0, 1, 2, 3, 4][: len(run.tokens)]
    if run.complete:
        assert run.tokens == [0, 1, 2, 3, 4]


@given(two_calls())
def test_whatever_happens_it_ends(events: list[Event]) -> None:
    decode_over = any(isinstance(event, Ended) and event.side is Side.DECODE for event in events)
    has_first = FIRST in events
    prefill_over = any(isinstance(event, Ended) and event.side is Side.PREFILL for event in events)
    # Decode that was told of the transfer's end leaves it to prefill's, which then is on its way.
    told = Ended(Side.DECODE, USED_UP) in events
    run = play(Life(Way.HAND_OVER), events)
    if decode_over and (prefill_over or (has_first and not told)):
        assert run.outcome is not None


@given(two_calls())
def test_prefill_is_let_go_exactly_when_its_token_and_its_kv_are_here(events: list[Event]) -> None:
    run = play(Life(Way.HAND_OVER), events)
    ends = [action for action in run.actions if isinstance(action, EndPrefill)]
    assert len(ends) <= 1
    if ends:
        assert {FIRST, VERIFIED} <= set(events)
    if run.complete and not any(isinstance(event, Ended) and event.side is Side.PREFILL for event in events):
        assert len(ends) == 1


def test_decode_lost_before_verification_is_moved() -> None:
    life = Life(Way.HAND_OVER)
    assert life.on(DECODE_LOST) == (MoveDecode(LOST),)
    assert life.on(FIRST) == (Deliver((FIRST.token,), None),)
    assert life.on(DECODE_LOST) == (MoveDecode(LOST),)
    assert life.on(VERIFIED) == (EndPrefill(),)
    assert life.on(more(1, finish=STOP)) == (Deliver((SampledToken(1),), STOP),)


@pytest.mark.parametrize("first", [True, False])
def test_a_transfer_that_has_ended_is_not_moved_and_prefill_says_why(first: bool) -> None:
    life = Life(Way.HAND_OVER)
    if first:
        life.on(FIRST)
    assert life.on(Ended(Side.DECODE, USED_UP)) == ()
    full = Overloaded("full")
    assert life.on(Ended(Side.PREFILL, full)) == (TryAgain(Side.PREFILL, full),)


def test_decode_is_not_moved_when_prefill_holds_nothing_any_more() -> None:
    run = play(Life(Way.HAND_OVER), [FIRST, PREFILL_LOST, DECODE_LOST])
    assert not any(isinstance(action, MoveDecode) for action in run.actions)
    assert run.outcome == TryAgain(Side.DECODE, LOST)


def test_prefill_lost_after_verification_does_not_matter() -> None:
    assert play(Life(Way.HAND_OVER), [FIRST, VERIFIED, PREFILL_LOST, more(1, finish=STOP)]).complete


def test_prefill_lost_after_its_token_is_for_decode_to_judge() -> None:
    assert play(Life(Way.HAND_OVER), [FIRST, PREFILL_LOST, VERIFIED, more(1, finish=STOP)]).complete


def test_a_final_first_token_is_the_answer() -> None:
    final = FirstToken(SampledToken(0), STOP, 0)
    assert play(Life(Way.HAND_OVER), [final, Ended(Side.DECODE, None), PREFILL_LOST]).tokens == [0]


@pytest.mark.parametrize("events", [[Ended(Side.PREFILL, None)], [FIRST, Ended(Side.PREFILL, None)]])
def test_prefill_alone_must_say_that_it_is_done(events: list[Event]) -> None:
    assert isinstance(play(Life(Way.FIRST_ONLY), events).outcome, TryAgain | Fail)


def test_colocated_reports_the_prefix_cache_of_decode() -> None:
    life = Life(Way.COLOCATED)
    assert play(life, [more(1), more(2, finish=STOP)]).tokens == [1, 2]
    assert life.cached_tokens == 9


@pytest.mark.parametrize("error", [InvalidRequest("x", "y"), KvTooLarge("z"), HexgenError("bug")])
@pytest.mark.parametrize("side", Side)
def test_a_fault_of_the_request_is_not_tried_elsewhere(error: HexgenError, side: Side) -> None:
    assert Life(Way.HAND_OVER).on(Ended(side, error)) == (Fail(error),)


def test_half_an_answer_that_broke_off_may_be_continued() -> None:
    run = play(Life(Way.HAND_OVER), [FIRST, VERIFIED, more(1), DECODE_LOST])
    assert (run.tokens, run.outcome) == ([0, 1], TryAgain(Side.DECODE, LOST))
