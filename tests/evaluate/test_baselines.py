"""Baselines against definitions written out in plain Python."""

from __future__ import annotations

import lzma
import math
from collections import Counter

import numpy as np
import pytest

from openelm.errors import DataError
from openelm.evaluate.baselines import baselines, ngram_bits
from openelm.text.tokenizer import Tokenizer

TRAINING = ["the cat sat on the mat. " * 20, "a dog ate the cat's mat at noon. " * 10]
HELD_OUT = ["the dog sat on the mat", "öther things"]


def witten_bell(training: list[bytes], history: bytes, byte: int) -> float:
    """Interpolate down from the longest history to 1/256, counting from scratch."""
    shorter = witten_bell(training, history[1:], byte) if history else 1 / 256
    followers: Counter[int] = Counter()
    for text in training:
        padded = bytes(len(history)) + text
        for end in range(len(history), len(padded)):
            if padded[end - len(history) : end] == history:
                followers[padded[end]] += 1
    if not followers:
        return shorter
    return (followers[byte] + len(followers) * shorter) / (followers.total() + len(followers))


@pytest.mark.parametrize("order", [0, 1, 3, 5])
def test_ngrams_equal_witten_bell_counted_from_scratch(order: int) -> None:
    training, documents = [b"abracadabra", b"cab \xff", b"x"], [b"abcab", b"\xffabra", b"y"]
    expected = 0.0
    for document in documents:
        padded = bytes(order) + document
        for end in range(order, len(padded)):
            expected -= math.log2(witten_bell(training, padded[end - order : end], padded[end]))
    assert ngram_bits(training, documents, order) == pytest.approx(expected, rel=1e-12)


def test_ngram_probabilities_of_the_next_byte_sum_to_one() -> None:
    training = [b"the theme of the thesis"]
    first = ngram_bits(training, [b"the t"], 5)
    total = sum(2 ** -(ngram_bits(training, [b"the t" + bytes([byte])], 5) - first) for byte in range(256))
    assert total == pytest.approx(1.0, rel=1e-9)


def test_baselines_equal_their_definitions(tokenizer: Tokenizer) -> None:
    found = {baseline.name: baseline.bits_per_byte for baseline in baselines(HELD_OUT, TRAINING, tokenizer)}
    counts = Counter("".join(TRAINING).encode())
    held_out = [text.encode() for text in HELD_OUT]
    size = sum(map(len, held_out))
    for name, symbols in (("unigram bytes", 256), ("unigram tokens", 258)):
        bits = [math.log2((counts.total() + symbols) / (counts[byte] + 1)) for byte in b"".join(held_out)]
        assert found[name] == pytest.approx(sum(bits) / size, rel=1e-12)
    assert found["uniform bytes"] == 8.0
    alone = sum(len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) for data in held_out)
    assert found["xz -9"] == 8 * alone / size
    assert found["xz -9 after training text"] < found["xz -9"]


def test_baselines_come_worst_first(tokenizer: Tokenizer) -> None:
    values = [baseline.bits_per_byte for baseline in baselines(HELD_OUT, TRAINING, tokenizer)]
    assert values == sorted(values, reverse=True)
    assert np.isfinite(values).all()


def test_missing_text_is_a_data_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="no training text"):
        baselines(HELD_OUT, ["", ""], tokenizer)
    with pytest.raises(DataError, match="no document"):
        baselines([], TRAINING, tokenizer)
