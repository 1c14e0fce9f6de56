"""The text of an answer does not depend on how its tokens were batched."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hexgen2.engine.base import FinishReason, SampledToken, Sampling
from hexgen2.gateway.answer import Answer
from hexgen2.gateway.job import Job, Operation, Piece
from hexgen2.text.tokenizer import TextModel
from tests.gateway.house import EOS

STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH


@pytest.fixture(scope="module")
def model(folder: Path) -> TextModel:
    return TextModel.load(folder)


def read(
    model: TextModel,
    text: str,
    sizes: list[int],
    *,
    stop: tuple[str, ...] = (),
    min_tokens: int = 0,
    finish: FinishReason = STOP,
) -> list[Piece]:
    """The pieces of ``text`` and an EOS, given in batches of these sizes."""
    sampling = Sampling(max_tokens=100, min_tokens=min_tokens, stop_token_ids=(EOS,))
    job = Job("r", Operation.CHAT, "m", (1,), sampling, stop)
    answer = Answer(job, model.detokenizer())
    ids = [*model.encode(text), *([EOS] if finish is STOP else [])]
    pieces: list[Piece] = []
    while ids and not answer.finished:
        size = sizes[len(pieces) % len(sizes)] if sizes else 1
        batch, ids = ids[:size], ids[size:]
        pieces.append(answer.add(tuple(SampledToken(each) for each in batch), None if ids else finish))
    assert answer.finished
    assert answer.num_tokens == sum(len(piece.tokens) for piece in pieces)
    return pieces


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.text(alphabet="ab\u20ac ", min_size=1, max_size=12),
    st.lists(st.integers(1, 4), max_size=4),
    st.lists(st.text(alphabet="ab\u20ac", min_size=1, max_size=3), max_size=2),
    st.integers(0, 6),
    st.sampled_from([STOP, LENGTH]),
)
def test_batches_do_not_change_the_answer(
    model: TextModel, text: str, sizes: list[int], stops: list[str], min_tokens: int, finish: FinishReason
) -> None:
    one_by_one = read(model, text, [1], stop=tuple(stops), min_tokens=min_tokens, finish=finish)
    batched = read(model, text, sizes, stop=tuple(stops), min_tokens=min_tokens, finish=finish)
    assert "".join(piece.text for piece in batched) == "".join(piece.text for piece in one_by_one)
    last, same = batched[-1], one_by_one[-1]
    assert (last.finish_reason, last.stop_text) == (same.finish_reason, same.stop_text)
    assert [t for p in batched for t in p.tokens] == [t for p in one_by_one for t in p.tokens]


def test_half_a_character_at_the_end_is_shown_as_such(model: TextModel) -> None:
    sampling = Sampling(max_tokens=2, stop_token_ids=(EOS,))
    answer = Answer(Job("r", Operation.CHAT, "m", (1,), sampling), model.detokenizer())
    ids = model.encode("\u20ac")[:2]
    assert answer.add((SampledToken(ids[0]),), None).text == ""
    assert answer.add((SampledToken(ids[1]),), LENGTH).text == "\ufffd"


def test_a_token_that_ends_the_answer_is_counted_but_not_shown(model: TextModel) -> None:
    sampling = Sampling(max_tokens=9, stop_token_ids=model.encode("b"))
    answer = Answer(Job("r", Operation.CHAT, "m", (1,), sampling), model.detokenizer())
    piece = answer.add(tuple(SampledToken(each) for each in model.encode("ab")), STOP)
    assert (piece.text, answer.num_tokens) == ("a", 2)
