"""What every tokenizer promises: text comes back as it was, and text never becomes a control id."""

from __future__ import annotations

import codecs
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from openelm.errors import DataError
from openelm.files.atomic import make_folder, write_atomic
from openelm.files.hashes import sha256_bytes
from openelm.text.chat import CHAT_TEMPLATE

SPACE_MARK = "▁"  # U+2581 stands for a space inside the pieces of SentencePiece and its descendants
_UTF8_BYTES = frozenset(range(0xF5)) - {0xC0, 0xC1}  # the byte values that valid UTF-8 can hold
_RARE_BYTES = frozenset(range(0x20)) - set(b"\t\n\r") | {0xF1, 0xF2, 0xF3, 0xF4}
"""Control characters, and what begins characters from U+40000 on: some published tokenizers never saw all of them."""
_PROBE = (
    "a",
    " a  b   c \n\n\t\r\n x\0y ",
    "Cafe\u0301 Café ﬁ Ａ ½ \u2028\u200b\u0085 …",  # changed by NFC, NFKC, lower-casing, stripping
    "▁a ▁ 你好 🦙 <s></s><|endoftext|><unk><0x41> isn't don 't 's , .",
)


def refuse(what: str, *, fix: str, file: Path | None = None) -> DataError:
    """Make the error for a file that cannot serve as a tokenizer."""
    return DataError(what, fix=fix, file=file, code="E_TOKENIZER")


def check_unicode(text: str, index: int = 0) -> None:
    """Refuse a text with lone surrogates, which have no UTF-8 form.

    Raises:
        DataError: (E_TEXT) at `offset` in UTF-8 bytes of text number `index`.
    """
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"text {index} holds the lone surrogate U+{ord(text[error.start]):04X}: not Unicode text",
            fix="read the file as UTF-8 and drop or replace such characters",
            offset=len(text[: error.start].encode()),
            code="E_TEXT",
        ) from None


