"""SentencePiece `.model` files: LLaMA's own, and those `train_tokenizer` makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sentencepiece import SentencePieceProcessor, set_min_log_level

from openelm.files.atomic import write_atomic
from openelm.text.base import SPACE_MARK, Tokenizer, refuse
from openelm.text.spm_json import tokenizer_json
from openelm.text.units import UnitEncoder, has_units

# Of sentencepiece_model.proto: fields of ModelProto, which stand after the pieces; of TrainerSpec; and a model type.
_TRAINER_FIELD, _NORMALIZER_FIELD = 2, 3
_MODEL_TYPE_FIELD, _BPE = 3, 2
_CHARSMAP_FIELD = 2  # of NormalizerSpec: the compiled rules, empty for identity
_NUMBER, _BYTES, _FIXED_BYTES = 0, 2, {1: 8, 5: 4}  # wire types of protobuf
_SILENT = 3


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model with byte fallback and identity normalisation.

    Args:
        data: the bytes of the `.model` file.
        file: where they came from, for messages.

    Raises:
        DataError: (E_TOKENIZER) not a whole SentencePiece model, or one that loses text.
    """

    file_name = "tokenizer.model"

    def __init__(self, data: bytes, *, file: Path | None = None) -> None:
        damaged = refuse("not a whole SentencePiece model", fix="copy the file again, or train a tokenizer", file=file)
        # The library would load a file that was cut between two fields, and then give other ids.
        model = _fields(data)
        if not {_TRAINER_FIELD, _NORMALIZER_FIELD} <= model.keys():
            raise damaged
        normalizer = model[_NORMALIZER_FIELD]
        if isinstance(normalizer, bytes) and _fields(normalizer).get(_CHARSMAP_FIELD):
            what = "the SentencePiece model normalises: it replaces characters, so text does not come back"
            raise refuse(what, fix="use one that was trained with normalization_rule_name = identity", file=file)
        set_min_log_level(_SILENT)
        try:
            processor = SentencePieceProcessor(model_proto=data)
            table = [_piece_bytes(processor, token_id) for token_id in range(processor.vocab_size())]
            leading_space = table[processor.encode("a")[0]].startswith(b" ")
            processor.override_normalizer_spec(add_dummy_prefix=False)  # the base class puts the space
        except Exception as error:
            raise damaged from error
        self._processor = processor
        self._units: UnitEncoder | None = None
        pieces = [piece.decode(errors="replace") for piece in table]
        if _is_bpe(model[_TRAINER_FIELD]) and has_units(pieces):
            self._units = UnitEncoder(processor, np.array([len(piece) for piece in table], np.int32))
        bos_id, eos_id = processor.bos_id(), processor.eos_id()
        super().__init__(
            data,
            table,
            bos_id=bos_id if bos_id >= 0 else None,
            eos_id=eos_id if eos_id >= 0 else None,
            leading_space=leading_space,
            marks_spaces=True,
            file=file,
        )

    def _encode_parts(self, parts: list[str]) -> list[list[int]]:
        if self._units is not None:
            return [self._units.encode(part).tolist() for part in parts]
        if len(parts) == 1:  # without the library's thread pool: 8 µs instead of 250 µs for a short text
            return [list(self._processor.encode(parts[0]))]
        return list(self._processor.encode(parts))

    def _encode_part_array(self, part: str) -> NDArray[np.int32]:
        if self._units is not None:
            return self._units.encode(part)
        ids: NDArray[np.int32] = self._processor.encode(part, return_type="numpy")
        return ids

    def _token_text(self, token_id: int) -> str:
        return str(self._processor.id_to_piece(token_id))

    def _hf_config(self) -> dict[str, Any]:
        return {
            **super()._hf_config(),
            "unk_token": self._token_text(self._processor.unk_id()),
        }

    def save(self, folder: Path, *, chat_template: bool = False) -> None:
        """Write the `.model` file, the same as a `tokenizer.json`, and what `Tokenizer.save` writes."""
        super().save(folder, chat_template=chat_template)
        description = tokenizer_json(self._processor, leading_space=self._leading_space)
        write_atomic(folder / "tokenizer.json", description)


def _piece_bytes(processor: SentencePieceProcessor, token_id: int) -> bytes:
    if processor.is_control(token_id) or processor.is_unknown(token_id):
        return b""
    piece: str = processor.id_to_piece(token_id)
    if processor.is_byte(token_id):
        return bytes([int(piece.removeprefix("<0x").removesuffix(">"), 16)])
    return piece.replace(SPACE_MARK, " ").encode()


def _fields(data: bytes) -> dict[int, int | bytes]:
    """Return the last value of each top-level field of a protobuf message; nothing where it is cut or is none."""
    fields: dict[int, int | bytes] = {}
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        value, position = (0, position) if key & 7 in _FIXED_BYTES else _varint(data, position)
        length = _FIXED_BYTES.get(key & 7, value if key & 7 == _BYTES else 0)
        if key & 7 not in (_NUMBER, _BYTES, *_FIXED_BYTES) or position + length > len(data):
            return {}
        fields[key >> 3] = value if key & 7 == _NUMBER else data[position : position + length]
        position += length
    return fields


def _is_bpe(trainer: int | bytes) -> bool:
    return isinstance(trainer, bytes) and _fields(trainer).get(_MODEL_TYPE_FIELD) == _BPE


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(data) and shift < 64:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position
    return 0, len(data) + 1
