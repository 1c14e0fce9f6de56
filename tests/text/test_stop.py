"""Stop texts against a reading that looks at the whole answer after every token."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexgen2.text.stop import Found, StopMatcher

few_letters = st.text(alphabet="ab\u20ac", max_size=6)
stop_texts = st.lists(st.text(alphabet="ab\u20ac", min_size=1, max_size=4), max_size=3)


def run(stops: Sequence[str], parts: Sequence[str], unarmed: int = 0) -> tuple[list[str], str | None]:
    """What is given out after each part and at the end, and the stop text met."""
    matcher = StopMatcher(stops)
    given_out: list[str] = []
    for number, part in enumerate(parts):
        result = matcher.feed(part, armed=number >= unarmed)
        if isinstance(result, Found):
            return [*given_out, result.text], result.stop
        given_out.append(result)
    return [*given_out, matcher.flush()], None


def naive(stops: Sequence[str], parts: Sequence[str], unarmed: int = 0) -> tuple[str, str | None]:
    """The answer, by the definition: the first character at which a stop text is complete ends it."""
    text = "".join(parts)
    for end in range(len("".join(parts[:unarmed])) + 1, len(text) + 1):
        for stop in stops:
            if text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    return text, None


@given(stop_texts, st.lists(few_letters, max_size=8), st.integers(0, 4))
def test_finds_what_a_reader_of_the_whole_answer_finds(stops: list[str], parts: list[str], unarmed: int) -> None:
    given_out, met = run(stops, parts, unarmed)
    assert ("".join(given_out), met) == naive(stops, parts, unarmed)


@given(stop_texts, st.lists(few_letters, max_size=8))
def test_gives_out_all_that_cannot_become_a_stop_text(stops: list[str], parts: list[str]) -> None:
    given_out, met = run(stops, parts)
    if met is not None:
        return
    text = ""
    for part, so_far in zip(parts, range(1, len(parts) + 1), strict=True):
        text += part
        held = text[len("".join(given_out[:so_far])) :]
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)


def test_a_stop_text_over_three_tokens_is_never_shown() -> None:
    assert run(["\n\nUser:"], ["Paris.", "\n", "\nUs", "er: next"]) == (["Paris.", "", "", ""], "\n\nUser:")


def test_a_beginning_that_comes_to_nothing_is_given_out() -> None:
    assert run(["STOP"], ["a ST", "ART"]) == (["a ", "START", ""], None)


def test_what_is_held_at_the_end_is_given_out() -> None:
    assert run(["STOP"], ["a STO"]) == (["a ", "STO"], None)


@pytest.mark.parametrize(("stops", "met"), [(["b", "ab"], "b"), (["ab", "b"], "ab")])
def test_of_two_complete_at_the_same_character_the_first_listed_wins(stops: list[str], met: str) -> None:
    assert run(stops, ["ab"])[1] == met


def test_before_min_tokens_a_stop_text_does_not_count() -> None:
    assert run(["."], ["one.", " two."], unarmed=1) == (["one.", " two"], ".")
