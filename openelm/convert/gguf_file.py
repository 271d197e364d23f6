"""The header of a GGUF file (github.com/ggml-org/ggml, docs/gguf.md), read within bounds.

The `gguf` package reads an array's length from the file and loops as often, past the end of the file: a few damaged
bytes keep it busy for ever. So headers are read here, and the package is used to write and for quantised numbers.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openelm.convert.extras import needed
from openelm.errors import CheckpointError
from openelm.model.weights import LazyTensor, read_at

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_NUMBERS = "BbHhIif?", "Qqd"  # struct's letters of value types 0 to 7, and 10 to 12
_STRING, _ARRAY = 8, 9
_LETTERS = dict(enumerate(_NUMBERS[0])) | dict(enumerate(_NUMBERS[1], start=10))
_FIELDS_MAX, _TENSORS_MAX, _STRING_MAX, _DIMENSIONS_MAX, _ALIGNMENT_MAX = 10_000, 100_000, 1 << 20, 4, 1 << 16
PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
"""Numbers of ggml's types that are numbers already."""


@dataclass(frozen=True)
class GGUF:
    """What a file says: its metadata, and its tensors by their GGUF names."""

    fields: dict[str, Any]
    tensors: dict[str, LazyTensor]


class _Cursor:
    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.place = data, 0

    def number(self, letter: str) -> Any:
        (value,) = self.numbers(letter, 1)
        return value

    def numbers(self, letter: str, count: int) -> tuple[Any, ...]:
        size = count * struct.calcsize(letter)
        if count < 0 or size > len(self.data) - self.place:
            raise EOFError
        found = struct.unpack_from(f"<{count}{letter}", self.data, self.place)
        self.place += size
        return found

    def string(self) -> str:
        length = self.number("Q")
        if length > min(_STRING_MAX, len(self.data) - self.place):
            raise EOFError
        self.place += length
        return self.data[self.place - length : self.place].decode()

    def value(self) -> Any:
        kind = self.number("I")
        if kind != _ARRAY:
            return self.string() if kind == _STRING else self.number(_LETTERS[kind])
        kind, length = self.numbers("I", 1)[0], self.number("Q")
        if kind == _STRING:
            if 8 * length > len(self.data) - self.place:
                raise EOFError
            return [self.string() for _ in range(length)]
        return list(self.numbers(_LETTERS[kind], length))


def read_gguf(path: Path) -> GGUF:
    """Read what a GGUF file says, and open its tensors.

    Raises:
        CheckpointError: the file is missing, cut or damaged, or says what cannot be; `offset` is where.
    """
    try:
        if not path.is_file() or path.is_symlink() or not path.stat().st_size:
            raise CheckpointError("missing, empty, or not a plain file", file=path, fix="give a .gguf file")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            cursor = _Cursor(data)
            try:
                return _read(cursor, path)
            except (EOFError, LookupError, ValueError, struct.error, OverflowError):
                what = "damaged, or not a GGUF file of version 2 or 3"
                raise CheckpointError(what, file=path, offset=cursor.place) from None
    except OSError as error:
        raise CheckpointError(f"cannot read it: {error.strerror}", file=path) from None


def _read(cursor: _Cursor, path: Path) -> GGUF:
    if bytes(cursor.numbers("B", 4)) != _MAGIC or cursor.number("I") not in _VERSIONS:
        raise ValueError
    tensor_count, field_count = cursor.numbers("Q", 2)
    if tensor_count > _TENSORS_MAX or field_count > _FIELDS_MAX:
        raise ValueError
    fields: dict[str, Any] = {}
    for _ in range(field_count):
        name = cursor.string()
        if name in fields:
            raise ValueError
        fields[name] = cursor.value()
    described = [_tensor(cursor) for _ in range(tensor_count)]
    alignment = fields.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= _ALIGNMENT_MAX:
        raise ValueError
    start = -(-cursor.place // alignment) * alignment
    tensors: dict[str, LazyTensor] = {}
    for name, shape, kind, offset in described:
        if name in tensors:
            raise ValueError
        tensors[name] = _opened(path, name, shape, kind, start + offset, len(cursor.data))
    return GGUF(fields, tensors)


def _tensor(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name, dimensions = cursor.string(), cursor.number("I")
    if dimensions > _DIMENSIONS_MAX:
        raise ValueError
    shape = cursor.numbers("Q", dimensions)[::-1]  # GGUF names the innermost first
    if any(not 0 < size < 1 << 32 for size in shape):
        raise ValueError
    return name, tuple(shape), cursor.number("I"), cursor.number("Q")


def _opened(path: Path, name: str, shape: tuple[int, ...], kind: int, offset: int, file_bytes: int) -> LazyTensor:
    dtype = PLAIN.get(kind)
    if dtype is not None:
        size, read = prod(shape) * dtype.itemsize, read_at(path, offset, shape, dtype)
    else:
        size, read = _quantised(path, name, shape, kind, offset)
    if offset + size > file_bytes:
        what = f"{name} ends at byte {offset + size}, the file at {file_bytes}"
        raise CheckpointError(what, file=path, offset=file_bytes, code="E_TRUNC")
    return LazyTensor(dtype or torch.float32, shape, read)


def _quantised(
    path: Path, name: str, shape: tuple[int, ...], kind: int, offset: int
) -> tuple[int, Callable[[], Tensor]]:
    """Return the size and a reader of a tensor of blocks, as the numbers that they stand for."""
    gguf = needed("gguf", extra="gguf")
    try:
        quantisation = gguf.GGMLQuantizationType(kind)
        packed = gguf.quant_shape_to_byte_shape(shape, quantisation)
    except ValueError:
        raise CheckpointError(f"{name} has the unknown type {kind}, or rows that it cannot have", file=path) from None
    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[quantisation][1]), np.uint8), quantisation)  # one block
    except NotImplementedError:
        what = f"{name} is {quantisation.name}, which the gguf package cannot unpack"
        raise CheckpointError(what, file=path, fix="use llama-quantize to make an F32 or Q8_0 file of it") from None

    def read() -> Tensor:
        blocks = read_at(path, offset, tuple(packed), torch.uint8)().numpy()
        return torch.from_numpy(gguf.dequantize(blocks, quantisation)).view(shape)

    return prod(packed), read
