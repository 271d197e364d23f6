"""Train a SentencePiece tokenizer: the same texts give the same bytes, and no text is skipped."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator

from sentencepiece import SentencePieceTrainer

from openelm.errors import DataError
from openelm.text.base import SPACE_MARK, check_unicode
from openelm.text.spm import SentencePieceTokenizer

_COVERAGE = 0.9999  # of the characters get a piece of their own; rarer ones are spelled in bytes
_FIXED_IDS = 3 + 256  # unk, bos, eos and the byte pieces
_CHUNK_CHARACTERS = 4096
# The trainer cuts before spaces anyway, so a cut there changes no count; it strips newlines at the end.
_CHUNK = re.compile(rf".{{1,{_CHUNK_CHARACTERS}}}(?<![\r\n])(?= )|.{{1,{_CHUNK_CHARACTERS}}}", re.DOTALL)
# The trainer drops a sentence that holds U+2585, cuts at tabs, and takes names of its pieces for the pieces.
_RESERVED_CHARACTERS = {"\0", "\t", "▅", SPACE_MARK}
_RESERVED_NAME = r"(?<=<)(?=unk>|s>|/s>|0x[0-9A-F]{2}>)"
_BOUNDARY = "\t"  # the trainer's own mark for a boundary: never part of a piece


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> SentencePieceTokenizer:
    """Train a lossless BPE tokenizer with ids unk 0, bos 1, eos 2, bytes 3..258, then pieces by merge order.

    Digits stand alone, a piece never spans a space or two scripts, newlines merge with the punctuation before
    them: of the variants measured, the one with the fewest held-out bits per byte under a 5-gram model.

    Args:
        texts: documents; all are held in memory.
        vocab_size: ids in all, at most what the texts have pieces for.

    Raises:
        DataError: (E_TEXT) a text holds a lone surrogate; (E_TOKENIZER) `vocab_size` does not fit the texts.
    """
    documents = list(texts)
    alphabet, rare = _alphabet(documents)
    smallest = _FIXED_IDS + len(alphabet)
    if vocab_size < smallest:
        raise DataError(
            f"a vocabulary of {vocab_size} cannot hold {len(alphabet)} characters and {_FIXED_IDS} fixed ids",
            fix=f"ask for at least {smallest}",
            code="E_TOKENIZER",
        )
    chunks = [*_chunks(documents, rare), " "]  # without a piece for " " the model could not tell it from "▁"
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(chunks),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,  # a shortage is told below, with the number that would fit
        byte_fallback=True,
        character_coverage=1.0,  # the rare characters are cut out already
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        max_sentence_length=1 << 30,  # bytes; longer ones would be skipped
        num_threads=1,  # its number must not show in the result
        minloglevel=3,
    )
    tokenizer = SentencePieceTokenizer(model.getvalue())
    if (largest := tokenizer.vocab_size) < vocab_size:
        raise DataError(
            f"{sum(map(len, documents)):,} characters give at most {largest} ids, not {vocab_size}",
            fix=f"ask for a vocabulary of {smallest}..{largest}, or give more text",
            code="E_TOKENIZER",
        )
    return tokenizer


def _alphabet(documents: list[str]) -> tuple[set[str], set[str]]:
    """Return the frequent characters and the rare ones; ties are broken by code point."""
    counts: Counter[str] = Counter()
    for index, text in enumerate(documents):
        check_unicode(text, index)
        counts.update(text)
    total, covered, alphabet = counts.total(), 0, {" "}
    for character, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if covered >= _COVERAGE * total:
            break
        covered += count
        alphabet.add(character)
    alphabet -= _RESERVED_CHARACTERS
    return alphabet, set(counts) - alphabet


def _chunks(documents: list[str], rare: set[str]) -> Iterator[str]:
    rare_class = "".join(re.escape(character) for character in sorted(rare))
    cut = re.compile(f"{_RESERVED_NAME}|[{rare_class}]" if rare else _RESERVED_NAME)
    for text in documents:
        for stretch in cut.split(text):
            for chunk in _CHUNK.findall(stretch):
                yield chunk + _BOUNDARY if chunk[-1] in "\r\n" else chunk
