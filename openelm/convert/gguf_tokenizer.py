"""SentencePiece tokenizers inside GGUF files: pieces, scores and kinds as lists."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sentencepiece.sentencepiece_model_pb2 as protobuf
from sentencepiece import SentencePieceProcessor

from openelm.errors import CheckpointError, ConfigError
from openelm.text.chat import CHAT_TEMPLATE
from openelm.text.spm import SentencePieceTokenizer
from openelm.text.tokenizer import Tokenizer

_MODEL: Any = protobuf.ModelProto  # type: ignore[attr-defined]  # protobuf makes it while it is imported
_UNUSED = 5
"""The kind of a piece that no text leads to; the numbers are the same in both formats."""
_PREFIX = "tokenizer."
_BPE = 2


def tokenizer_fields(tokenizer: Tokenizer, rows: int, *, chat_tuned: bool) -> dict[str, Any]:
    """Describe a tokenizer for a model with `rows` rows; rows without an id get a piece that no text leads to.

    Raises:
        ConfigError: it is no SentencePiece model.
    """
    if not isinstance(tokenizer, SentencePieceTokenizer):
        raise ConfigError(
            f"GGUF files hold SentencePiece models, and this model has a {tokenizer.file_name}",
            fix="attach one with --tokenizer",
        )
    model = _MODEL.FromString(tokenizer.file_bytes)
    pieces = [(piece.piece, piece.score, piece.type) for piece in model.pieces]
    pieces += [(f"[PAD{number}]", -10_000.0, _UNUSED) for number in range(len(pieces), rows)]
    texts, scores, kinds = (list(column) for column in zip(*pieces, strict=True))
    fields = {
        "ggml.model": "llama",
        "ggml.pre": "default",
        "ggml.tokens": texts,
        "ggml.scores": scores,
        "ggml.token_type": kinds,
        "ggml.bos_token_id": tokenizer.bos_id,
        "ggml.eos_token_id": tokenizer.eos_id,
        "ggml.unknown_token_id": model.trainer_spec.unk_id,
        "ggml.add_bos_token": tokenizer.bos_id is not None,
        "ggml.add_eos_token": False,
        "ggml.add_space_prefix": model.normalizer_spec.add_dummy_prefix,
        "chat_template": CHAT_TEMPLATE if chat_tuned else None,
    }
    return {_PREFIX + name: value for name, value in fields.items() if value is not None}


def tokenizer_from(fields: Mapping[str, Any], file: Path) -> Tokenizer | None:
    """Rebuild the SentencePiece model that a GGUF file holds; None where it holds none.

    Raises:
        CheckpointError: the lists do not fit together.
        DataError: the tokenizer loses text.
    """

    def field(name: str) -> Any:
        return fields.get(f"{_PREFIX}ggml.{name}")

    if field("model") != "llama":
        return None
    try:
        pieces = list(zip(field("tokens"), field("scores"), field("token_type"), strict=True))
        while pieces and pieces[-1][2] == _UNUSED and pieces[-1][0] == f"[PAD{len(pieces) - 1}]":
            pieces.pop()
        model = _MODEL()
        for text, score, kind in pieces:
            model.pieces.add(piece=text, score=score, type=kind)
        trainer = model.trainer_spec
        trainer.model_type, trainer.vocab_size, trainer.byte_fallback = _BPE, len(pieces), True
        trainer.split_digits = trainer.allow_whitespace_only_pieces = True
        trainer.unk_id, trainer.pad_id = int(field("unknown_token_id") or 0), -1
        trainer.bos_id, trainer.eos_id = (-1 if field(name) is None else field(name) for name in _IDS)
        normalizer = model.normalizer_spec
        normalizer.name, normalizer.remove_extra_whitespaces, normalizer.escape_whitespaces = "identity", False, True
        normalizer.add_dummy_prefix = field("add_space_prefix") is not False
        data = model.SerializeToString()
        SentencePieceProcessor(model_proto=data)
    except (TypeError, ValueError, RuntimeError):
        raise CheckpointError("the tokenizer's lists do not fit together", file=file) from None
    return SentencePieceTokenizer(data, file=file)


_IDS = ("bos_token_id", "eos_token_id")
