"""A SentencePiece BPE model as a `tokenizer.json`, for programs that read no `.model` file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from sentencepiece import SentencePieceProcessor

from openelm.text.base import SPACE_MARK


def tokenizer_json(processor: SentencePieceProcessor, *, leading_space: bool) -> bytes:
    """Describe a model with byte fallback for the library `tokenizers`; it gives the same ids.

    Args:
        leading_space: a space is put before each text, and taken off again.
    """
    pieces = [processor.id_to_piece(number) for number in range(processor.vocab_size())]
    control = [number for number in range(len(pieces)) if processor.is_control(number) or processor.is_unknown(number)]
    mergeable = [
        "" if number in set(control) or processor.is_byte(number) or processor.is_unused(number) else piece
        for number, piece in enumerate(pieces)
    ]
    spaces = [{"type": "Prepend", "prepend": SPACE_MARK}] if leading_space else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if leading_space else []
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}
    back = {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "}
    description = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(number, pieces[number]) for number in control],
        "normalizer": {"type": "Sequence", "normalizers": [*spaces, replace]},
        "pre_tokenizer": None,
        "post_processor": _first(processor.bos_id(), pieces),
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces[processor.unk_id()],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: number for number, piece in enumerate(pieces)},
            "merges": list(_merges(processor, mergeable)),
        },
    }
    return json.dumps(description, ensure_ascii=False).encode()


def _merges(processor: SentencePieceProcessor, pieces: Sequence[str]) -> Iterator[list[str]]:
    """Yield every pair of pieces that makes a piece, the best-scored result first: the order in which both merge."""
    known = set(pieces)
    by_score = sorted(range(len(pieces)), key=lambda number: (-processor.get_score(number), number))
    for number in by_score:
        piece = pieces[number]
        for cut in range(1, len(piece)):
            if piece[:cut] in known and piece[cut:] in known:
                yield [piece[:cut], piece[cut:]]


def _added(number: int, piece: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": number, "content": piece, **flags}


def _first(bos_id: int, pieces: Sequence[str]) -> dict[str, Any] | None:
    """Put the token that begins a text before each of them."""
    if bos_id < 0:
        return None
    bos = pieces[bos_id]
    one = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    two = [*one, {"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    special = {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}}
    return {"type": "TemplateProcessing", "single": one, "pair": two, "special_tokens": special}