class Tokenizer(ABC):
    """Turn text into ids in `0..vocab_size-1` and back, without loss.

    A published tokenizer may lack ids for bytes that hardly any text holds (SmolLM2's has none for U+0004 and seven
    others): these are left out of a text, as its own library leaves them out.

    A tokenizer that puts a space before the text (LLaMA's does; `leading_space`) has that space in its ids,
    so its `byte_lengths` count one byte more than each non-empty text has; for all others the sum is exact.

    Args:
        data: the tokenizer file's bytes; `sha256` is their hash and `save` writes them back unchanged.
        table: the UTF-8 bytes that each id stands for; b"" for control ids.
        puts_bos: a text to be read or continued begins with BOS, where there is one.
        leading_space: a space is put before each non-empty text, and one is taken off again by `decode`.
        marks_spaces: pieces hold "▁" for a space, so a literal "▁" must be spelled in bytes.
        file: where it came from, for messages.

    Raises:
        DataError: (E_TOKENIZER) the table or the codec loses text.
    """

    file_name: ClassVar[str]

    def __init__(
        self,
        data: bytes,
        table: Sequence[bytes],
        *,
        bos_id: int | None,
        eos_id: int | None,
        puts_bos: bool = True,
        leading_space: bool = False,
        marks_spaces: bool = False,
        file: Path | None = None,
    ) -> None:
        self.vocab_size = len(table)
        self.bos_id, self.eos_id = bos_id, eos_id
        self.puts_bos = puts_bos and bos_id is not None
        self.sha256 = sha256_bytes(data)
        self.file_bytes, self._table = data, tuple(table)
        self._leading_space = leading_space
        one_byte = {piece[0]: token_id for token_id, piece in enumerate(table) if len(piece) == 1}
        fix = "use a byte-level or byte-fallback tokenizer without Unicode normalisation"
        if missing := _UTF8_BYTES - _RARE_BYTES - one_byte.keys():
            raise refuse(f"{len(missing)} byte values have no id", fix=fix, file=file)
        self._mark_ids = [one_byte[byte] for byte in SPACE_MARK.encode()] if marks_spaces else None
        for text in _PROBE:
            if self.decode(self.encode(text)) != text:
                raise refuse(f"the tokenizer loses text: {text!r} does not come back", fix=fix, file=file)

    @property
    def start_ids(self) -> list[int]:
        """Return what a text to be read or continued begins with: BOS, or nothing."""
        return [self.bos_id] if self.puts_bos and self.bos_id is not None else []

    @property
    def leading_space(self) -> bool:
        """Tell whether a space is put before each text, and taken off again where a text begins."""
        return self._leading_space

    @abstractmethod
    def _encode_parts(self, parts: list[str]) -> list[list[int]]:
        """Encode strings as they are: no leading space, no special tokens; "" gives []."""

    @abstractmethod
    def _token_text(self, token_id: int) -> str:
        """Return the name of a control id, such as "<s>"."""

    def encode(self, text: str) -> list[int]:
        """Encode one text; no BOS or EOS is added, and "</s>" in it is text like any other.

        Raises:
            DataError: (E_TEXT) the text holds a lone surrogate, at `offset` in UTF-8 bytes.
        """
        return self.encode_many([text])[0]

    def encode_array(self, text: str) -> NDArray[np.int32]:
        """Encode one text as `encode` does, to (ids,) int32; the loader's way, for ids become no Python numbers.

        Raises:
            DataError: (E_TEXT) as `encode`.
        """
        parts = self._parts(text, 0)
        return self._encode_part_array(parts[0]) if len(parts) == 1 else np.array(self.encode(text), np.int32)

    def _encode_part_array(self, part: str) -> NDArray[np.int32]:
        return np.array(self._encode_parts([part])[0], np.int32)

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode texts in one call of the library; equal to `[encode(text) for text in texts]`.

        Raises:
            DataError: (E_TEXT) a text holds a lone surrogate; `what` says which text.
        """
        split = [self._parts(text, index) for index, text in enumerate(texts)]
        encoded = self._encode_parts([part for parts in split for part in parts])
        if self._mark_ids is None or len(encoded) == len(split):  # no text holds a literal "▁"
            return encoded
        rows, remaining = [], iter(encoded)
        for parts in split:
            row = list(next(remaining))
            for _ in parts[1:]:
                row += self._mark_ids
                row += next(remaining)
            rows.append(row)
        return rows

    def _parts(self, text: str, index: int) -> list[str]:
        check_unicode(text, index)
        if self._leading_space and text:
            text = " " + text
        return [text] if self._mark_ids is None else text.split(SPACE_MARK)

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids; control ids are dropped, bytes that are not UTF-8 become U+FFFD.

        Raises:
            DataError: (E_TOKENIZER) an id is outside the vocabulary.
        """
        data = b"".join([self.token_bytes(token_id) for token_id in ids])
        return (data.removeprefix(b" ") if self._leading_space else data).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Return the UTF-8 bytes one id stands for, b"" for a control id; they may be a part of a character.

        Raises:
            DataError: (E_TOKENIZER) the id is outside the vocabulary.
        """
        if 0 <= token_id < self.vocab_size:
            return self._table[token_id]
        raise refuse(
            f"token id {token_id} is outside the vocabulary 0..{self.vocab_size - 1}",
            fix="use the tokenizer this model was trained with",
        )

    def byte_lengths(self) -> NDArray[np.int32]:
        """Return the UTF-8 bytes each id stands for, (vocab_size,) int32; 0 for control ids."""
        return np.array([len(piece) for piece in self._table], dtype=np.int32)

    def save(self, folder: Path, *, chat_template: bool = False) -> None:
        """Write the tokenizer file and `tokenizer_config.json` for Hugging Face.

        Args:
            chat_template: write `chat_template.jinja` too, for a model that learned the chat format.

        Raises:
            DiskError: the folder cannot be written.
        """
        make_folder(folder)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self._hf_config()}
        if chat_template:
            config["chat_template"] = CHAT_TEMPLATE
            write_atomic(folder / "chat_template.jinja", CHAT_TEMPLATE.encode())
        write_atomic(folder / self.file_name, self.file_bytes)
        write_atomic(folder / "tokenizer_config.json", (json.dumps(config, indent=2) + "\n").encode())

    def _hf_config(self) -> dict[str, Any]:
        return {
            "bos_token": None if self.bos_id is None else self._token_text(self.bos_id),
            "eos_token": None if self.eos_id is None else self._token_text(self.eos_id),
            "add_bos_token": self.puts_bos,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,  # it would take spaces out of the text
        }


class TextStream:
    """Turn ids into text one by one, never yielding a broken character.

    The parts yielded, joined, are `tokenizer.decode(ids)`; a push costs O(1).

    Args:
        continues: other text stands before this one (a prompt), so a first space belongs to the text.
    """

    def __init__(self, tokenizer: Tokenizer, *, continues: bool = False) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._drop_space = tokenizer._leading_space and not continues

    def push(self, token_id: int) -> str:
        """Take one id; return the text that is complete now, often "" inside a character.

        Raises:
            DataError: (E_TOKENIZER) the id is outside the vocabulary.
        """
        data = self._tokenizer.token_bytes(token_id)
        if data and self._drop_space:
            data, self._drop_space = data.removeprefix(b" "), False
        return self._decoder.decode(data)

    def finish(self) -> str:
        """Return what is left: U+FFFD for a character that was cut short, else ""."""
        return self._decoder.decode(b"", final=True)
