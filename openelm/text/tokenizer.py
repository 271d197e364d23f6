"""Open a tokenizer, whatever its format; the names the rest of the project imports."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from openelm.text.base import TextStream, Tokenizer, refuse
from openelm.text.huggingface import ByteTokenizer, HuggingFaceTokenizer
from openelm.text.spm import SentencePieceTokenizer
from openelm.text.train import train_tokenizer

__all__ = [
    "ByteTokenizer",
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "TextStream",
    "Tokenizer",
    "load_tokenizer",
    "train_tokenizer",
]

_LARGEST_BYTES = 64 << 20  # twice the largest tokenizer.json published
_FIX = "give a SentencePiece .model, a tokenizer.json, or a folder that holds one of these"


def load_tokenizer(path: Path) -> Tokenizer:
    """Open a tokenizer file, or the one in a folder (`tokenizer.model` first, then `tokenizer.json`).

    BOS and EOS of a `tokenizer.json`, and whether texts begin with BOS, stand in the `tokenizer_config.json` beside it.

    Raises:
        DataError: (E_TOKENIZER) it is missing, damaged, too large, no tokenizer, or one that loses text.
    """
    if path.is_dir():
        candidates = [path / name for name in ("tokenizer.model", "tokenizer.json")]
        found = next((file for file in candidates if file.is_file()), None)
        if found is None:
            raise refuse("the folder holds neither tokenizer.model nor tokenizer.json", fix=_FIX, file=path)
        path = found
    data = _read(path)
    if path.suffix != ".json":
        return SentencePieceTokenizer(data, file=path)
    if data == (plain := ByteTokenizer()).file_bytes:
        return plain
    return HuggingFaceTokenizer(data, names=_names(path.with_name("tokenizer_config.json")), file=path)


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise refuse("no such file" if not path.exists() else "not a regular file", fix=_FIX, file=path)
    try:
        size = path.stat().st_size
        data = path.read_bytes() if size <= _LARGEST_BYTES else b""
    except OSError as error:
        raise refuse(f"cannot be read: {error.strerror}", fix="check its permissions", file=path) from None
    if not data:
        raise refuse(f"{size:,} bytes; a tokenizer has 1 to {_LARGEST_BYTES:,}", fix=_FIX, file=path)
    return data


def _names(path: Path) -> Mapping[str, Any]:
    if not path.exists():
        return {}
    try:
        config = json.loads(_read(path))
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise refuse("not a JSON object", fix="copy the file again, or remove it", file=path)
    return config
