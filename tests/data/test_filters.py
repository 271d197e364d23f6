from __future__ import annotations

import re
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openelm.data.filters import character_filter, normalize, token_filter


def slim_pajama(text: str) -> str:
    """The published steps one by one: lower case, no ASCII punctuation, single spaces."""
    text = text.lower()
    text = "".join(character for character in text if character not in string.punctuation)
    return re.sub(r"\s+", " ", text.strip())


@given(st.text(st.sampled_from("aB .,!-\n\tÉ你\u00a0\u2028"), max_size=60))
def test_normalisation_is_the_published_one(text):
    assert normalize(text) == slim_pajama(text)


@settings(max_examples=200)
@given(st.text(st.sampled_from("aB .!\n"), max_size=400), st.integers(0, 12))
def test_the_character_filter_counts_normalised_characters(text, least):
    expected = "empty" if not text.strip() else "too_few_characters" if len(slim_pajama(text)) < least else None
    assert character_filter(text, least) == expected


@pytest.mark.parametrize("length, reason", [(199, "too_few_characters"), (200, None)])
def test_the_published_limit_is_200_characters(length, reason):
    assert character_filter("!  " * 50 + "x" * length + " ...\n", 200) == reason


@pytest.mark.parametrize("length, reason", [(255, "too_few_tokens"), (256, None)])
def test_the_published_limit_is_256_tokens(length, reason):
    assert token_filter(length, 256) == reason
