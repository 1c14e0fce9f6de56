"""A request over several attempts: what was given is asked for no more, and what cannot be continued is told."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexgen2.engine.base import FinishReason, SampledToken, Sampling
from hexgen2.errors import DeadlineExceeded, HexgenError, InvalidRequest, KvTooLarge, Overloaded, Unavailable
from hexgen2.gateway.job import Job, Operation
from hexgen2.gateway.life import (
    Deliver,
    Ended,
    Event,
    Fail,
    FirstToken,
    Life,
    Side,
    Tokens,
    TryAgain,
    Way,
)
from hexgen2.gateway.progress import ATTEMPTS, ATTEMPTS_WHEN_FULL, Progress
from tests.gateway.test_life import LOST, VERIFIED

PROMPT = (5, 6, 7)
JOB = Job("r", Operation.TEXT_COMPLETION, "m", PROMPT, Sampling(max_tokens=8, min_tokens=3, stop_token_ids=(99,)))
BROKEN = TryAgain(Side.DECODE, LOST)


def tokens(*token_ids: int) -> tuple[SampledToken, ...]:
    return tuple(SampledToken(each) for each in token_ids)


def model(token_ids: tuple[int, ...]) -> int:
    """The next token of a greedy model: all that came before decides."""
    return hash(token_ids) % 90


def attempt_events(job: Job, colocated: bool) -> list[Event]:
    """What the two calls of an attempt say when nothing fails."""
    ids = list(job.prompt_token_ids)
    for _ in range(job.sampling.max_tokens):
        ids.append(model(tuple(ids)))
    out = ids[len(job.prompt_token_ids) :]
    last = len(out) - 1

    def finish(number: int) -> FinishReason | None:
        return FinishReason.LENGTH if number == last else None

    rest = [Tokens(tokens(each), finish(number), 0) for number, each in enumerate(out)]
    if colocated:
        return [*rest]
    first = FirstToken(SampledToken(out[0]), finish(0), 0)
    return [first, VERIFIED, *rest[1:]]


@given(st.data())
def test_however_often_it_breaks_off_the_client_gets_the_answer_of_one_engine(data: st.DataObject) -> None:
    whole = list(PROMPT)
    for _ in range(JOB.sampling.max_tokens):
        whole.append(model(tuple(whole)))
    progress, seen, outcome = Progress(JOB), list[int](), None
    while outcome is None:
        assert len(progress.job.prompt_token_ids) + progress.job.sampling.max_tokens == len(whole)
        colocated = data.draw(st.booleans())
        events = attempt_events(progress.job, colocated)
        cut = data.draw(st.integers(0, len(events)))
        if not colocated and data.draw(st.booleans()):
            events[1], events[0] = events[0], events[1]
        life = Life(Way.COLOCATED if colocated else Way.HAND_OVER)
        failure: TryAgain | Fail | None = None
        prefill_gone = [] if colocated else [Ended(Side.PREFILL, LOST)]
        for event in [*events[:cut], *prefill_gone, Ended(Side.DECODE, LOST)]:
            for action in life.on(event):
                if isinstance(action, Deliver):
                    progress.give(action.tokens)
                    seen += [token.token_id for token in action.tokens]
                    outcome = action.finish_reason
                elif isinstance(action, TryAgain | Fail):
                    failure = action
        if outcome is None:
            assert failure is not None
            if (told := progress.after(failure)) is not None:
                assert progress.number == ATTEMPTS
                assert ("broke off" in str(told)) == bool(seen)
                break
    assert seen == whole[len(PROMPT) :][: len(seen)]
    if outcome is not None:
        assert seen == whole[len(PROMPT) :]


def test_what_was_given_is_prompt_and_no_longer_asked_for() -> None:
    progress = Progress(JOB)
    progress.give(tokens(1, 2))
    assert progress.after(BROKEN) is None
    assert list(progress.job.prompt_token_ids) == [*PROMPT, 1, 2]
    assert (progress.job.sampling.max_tokens, progress.job.sampling.min_tokens) == (6, 1)
    progress.give(tokens(3, 4))
    assert progress.after(BROKEN) is None
    assert list(progress.job.prompt_token_ids) == [*PROMPT, 1, 2, 3, 4]
    assert (progress.job.sampling.max_tokens, progress.job.sampling.min_tokens) == (4, 0)
    told = progress.after(BROKEN)
    assert isinstance(told, Unavailable)
    assert "broke off: gone" in str(told)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"seed": 1}, "seed"),
        ({"presence_penalty": 0.5}, "penalties"),
        ({"frequency_penalty": -0.5}, "penalties"),
        ({"json_schema": "{}"}, "grammar"),
    ],
)
def test_what_depends_on_more_than_the_tokens_is_not_continued_but_begun_again(
    changes: dict[str, Any], why: str
) -> None:
    job = replace(JOB, sampling=replace(JOB.sampling, **changes))
    assert Progress(job).after(BROKEN) is None
    progress = Progress(job)
    progress.give(tokens(1))
    told = progress.after(BROKEN)
    assert isinstance(told, Unavailable)
    assert "cannot be continued" in str(told)
    assert why in str(told)


@pytest.mark.parametrize(
    "changes",
    [{"temperature": 0.0, "seed": 1}, {"temperature": 0.7, "top_p": 0.9}, {"repetition_penalty": 1.2}, {"logprobs": 2}],
)
def test_what_depends_on_the_tokens_alone_is_continued(changes: dict[str, Any]) -> None:
    progress = Progress(replace(JOB, sampling=replace(JOB.sampling, **changes)))
    progress.give(tokens(1))
    assert progress.after(BROKEN) is None


def test_full_queues_are_asked_twice_unless_the_client_has_tokens() -> None:
    full = TryAgain(Side.PREFILL, Overloaded("full"))
    for begun, attempts in ((False, ATTEMPTS_WHEN_FULL), (True, ATTEMPTS)):
        progress = Progress(JOB)
        if begun:
            progress.give(tokens(1))
        assert [progress.after(full) is None for _ in range(attempts)] == [True] * (attempts - 1) + [False]


@pytest.mark.parametrize(
    ("error", "ours"), [(KvTooLarge("x"), True), (InvalidRequest("x", "y"), True), (DeadlineExceeded("late"), False)]
)
def test_a_continuation_that_fits_nowhere_is_not_the_clients_fault(error: HexgenError, ours: bool) -> None:
    assert Progress(JOB).after(Fail(error)) is error
    progress = Progress(JOB)
    progress.give(tokens(1))
    progress.after(BROKEN)
    told = progress.after(Fail(error))
    assert isinstance(told, Unavailable) is ours


@pytest.mark.parametrize(("last", "reason"), [(1, FinishReason.LENGTH), (99, FinishReason.STOP)])
def test_an_answer_whose_last_token_came_is_complete(last: int, reason: FinishReason) -> None:
    progress = Progress(replace(JOB, sampling=replace(JOB.sampling, max_tokens=2)))
    assert progress.complete is None
    progress.give(tokens(1, last))
    assert progress.complete is reason
