"""Hugging Face `tokenizer.json` files (byte-level or byte-fallback BPE), and plain bytes in that format."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from openelm.text.base import SPACE_MARK, Tokenizer, refuse

_LARGEST_ID = (1 << 20) - 1  # four times the largest vocabulary published; more is damage or malice
_BOS_NAMES = ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>")
_EOS_NAMES = ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>")
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_FIX = "copy the file again, or use a byte-level or byte-fallback BPE tokenizer"


def _byte_letters() -> list[str]:
    """Return the letter that stands for each byte in byte-level vocabularies (Radford et al. 2019, GPT-2)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


_LETTERS = _byte_letters()
_BYTE_OF_LETTER = {ord(letter): byte for byte, letter in enumerate(_LETTERS)}


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`, made lossless and deaf to special tokens.

    The library looks for special tokens in every text, and BPE merges can spell them too. So both are taken
    out of the description before the library reads it: no input gives a control id. NFC normalisation, BPE
    dropout, truncation and padding are taken out as well; ids of NFC text stay those of the file's author.

    Args:
        data: the bytes of `tokenizer.json`.
        names: "bos_token" and "eos_token" as in `tokenizer_config.json`; usual names are tried where absent. With
            "add_bos_token" false there, texts do not begin with BOS.
        file: where `data` came from, for messages.

    Raises:
        DataError: (E_TOKENIZER) not such a file, or one that loses text.
    """

    file_name = "tokenizer.json"

    def __init__(self, data: bytes, *, names: Mapping[str, Any] | None = None, file: Path | None = None) -> None:
        try:
            spec = json.loads(data)
            ids = _token_ids(spec)
            control = {token["content"] for token in spec["added_tokens"] if token["special"]}
            bos, eos = (_control_name(names or {}, kind, ids, control) for kind in ("bos_token", "eos_token"))
            control |= {name for name in (bos, eos) if name is not None}
            self._names: dict[int, str] = {ids[name]: name for name in control}
            table = _table(spec, ids, control)
            leading_space = _take_out_leading_space(spec)
            self._library = tokenizers.Tokenizer.from_str(json.dumps(_without_control(spec, control)))
        except Exception as error:  # the library raises bare Exceptions
            raise refuse("not a usable tokenizer.json", fix=_FIX, file=file) from error
        super().__init__(
            data,
            table,
            bos_id=None if bos is None else ids[bos],
            eos_id=None if eos is None else ids[eos],
            puts_bos=(names or {}).get("add_bos_token") is not False,
            leading_space=leading_space,
            marks_spaces=not _is_byte_level(spec),
            file=file,
        )

    def _encode_parts(self, parts: list[str]) -> list[list[int]]:
        return [list(row.ids) for row in self._library.encode_batch_fast(parts, add_special_tokens=False)]

    def _token_text(self, token_id: int) -> str:
        return self._names[token_id]


class ByteTokenizer(Tokenizer):
    """256 bytes, then BOS 256 and EOS 257; saved as a `tokenizer.json` that gives the same ids."""

    file_name = "tokenizer.json"

    def __init__(self) -> None:
        table = [*(bytes([byte]) for byte in range(256)), b"", b""]
        super().__init__(_byte_description(), table, bos_id=256, eos_id=257)

    def _encode_parts(self, parts: list[str]) -> list[list[int]]:
        return [list(part.encode()) for part in parts]

    def _token_text(self, token_id: int) -> str:
        return {256: "<s>", 257: "</s>"}[token_id]


def _byte_description() -> bytes:
    library = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={letter: byte for byte, letter in enumerate(_LETTERS)}, merges=[])
    )
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    library.add_special_tokens(["<s>", "</s>"])
    return library.to_str().encode()


def _token_ids(spec: dict[str, Any]) -> dict[str, int]:
    if spec["model"]["type"] != "BPE":
        raise ValueError(spec["model"]["type"])
    ids = {**spec["model"]["vocab"], **{token["content"]: token["id"] for token in spec["added_tokens"]}}
    if not all(type(token_id) is int and 0 <= token_id <= _LARGEST_ID for token_id in ids.values()):
        raise ValueError("an id is out of range")
    return ids


def _control_name(names: Mapping[str, Any], kind: str, ids: Mapping[str, int], control: Iterable[str]) -> str | None:
    if kind not in names:
        usual = _BOS_NAMES if kind == "bos_token" else _EOS_NAMES
        return next((name for name in usual if name in control), None)
    name: str | None = names[kind]["content"] if isinstance(names[kind], dict) else names[kind]
    if name is not None and name not in ids:
        raise ValueError(f"{kind} has no id")
    return name


def _components(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Flatten a normalizer or pre-tokenizer, which may be a sequence of such."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    inner = part["normalizers"] if "normalizers" in part else part["pretokenizers"]
    return [component for inner_part in inner for component in _components(inner_part)]


def _is_byte_level(spec: dict[str, Any]) -> bool:
    parts = [*_components(spec["normalizer"]), *_components(spec["pre_tokenizer"])]
    return any(part["type"] == "ByteLevel" for part in parts)


def _table(spec: dict[str, Any], ids: dict[str, int], control: set[str]) -> list[bytes]:
    """Return the bytes each id stands for; ids that are not used get b""."""
    table = [b""] * (max(ids.values()) + 1)
    byte_level, byte_fallback = _is_byte_level(spec), spec["model"].get("byte_fallback", False)
    added = {token["content"] for token in spec["added_tokens"]}
    for piece, token_id in ids.items():
        if piece in control:
            continue
        if piece in added:
            table[token_id] = piece.encode()
        elif byte_level:
            table[token_id] = bytes(_BYTE_OF_LETTER[ord(letter)] for letter in piece)
        elif byte_fallback and (match := _BYTE_PIECE.fullmatch(piece)):
            table[token_id] = bytes([int(match[1], 16)])
        else:
            table[token_id] = piece.replace(SPACE_MARK, " ").encode()
    return table


def _take_out_leading_space(spec: dict[str, Any]) -> bool:
    """Remove what puts a space before the text, and NFC; return whether there was such a space.

    The base class puts the space instead: some of these steps leave it out where the text starts with a
    space, which makes two texts equal.
    """
    found = False
    normalizers = []
    for part in _components(spec["normalizer"]):
        found |= part["type"] == "Prepend"
        if part["type"] not in ("Prepend", "NFC"):
            normalizers.append(part)
    spec["normalizer"] = {"type": "Sequence", "normalizers": normalizers} if normalizers else None
    for part in _components(spec["pre_tokenizer"]):
        found |= part.get("add_prefix_space") is True or part.get("prepend_scheme", "never") != "never"
        if "add_prefix_space" in part:
            part["add_prefix_space"] = False
        if "prepend_scheme" in part:
            part["prepend_scheme"] = "never"
    return found


def _without_control(spec: dict[str, Any], control: set[str]) -> dict[str, Any]:
    """Describe the same tokenizer without the control tokens and without anything random or text-losing."""
    added = [token for token in spec["added_tokens"] if token["content"] not in control]
    added = [{**token, "lstrip": False, "rstrip": False} for token in added]
    # An added token that is no piece of the model would get the next free id instead of its own.
    pieces = {**spec["model"]["vocab"], **{token["content"]: token["id"] for token in added}}
    merges = []
    for merge in spec["model"]["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        if control.isdisjoint((left, right, left + right)):
            merges.append([left, right])
    model = {
        **spec["model"],
        "vocab": {piece: token_id for piece, token_id in pieces.items() if piece not in control},
        "merges": merges,
        "unk_token": None,
        "dropout": None,
    }
    unused = dict.fromkeys(("truncation", "padding", "post_processor", "decoder"))
    return {**spec, **unused, "model": model, "added_tokens": added}
