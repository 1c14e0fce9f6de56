"""Text in steps is the text of the whole."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from hexgen2.text.detokenize import Detokenizer


def byte_level() -> Tokenizer:
    """One token per byte, and two special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: number for number, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return tokenizer


def sentence_piece() -> Tokenizer:
    """Words with a mark for their leading space, and bytes for all else, as Llama 2 has them."""
    words = ["<unk>", "\u2581Hello", "\u2581world", "!", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def token_id(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    assert found is not None
    return found


BYTES, WORDS = byte_level(), sentence_piece()
SPECIAL = {token_id(BYTES, "<s>"), token_id(BYTES, "</s>")}


def steps(tokenizer: Tokenizer, ids: Sequence[int], prompt: Sequence[int] = ()) -> list[str]:
    detokenizer = Detokenizer(tokenizer.decode, lambda each: each in SPECIAL and tokenizer is BYTES, prompt)
    return [*(detokenizer.step(each) for each in ids), detokenizer.flush()]


@given(st.text(max_size=20))
def test_any_text_comes_out_as_it_went_in(text: str) -> None:
    given_out = steps(BYTES, BYTES.encode(text).ids)
    assert "".join(given_out) == text
    # Nothing is held once a character is complete, but for U+FFFD itself, which looks like half a character.
    if "\ufffd" not in text:
        assert given_out[-1] == ""


@given(st.lists(st.integers(0, BYTES.get_vocab_size() - 1), max_size=24))
def test_any_tokens_give_what_decoding_them_at_once_gives(ids: list[int]) -> None:
    assert "".join(steps(BYTES, ids)) == BYTES.decode(ids)


@given(st.integers(5, 40))
def test_bytes_that_are_no_text_are_not_held_for_ever(num_tokens: int) -> None:
    continuation = BYTES.encode("\x80").ids[1]
    ids = [continuation] * num_tokens
    given_out = steps(BYTES, ids)
    assert len(given_out[-1]) <= 8
    assert "".join(given_out) == BYTES.decode(ids)


def test_a_character_of_four_tokens_appears_with_its_last() -> None:
    assert steps(BYTES, BYTES.encode("\U0001f600!").ids) == ["", "", "", "\U0001f600", "!", ""]


def test_special_tokens_have_no_text_and_do_not_hide_what_follows() -> None:
    start, end = sorted(SPECIAL)
    hello = BYTES.encode("hi").ids
    assert "".join(steps(BYTES, [start, hello[0], end, end, hello[1]])) == "hi"


def test_the_first_word_keeps_its_space_after_a_prompt() -> None:
    hello, world = token_id(WORDS, "\u2581Hello"), token_id(WORDS, "\u2581world")
    assert steps(WORDS, [world], prompt=[hello]) == [" world", ""]
    assert steps(WORDS, [hello, world]) == ["Hello", " world", ""]


@given(st.lists(st.sampled_from(["Hello", "\u20ac", "\u00e9", " world", "!"]), max_size=8))
def test_byte_fallback_gives_whole_characters(parts: list[str]) -> None:
    ids: list[int] = []
    for part in parts:
        token = WORDS.token_to_id(part.replace(" ", "\u2581")) or WORDS.token_to_id("\u2581" + part)
        ids += [token] if token else [token_id(WORDS, f"<0x{byte:02X}>") for byte in part.encode()]
    given_out = steps(WORDS, ids)
    assert "\ufffd" not in "".join(given_out)
    assert "".join(given_out) == WORDS.decode(ids)


@pytest.mark.parametrize("text", ["caf\u00e9", "\u65e5\u672c\u8a9e", "a\u0301"])
def test_a_prompt_that_ends_within_a_character_does_not_swallow_text(text: str) -> None:
    ids = BYTES.encode(text).ids
    given_out = "".join(steps(BYTES, [*ids[-1:], *BYTES.encode("ok").ids], prompt=ids[:-1]))
    assert given_out.endswith("ok")
