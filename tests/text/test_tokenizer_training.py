"""Training gives the same bytes for the same texts, and learns from all of every text."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openelm.errors import DataError
from openelm.text.tokenizer import SentencePieceTokenizer, train_tokenizer

TEXTS = ["one two three, four five six.\n\n", "seven eight nine,\nten eleven twelve.\n\n" * 3]


def pieces(tokenizer: SentencePieceTokenizer) -> set[bytes]:
    return {tokenizer.token_bytes(token_id) for token_id in range(259, tokenizer.vocab_size)}


def test_ids_are_unk_bos_eos_bytes_then_pieces() -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (300, 1, 2)
    assert [tokenizer.token_bytes(token_id) for token_id in range(3)] == [b"", b"", b""]
    assert [tokenizer.token_bytes(3 + byte) for byte in range(256)] == [bytes([byte]) for byte in range(256)]


def test_training_in_another_process_gives_the_same_bytes() -> None:
    code = f"from openelm.text.tokenizer import train_tokenizer; print(train_tokenizer({TEXTS!r}, 300).sha256)"
    command = [sys.executable, "-c", code]
    other = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7"})
    assert other.stdout.strip() == train_tokenizer(iter(TEXTS), 300).sha256


def test_training_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    train_tokenizer(TEXTS, 300)
    assert capfd.readouterr() == ("", "")


def test_long_texts_are_not_skipped() -> None:
    text = "x " * 3000 + "wonderful " * 3000 + "y" * 20_000
    assert b" wonderful" in pieces(train_tokenizer([text], 290))


@pytest.mark.parametrize("reserved", ["▅", "\0", "▁", "<s>", "</s>", "<unk>", "<0x41>", "\t"])
def test_reserved_text_does_not_hide_the_words_around_it(reserved: str) -> None:
    assert b"wonder" in pieces(train_tokenizer([f"wonder{reserved}wonder"] * 5 + ["bcfghij klm"], 288))


def test_text_that_looks_like_a_control_token_is_learned_as_text() -> None:
    assert {b"<", b">", b"/", b"s"} <= pieces(train_tokenizer(["</s> <s>"] * 3, 264))


def test_newlines_at_the_end_of_a_text_are_learned() -> None:
    assert b".\n\n" in pieces(train_tokenizer(["a.\n\n"] * 5, 265))


def test_rare_characters_are_spelled_in_bytes() -> None:
    tokenizer = train_tokenizer(["ab " * 20_000 + "🦙"], 263)
    assert "🦙".encode() not in pieces(tokenizer)
    assert tokenizer.decode(tokenizer.encode("🦙 ab")) == "🦙 ab"


def test_too_little_text_names_the_largest_vocabulary() -> None:
    with pytest.raises(DataError, match=r"vocabulary of 264\.\.(\d+)") as error:
        train_tokenizer(["abc abd"], 4000)
    largest = int(str(error.value).split("264..")[1].split(",")[0])
    assert train_tokenizer(["abc abd"], largest).vocab_size == largest
    with pytest.raises(DataError):
        train_tokenizer(["abc abd"], largest + 1)


def test_too_small_a_vocabulary_names_the_smallest() -> None:
    with pytest.raises(DataError, match="ask for at least 264"):
        train_tokenizer(["abc abd"], 263)
    assert train_tokenizer(["abc abd"], 264).vocab_size == 264


@pytest.mark.parametrize("texts", [[], [""], ["\0"], ["▁▁"], ["\t"]])
def test_no_text_is_an_error_with_the_largest_vocabulary(texts: list[str]) -> None:
    with pytest.raises(DataError, match="give at most 260 ids"):
        train_tokenizer(texts, 300)


def test_lone_surrogate_is_named() -> None:
    with pytest.raises(DataError, match="text 1 holds") as error:
        train_tokenizer(["a", "b\udfff"], 300)
    assert error.value.code == "E_TEXT"


def test_errors_while_reading_texts_reach_the_caller() -> None:
    def texts() -> object:
        yield "a"
        raise DataError("cut file", code="E_TRUNC")

    with pytest.raises(DataError, match="cut file"):
        train_tokenizer(texts(), 300)  # type: ignore[arg-type]


@given(st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"])), max_size=4), st.integers(0, 400))
@settings(max_examples=60, deadline=None)
def test_any_texts_train_or_say_what_fits(texts: list[str], vocab_size: int) -> None:
    try:
        tokenizer = train_tokenizer(texts, vocab_size)
    except DataError as error:
        assert error.code == "E_TOKENIZER"
    else:
        assert tokenizer.vocab_size == vocab_size
        assert [tokenizer.decode(row) for row in tokenizer.encode_many(texts)] == texts
