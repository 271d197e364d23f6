"""Texts encoded unit by unit have the ids that the library gives them whole."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from openelm.errors import DataError
from openelm.text import units
from openelm.text.spm import SentencePieceTokenizer
from openelm.text.units import has_units

CORPUS = [
    "The quick brown fox jumps over the lazy dog.\n\n    Indented, and 12 345 numbers!\nThe end.\n",
    "HAMLET.\nTo be, or not to be: that is the question.\n\nOPHELIA.\nMy lord, I have remembrances.\n",
] * 20
WORDS = st.sampled_from(
    ["the", "to be,", "fox", " ", "  ", "\n", ".\n\n", "é", "🦙", "\0", "\t", "question.", "<0x41>"]
)
TEXT = st.lists(WORDS | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=5)).map(
    "".join
)


def model(**options: object) -> bytes:
    """Train with the library alone, so that no choice of `train_tokenizer` decides what is tested."""
    settings = {"model_type": "bpe", "vocab_size": 340, "byte_fallback": True, "character_coverage": 1.0}
    settings |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "minloglevel": 3}
    writer = io.BytesIO()
    sentences = iter([*CORPUS, " "])
    SentencePieceTrainer.train(sentence_iterator=sentences, model_writer=writer, **{**settings, **options})
    return writer.getvalue()


@pytest.mark.parametrize("prefix", [False, True])
def test_ids_are_those_of_the_library_for_whole_texts(monkeypatch: pytest.MonkeyPatch, prefix: bool) -> None:
    data = model(add_dummy_prefix=prefix)
    tokenizer, library = SentencePieceTokenizer(data), SentencePieceProcessor(model_proto=data)
    assert tokenizer._units is not None
    monkeypatch.setattr(units, "_MOST_CHARACTERS", 500)  # forgotten many times on the way

    @given(text=TEXT)
    @example(text="a  b \n c  ")
    @example(text=" ".join(CORPUS))
    @settings(max_examples=300, deadline=None)
    def check(text: str) -> None:
        ids = library.encode(text)
        assert tokenizer.encode(text) == tokenizer.encode(text) == ids
        assert tokenizer.encode_array(text).tolist() == ids

    check()


@pytest.mark.parametrize(
    "options",
    [
        {"split_by_whitespace": False},
        {"treat_whitespace_as_suffix": True, "add_dummy_prefix": False},
        {"model_type": "unigram"},
    ],
    ids=["pieces across spaces", "spaces behind words", "unigram"],
)
def test_other_models_are_left_to_the_library(options: dict[str, object]) -> None:
    data = model(**{"add_dummy_prefix": False, **options})
    tokenizer, library = SentencePieceTokenizer(data), SentencePieceProcessor(model_proto=data)
    assert tokenizer._units is None
    for text in CORPUS[:2]:
        assert tokenizer.encode(text) == tokenizer.encode_array(text).tolist() == library.encode(text)


def test_a_piece_with_a_space_behind_text_rules_units_out() -> None:
    assert has_units(["a", " a", "  ", "  ab", ".\n\n"])
    assert not has_units(["a", "b "])
    assert not has_units(["of the"])


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = SentencePieceTokenizer(model(add_dummy_prefix=False))
    assert tokenizer._units is not None
    monkeypatch.setattr(units, "_MOST_CHARACTERS", 1000)
    for number in range(2000):
        tokenizer.encode(f" {number} apples")
        assert sum(map(len, tokenizer._units._ids)) <= 1000 + 13


def test_a_model_that_replaces_characters_is_refused(tmp_path: Path) -> None:
    rules = tmp_path / "rules.tsv"
    rules.write_text("201C\t22\n201D\t22\n")
    data = model(add_dummy_prefix=False, normalization_rule_tsv=str(rules))
    with pytest.raises(DataError, match="normalises") as caught:
        SentencePieceTokenizer(data)
    assert caught.value.code == "E_TOKENIZER"
