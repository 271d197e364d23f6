"""What simple methods reach on the same documents, so that a model's bits per byte mean something."""

from __future__ import annotations

import lzma
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from openelm.errors import DataError
from openelm.evaluate.score import utf8_documents
from openelm.text.tokenizer import Tokenizer

NGRAM_ORDER = 5


@dataclass(frozen=True)
class Baseline:
    """A method, its bits per byte on the documents, and one line on what it is."""

    name: str
    bits_per_byte: float
    description: str


def baselines(documents: Sequence[str], training: Sequence[str], tokenizer: Tokenizer) -> list[Baseline]:
    """Measure every baseline on the held-out `documents`, fitted on the `training` texts; the worst first.

    Takes about 3 seconds for each megabyte of training text on one core, for tokens, xz and n-grams alike.

    Raises:
        DataError: there is no document or no training text, or one is empty or not valid Unicode.
    """
    held_out = utf8_documents(documents, [f"document {number}" for number in range(1, len(documents) + 1)])
    training = [text for text in training if text]
    if not training:
        raise DataError("there is no training text to fit the baselines on", fix="give the model's training text")
    seen = utf8_documents(training, [f"training text {number}" for number in range(1, len(training) + 1)])
    total_bytes = sum(map(len, held_out))
    ids, seen_ids = tokenizer.encode_many(documents), tokenizer.encode_many(training)
    measured = [
        Baseline("uniform bytes", 8.0, "every byte is equally likely"),
        Baseline(
            "unigram bytes",
            _unigram_bits(_joined(seen), _joined(held_out), 256) / total_bytes,
            "byte frequencies of the training text, add-one smoothing",
        ),
        Baseline(
            "unigram tokens",
            _unigram_bits(np.concatenate(seen_ids), np.concatenate(ids), tokenizer.vocab_size) / total_bytes,
            "token frequencies of the training text, add-one smoothing",
        ),
        Baseline(
            "xz -9",
            8 * sum(map(_xz_bytes, held_out)) / total_bytes,
            "each document compressed alone, preset 9 extreme",
        ),
        Baseline(
            "xz -9 after training text",
            8 * (_xz_bytes(b"".join(seen + held_out)) - _xz_bytes(b"".join(seen))) / total_bytes,
            "growth of the compressed training text when the documents follow it",
        ),
        Baseline(
            f"byte {NGRAM_ORDER + 1}-grams",
            ngram_bits(seen, held_out, NGRAM_ORDER) / total_bytes,
            f"the next byte from the {NGRAM_ORDER} before it in the training text, Witten-Bell smoothing",
        ),
    ]
    return sorted(measured, key=lambda baseline: -baseline.bits_per_byte)


def ngram_bits(training: Sequence[bytes], documents: Sequence[bytes], order: int) -> float:
    """Bits of `documents` under interpolated byte n-grams (Witten and Bell, IEEE Trans. Inf. Theory, 1991).

    With c(h, b) the count of byte b after context h, and T(h) the number of different bytes seen there,
    P(b | h) = (c(h, b) + T(h) P(b | shorter h)) / (c(h) + T(h)), down to 1/256. `order` is at most 7.
    """
    probability = np.full(sum(map(len, documents)), 1 / 256)
    for length in range(order + 1):
        grams, counts = np.unique(_grams(training, length), return_counts=True)
        contexts, first = np.unique(grams >> np.uint64(8), return_index=True)
        totals = np.add.reduceat(counts, first)
        different = np.diff(np.append(first, len(grams)))
        wanted = _grams(documents, length)
        count = _look_up(grams, counts, wanted)
        context = wanted >> np.uint64(8)
        kinds = _look_up(contexts, different, context)
        known = kinds > 0
        smoothed = (count + kinds * probability) / np.maximum(1, _look_up(contexts, totals, context) + kinds)
        probability = np.where(known, smoothed, probability)
    return float(-np.log2(probability).sum())


def _grams(texts: Sequence[bytes], length: int) -> np.ndarray:
    """Every byte with the `length` before it as one number, uint64 (bytes,); zero bytes precede a text."""
    data = np.concatenate([np.frombuffer(bytes(length) + text, np.uint8) for text in texts]).astype(np.uint64)
    starts = np.cumsum([0, *(len(text) + length for text in texts[:-1])])
    keep = np.ones(len(data), dtype=bool)
    for offset in range(length):
        keep[starts + offset] = False
    numbers = data.copy()
    for back in range(1, length + 1):
        numbers[back:] |= data[:-back] << np.uint64(8 * back)
    return numbers[keep]


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Find the values of `wanted` in sorted `keys`, 0 where there is none."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)


def _unigram_bits(training: np.ndarray, held_out: np.ndarray, symbols: int) -> float:
    counts = np.bincount(training, minlength=symbols)
    bits = math.log2(counts.sum() + symbols) - np.log2(counts[held_out] + 1)
    return float(bits.sum())


def _joined(texts: Sequence[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(texts), np.uint8)


def _xz_bytes(data: bytes) -> int:
    return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))
