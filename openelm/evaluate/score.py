"""Bits per byte of whole documents: a score that tokenizers cannot flatter, with its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from openelm.errors import ConfigError, DataError
from openelm.evaluate.bootstrap import ratio_interval
from openelm.evaluate.likelihood import Row, log_likelihoods, windows
from openelm.files.hashes import sha256_bytes
from openelm.model.transformer import OpenELM
from openelm.text.tokenizer import Tokenizer

DOCUMENTS_FOR_AN_INTERVAL = 10
STRETCH_BYTES = 4096


@dataclass(frozen=True)
class DocumentScore:
    """The score of one document; nats are the negative log-likelihood of all its tokens."""

    name: str
    sha256: str
    bytes: int
    words: int
    tokens: int
    nats: float

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes


@dataclass(frozen=True)
class Score:
    """Bits per byte of a set of documents.

    Attributes:
        low, high: the 95 % bootstrap interval of `value`; None where there is too little text for one.
        interval_over: what was resampled: "documents" (from 10 on), "stretches" of about 4 KiB, or "none".
        units: how many of those there were.
    """

    low: float | None
    high: float | None
    interval_over: Literal["documents", "stretches", "none"]
    units: int
    window_tokens: int
    stride_tokens: int
    tokenizer_sha256: str
    per_document: tuple[DocumentScore, ...]

    @property
    def value(self) -> float:
        """Bits per byte, lower is better: summed bits of surprise over summed UTF-8 bytes."""
        return self.nats / math.log(2) / self.bytes

    @property
    def nats(self) -> float:
        return math.fsum(document.nats for document in self.per_document)

    @property
    def documents(self) -> int:
        return len(self.per_document)

    @property
    def bytes(self) -> int:
        return sum(document.bytes for document in self.per_document)

    @property
    def words(self) -> int:
        return sum(document.words for document in self.per_document)

    @property
    def tokens(self) -> int:
        return sum(document.tokens for document in self.per_document)

    @property
    def perplexity(self) -> float | None:
        """Perplexity per token; None where it is no finite number."""
        return _perplexity(self.nats, self.tokens)

    @property
    def word_perplexity(self) -> float | None:
        """Perplexity per word, split at white space; None where it is no finite number."""
        return _perplexity(self.nats, self.words)

    def to_json(self) -> dict[str, Any]:
        """Return plain data for a JSON file."""
        derived = ("value", "nats", "documents", "bytes", "words", "tokens", "perplexity", "word_perplexity")
        documents = [{**asdict(item), "bits_per_byte": item.bits_per_byte} for item in self.per_document]
        return {**{name: getattr(self, name) for name in derived}, **asdict(self), "per_document": documents}


def bits_per_byte(
    model: OpenELM,
    tokenizer: Tokenizer,
    documents: Sequence[str],
    names: Sequence[str] | None = None,
    *,
    window_tokens: int | None = None,
    stride_tokens: int | None = None,
    batch_rows: int = 8,
) -> Score:
    """Score whole documents with a sliding window.

    Each document starts with BOS (EOS where the tokenizer has no BOS), each of its tokens is scored exactly
    once, and the end-of-document token is not counted.

    Args:
        names: what errors and the result call the documents; by default "document 1", …
        window_tokens: positions the model sees at once; by default its whole context.
        stride_tokens: tokens scored by each window after the first, so each of them sees at least
            window_tokens - stride_tokens tokens before it; by default half the window.
        batch_rows: windows per forward pass; the score does not depend on it.

    Raises:
        DataError: there is no document, or one is empty or not valid Unicode.
        ConfigError: a length that the model does not allow, or a tokenizer that does not fit it.
        NumericError: a log-likelihood is not finite; names the document.
    """
    window_tokens, stride_tokens = _lengths(model, window_tokens, stride_tokens)
    if batch_rows < 1:
        raise ConfigError(f"batch_rows is {batch_rows}", fix="use 1 or more")
    if names is None:
        names = [f"document {number}" for number in range(1, len(documents) + 1)]
    raw = utf8_documents(documents, names)
    encoded = tokenizer.encode_many(documents)
    nats = _document_nats(model, tokenizer, encoded, names, (window_tokens, stride_tokens), batch_rows)

    interval_over: Literal["documents", "stretches"] = "documents"
    units = np.array([(values.sum(), len(data)) for values, data in zip(nats, raw, strict=True)])
    if len(documents) < DOCUMENTS_FOR_AN_INTERVAL:
        interval_over, token_bytes = "stretches", tokenizer.byte_lengths()
        parts = zip(nats, encoded, raw, strict=True)
        units = np.concatenate([stretches(values, token_bytes[ids], len(data)) for values, ids, data in parts])
    interval = ratio_interval(units[:, 0] / math.log(2), units[:, 1])
    return Score(
        low=interval[0] if interval else None,
        high=interval[1] if interval else None,
        interval_over=interval_over if interval else "none",
        units=len(units),
        window_tokens=window_tokens,
        stride_tokens=stride_tokens,
        tokenizer_sha256=tokenizer.sha256,
        per_document=tuple(
            DocumentScore(name, sha256_bytes(data), len(data), len(text.split()), len(values), math.fsum(values))
            for name, data, text, values in zip(names, raw, documents, nats, strict=True)
        ),
    )


def _document_nats(
    model: OpenELM,
    tokenizer: Tokenizer,
    encoded: Sequence[Sequence[int]],
    names: Sequence[str],
    lengths: tuple[int, int],
    batch_rows: int,
) -> list[np.ndarray]:
    """Score the tokens of every document: the surprise of each in nats, float64 (tokens,)."""
    start_id = _start_id(model, tokenizer)
    rows, row_counts = [], []
    for ids, name in zip(encoded, names, strict=True):
        full = np.array([start_id, *ids], dtype=np.int64)
        spans = list(windows(len(ids), *lengths))
        rows += [Row(full[start : end + 1], scored, name) for start, end, scored in spans]
        row_counts.append(len(spans))
    scored_rows = iter(log_likelihoods(model, rows, vocab_size=tokenizer.vocab_size, batch_rows=batch_rows))
    return [-np.concatenate([next(scored_rows) for _ in range(count)]) for count in row_counts]


def stretches(nats: np.ndarray, token_bytes: np.ndarray, document_bytes: int) -> np.ndarray:
    """Cut a document at token boundaries into stretches of about 4 KiB -> (stretches, 2): nats, bytes.

    nats, token_bytes: (tokens,). A space that the tokenizer puts before the text is taken off the first one.
    """
    count = min(max(1, round(document_bytes / STRETCH_BYTES)), len(nats))
    before = np.cumsum(token_bytes) - token_bytes
    stretch = np.minimum(before * count // max(1, int(token_bytes.sum())), count - 1)
    sizes = np.bincount(stretch, token_bytes, minlength=count)
    sizes[0] += document_bytes - sizes.sum()
    return np.stack((np.bincount(stretch, nats, minlength=count), sizes), axis=1)


def utf8_documents(documents: Sequence[str], names: Sequence[str]) -> list[bytes]:
    """Encode documents that are to be scored.

    Raises:
        DataError: there is none, or one is empty or not valid Unicode; names it.
    """
    if not documents:
        raise DataError("there is no document to score", fix="give at least one document with text")
    raw = []
    for text, name in zip(documents, names, strict=True):
        if not text:
            raise DataError(f"{name} is empty", fix="leave empty documents out")
        try:
            raw.append(text.encode())
        except UnicodeEncodeError as error:
            raise DataError(f"{name} is not valid Unicode at character {error.start}", code="E_TEXT") from None
    return raw


def _lengths(model: OpenELM, window_tokens: int | None, stride_tokens: int | None) -> tuple[int, int]:
    context_tokens = model.config.max_context_length
    window_tokens = context_tokens if window_tokens is None else window_tokens
    if not 1 <= window_tokens <= context_tokens:
        raise ConfigError(f"window_tokens is {window_tokens}", fix=f"use 1 to {context_tokens}, the model's context")
    stride_tokens = max(1, window_tokens // 2) if stride_tokens is None else stride_tokens
    if not 1 <= stride_tokens <= window_tokens:
        raise ConfigError(f"stride_tokens is {stride_tokens}", fix=f"use 1 to {window_tokens}, the window")
    return window_tokens, stride_tokens


def _start_id(model: OpenELM, tokenizer: Tokenizer) -> int:
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} ids and the model only {model.config.vocab_size}",
            fix="use the tokenizer the model was trained with",
        )
    start_id = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    if start_id is None:
        raise ConfigError(
            "the tokenizer has neither a BOS nor an EOS id, so a document's first token has no context",
            fix="use a tokenizer with one of them",
        )
    return start_id


def _perplexity(nats: float, units: int) -> float | None:
    try:
        return math.exp(nats / units)
    except (OverflowError, ZeroDivisionError):
        return None
