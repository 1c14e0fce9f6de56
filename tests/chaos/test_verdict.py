"""What the chaos run counts as wrong: it must not be blind."""

from dataclasses import replace

import pytest

from benchmarks.chaos.asks import Api, Kind, asks
from benchmarks.chaos.faults import Strike
from benchmarks.chaos.oracle import Known, emulated_answer, wrong_end, wrong_tokens
from benchmarks.chaos.outcome import End, Outcome
from benchmarks.chaos.verdict import judge
from benchmarks.chaos.watch import Work
from hexgen2.config import EmulatedEngineConfig
from hexgen2.engine.base import FinishReason
from tests.worker.pair import expected_tokens

SECOND = 1_000_000_000
GOOD = Outcome(1, Kind.PLAIN, Api.GRPC, "t1", 10 * SECOND, 11 * SECOND, End.ANSWERED, "OK", 4)
LEFT = replace(GOOD, kind=Kind.CANCEL_EARLY, end=End.CANCELLED, status="CANCELLED", given_up_ns=11 * SECOND)
KNOWN = Known((1, 2, 3), (7, 8, 9, 7))


def violations(outcome: Outcome, *, strikes: tuple[Strike, ...] = (), work: tuple[Work, ...] = ()) -> list[str]:
    found = judge([outcome], strikes, {outcome.trace_id: work}, (), free_within_s=1.0).violations
    return [violation.what for violation in found]


def test_the_right_answer_is_the_models_definition() -> None:
    config = EmulatedEngineConfig(vocab_size=300)
    prompt = [5 + i % 250 for i in range(200)]
    assert list(emulated_answer(config, prompt, 6).answer) == expected_tokens(config, prompt, 6)


@pytest.mark.parametrize(
    ("got", "wrong"), [([], False), ([7, 8], False), ([7, 9], True), ([8], True), ([7, 8, 9, 7, 7], True)]
)
def test_tokens_are_a_beginning_of_the_right_answer_or_wrong(got: list[int], wrong: bool) -> None:
    assert bool(wrong_tokens(KNOWN, got)) is wrong


@pytest.mark.parametrize(
    ("got", "max_tokens", "stop", "finish", "wrong"),
    [
        ([7, 8, 9], 3, None, FinishReason.LENGTH, False),
        ([7, 8], 3, None, FinishReason.LENGTH, True),
        ([7, 8, 9], 3, None, None, True),
        ([7, 8], 4, 8, FinishReason.STOP, False),
        ([7, 8, 9, 7], 4, 8, FinishReason.LENGTH, True),
    ],
)
def test_an_answer_with_an_ok_status_is_whole(
    got: list[int], max_tokens: int, stop: int | None, finish: FinishReason | None, wrong: bool
) -> None:
    assert bool(wrong_end(KNOWN, got, max_tokens, stop, finish)) is wrong


def test_what_must_not_be_is_found() -> None:
    assert violations(GOOD) == []
    assert violations(replace(GOOD, wrong="token 1 is 3, not 4")) == ["wrong tokens"]
    assert violations(replace(GOOD, wrong="3 tokens, not 4")) == ["short answer"]
    assert violations(replace(GOOD, end=End.SILENT, status="none")) == ["no answer by its deadline"]
    assert violations(replace(GOOD, end=End.REFUSED, status="INTERNAL")) == ["unexpected status"]
    assert violations(replace(GOOD, end=End.REFUSED, status="FAILED_PRECONDITION")) == ["unexpected status"]
    assert violations(replace(GOOD, end=End.REFUSED, status="UNAVAILABLE")) == []


def test_an_answer_is_continued_unless_several_faults_or_its_own_sampling_prevent_it() -> None:
    broken = replace(GOOD, end=End.BROKEN_OFF, status="UNAVAILABLE", detail="the answer broke off: gone")
    one = Strike("kill -9: decode", "decode-0", 10 * SECOND, 12 * SECOND)
    other = Strike("link down: decode", "decode-1", 10 * SECOND, 12 * SECOND)
    assert violations(broken) == violations(broken, strikes=(one,)) == ["not continued"]
    assert violations(broken, strikes=(one, other)) == []
    assert violations(replace(broken, kind=Kind.HISTORY), strikes=(one,)) == []
    assert violations(replace(broken, detail="the answer broke off: send is full")) == []
    # The gateway itself was killed.
    assert violations(replace(broken, detail="connection reset")) == []


def test_from_cancel_to_free_is_measured_to_the_last_worker_unless_it_cannot_hear() -> None:
    work = (
        Work("prefill-0", "hexgen2.v1.Prefill/Prefill", 10 * SECOND, 11 * SECOND),
        Work("decode-1", "hexgen2.v1.Decode/Decode", 10 * SECOND, 14 * SECOND),
    )
    assert judge([LEFT], (), {"t1": work}, (), 1.0).freed.max_s == 3.0
    assert violations(LEFT, work=work) == ["slow to free"]
    stopped = Strike("stop, continue: decode", "decode-1", 9 * SECOND, 13 * SECOND)
    assert violations(LEFT, work=work, strikes=(stopped,)) == []
    assert judge([LEFT], (stopped,), {"t1": work}, (), 1.0).freed_under_fault.max_s == 3.0
    assert violations(LEFT, work=work, strikes=(replace(stopped, target="decode-0"),)) == ["slow to free"]


def test_requests_count_for_the_faults_that_they_met() -> None:
    killed = Strike("kill -9: prefill", "prefill-0", 10 * SECOND, 12 * SECOND, {"send_held": 2})
    later = replace(GOOD, trace_id="t2", began_ns=20 * SECOND, ended_ns=21 * SECOND, end=End.REFUSED)
    verdict = judge([GOOD, later], [killed], {}, {"t1"}, 1.0)
    by_fault = {row.fault: row for row in verdict.rows}
    row = by_fault["kill -9: prefill"]
    assert (row.strikes, row.requests, row.answered, row.retried) == (1, 1, 1, 1)
    assert (by_fault["none"].requests, by_fault["none"].refused) == (1, 1)
    assert verdict.states == {"kill -9: prefill": {"send_held": 1}}
    assert (verdict.availability, verdict.availability_in_peace) == (0.5, 0.0)


def test_the_same_seed_asks_the_same() -> None:
    known = [Known((number,), tuple(range(24))) for number in range(20)]
    streams = [asks(known, known[:1], seed) for seed in (3, 3, 4)]
    first, same, other = ([next(stream) for _ in range(200)] for stream in streams)
    assert first == same != other
    assert {ask.kind for ask in first} >= {Kind.PLAIN, Kind.HASTY, Kind.CANCEL_EARLY, Kind.STOP_TOKEN}
