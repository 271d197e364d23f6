"""Weights on disk: safetensors files, one or several, read a tensor at a time. What a file says is checked first."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from openelm.errors import CheckpointError
from openelm.files.hashed import HashedFile
from openelm.files.hashes import FileFacts

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_HEADER_BYTES_MAX, _INDEX_BYTES_MAX, _TENSORS_MAX, _FILES_MAX = 16 << 20, 16 << 20, 100_000, 1_000
_NAME = re.compile(r"[\w.\-]{1,256}", re.ASCII)
_METADATA = "__metadata__"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PACKED = {"U32": torch.uint32}
_NAMES = {dtype: name for name, dtype in (_DTYPES | _PACKED).items()}
_DAMAGED = (ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error)


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read when it is wanted.

    Attributes:
        read: returns it, on the CPU and without gaps; each call reads again.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def to(self, dtype: torch.dtype) -> LazyTensor:
        """Return the tensor in another dtype, rounded to nearest even."""
        if dtype == self.dtype:
            return self
        return LazyTensor(dtype, self.shape, lambda: self.read().to(dtype))


Weights = Mapping[str, LazyTensor]
"""Tensors by name, none of them read yet."""


def in_memory(tensors: Mapping[str, Tensor]) -> dict[str, LazyTensor]:
    """Wrap tensors that are in memory already."""

    def lazy(tensor: Tensor) -> LazyTensor:
        return LazyTensor(tensor.dtype, tuple(tensor.shape), lambda: tensor.detach().cpu().contiguous())

    return {name: lazy(tensor) for name, tensor in tensors.items()}


def weight_files(folder: Path) -> list[str]:
    """Name the files that hold a folder's weights, the index among them.

    Raises:
        CheckpointError: the index is damaged.
    """
    if not (folder / INDEX).exists():
        return [WEIGHTS]
    return [INDEX, *sorted(set(_read_index(folder / INDEX).values()))]


def open_weights(folder: Path, *, packed: bool = False) -> dict[str, LazyTensor]:
    """Open `model.safetensors` of a folder, or the files that its index lists; `packed` as in `open_safetensors`.

    Raises:
        CheckpointError: a file is missing or damaged, or the index and the files disagree.
    """
    if not (folder / INDEX).exists():
        return open_safetensors(folder / WEIGHTS, packed=packed)
    weights: dict[str, LazyTensor] = {}
    listed = _read_index(folder / INDEX)
    for name in sorted(set(listed.values())):
        found = open_safetensors(folder / name, packed=packed)
        for tensor in found:
            if listed.get(tensor) != name:
                what = f"the index does not say that {tensor} is in {name}"
                raise CheckpointError(what, file=folder / INDEX, fix="copy the folder again")
        weights |= found
    if missing := sorted(listed.keys() - weights.keys()):
        raise CheckpointError(f"{missing[0]} is not in this file", file=folder / listed[missing[0]])
    return weights


def _read_index(path: Path) -> dict[str, str]:
    try:
        if path.stat().st_size > _INDEX_BYTES_MAX:
            raise ValueError
        listed = json.loads(path.read_bytes())["weight_map"]
        files = set(listed.values())
        plain = all(re.fullmatch(r"[\w\-]+(\.[\w\-]+)*\.safetensors", name, re.ASCII) for name in files)
        if not (plain and files and len(files) <= _FILES_MAX):
            raise ValueError
    except OSError as error:
        raise CheckpointError(f"cannot read the index of the weights: {error.strerror}", file=path) from None
    except _DAMAGED:
        what = "not an index of weights: its weight_map names the .safetensors file of each tensor, in this folder"
        raise CheckpointError(what, file=path) from None
    return dict(listed)


def open_safetensors(path: Path, *, packed: bool = False) -> dict[str, LazyTensor]:
    """Read the header of a safetensors file (github.com/huggingface/safetensors, "Format").

    Args:
        packed: integers of 32 bits are allowed besides floating point, for weights that were quantised.

    Raises:
        CheckpointError: the file is missing, is no plain file, was cut, or its header says what cannot be.
    """
    try:
        if not path.is_file() or _leads_away(path):
            raise CheckpointError("cannot read the weights: no plain file", file=path, fix="give a model folder")
        size = path.stat().st_size
        with path.open("rb") as file:
            start, header = _read_header(file, size, path)
    except OSError as error:
        raise CheckpointError(f"cannot read the weights: {error.strerror}", file=path) from None
    allowed = _DTYPES | _PACKED if packed else _DTYPES
    weights, end = {}, 0
    for name, entry in sorted(header, key=lambda item: (item[1].begin, item[1].end)):
        if entry.dtype not in allowed:
            what = f"dtype {entry.dtype} of {name} cannot be computed with; these can: {', '.join(allowed)}"
            raise CheckpointError(what, file=path)
        dtype = allowed[entry.dtype]
        if entry.begin != end or entry.end - entry.begin != prod(entry.shape) * dtype.itemsize:
            what = f"{name}: {entry.dtype} {list(entry.shape)} is not what bytes {entry.begin} to {entry.end} hold"
            raise CheckpointError(what, file=path, offset=start + entry.begin)
        end = entry.end
        weights[name] = LazyTensor(dtype, entry.shape, read_at(path, start + entry.begin, entry.shape, dtype))
    if start + end != size:
        what = f"{size} bytes, but the header describes {start + end}"
        raise CheckpointError(what, file=path, offset=min(size, start + end), code="E_TRUNC")
    return weights


@dataclass(frozen=True)
class _Entry:
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def _read_header(file: BinaryIO, size: int, path: Path) -> tuple[int, list[tuple[str, _Entry]]]:
    """Return where the data begins, and what the header says of each tensor, types checked."""
    try:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(_HEADER_BYTES_MAX, size - 8):
            raise ValueError
        header = json.loads(file.read(length), object_pairs_hook=_once)
        if len(header) > _TENSORS_MAX:
            raise ValueError
        found = [(name, _entry(name, value)) for name, value in header.items() if name != _METADATA]
    except _DAMAGED:
        raise CheckpointError("damaged, or not a safetensors file", file=path, offset=0) from None
    return 8 + length, found


def _entry(name: str, value: Any) -> _Entry:
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    begin, end = offsets
    whole = all(type(number) is int and 0 <= number < 1 << 48 for number in (*shape, begin, end))
    if not (_NAME.fullmatch(name) and type(dtype) is str and whole and len(shape) <= 8 and len(value) == 3):
        raise ValueError
    return _Entry(dtype[:16], tuple(shape), begin, end)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object; a name given twice could mean one thing here and another elsewhere."""
    if len(names := dict(pairs)) != len(pairs):
        raise ValueError
    return names


def _leads_away(path: Path) -> bool:
    """Tell whether a file is a link, but for those of the Hugging Face cache: from snapshots/REVISION to blobs."""
    return path.is_symlink() and path.resolve().parent != path.parent.resolve().parent.parent / "blobs"


def read_at(path: Path, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Callable[[], Tensor]:
    """Return what reads a tensor that begins at a byte of a file; the file is open only while it reads."""

    def read() -> Tensor:
        tensor = torch.empty(shape, dtype=dtype)
        memory = bytes_of(tensor)
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(offset)
                done = 0
                while done < len(memory):
                    if not (count := file.readinto(memory[done:])):
                        raise CheckpointError("ends too early", file=path, offset=offset + done, code="E_TRUNC")
                    done += count
        except OSError as error:
            raise CheckpointError(f"cannot read the weights: {error.strerror}", file=path, offset=offset) from None
        return tensor

    return read


def check_shapes(found: Weights, expected: Mapping[str, tuple[int, ...]], file: Path) -> None:
    """Compare names and shapes with the expected ones.

    Raises:
        CheckpointError: lists the first missing, unexpected and misshapen tensors.
    """
    problems = [
        *(f"missing {name}" for name in sorted(expected.keys() - found.keys())),
        *(f"unexpected {name}" for name in sorted(found.keys() - expected.keys())),
        *(
            f"{name} has shape {found[name].shape}, the config asks for {shape}"
            for name, shape in expected.items()
            if name in found and found[name].shape != shape
        ),
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError("; ".join(problems[:5]) + more, file=file, fix="the weights are of another model")


def write_safetensors(
    path: Path, weights: Weights, metadata: Mapping[str, str], written: Callable[[int], None] = lambda count: None
) -> FileFacts:
    """Write a safetensors file, holding few tensors at a time; returns its entry for a manifest, hashed on the way.

    Args:
        written: is told how many bytes of tensors were written since it was last told.

    Raises:
        OSError: the disk is full or read-only.
    """
    header = _header(weights, metadata)
    with HashedFile(path, len(header) + sum(tensor.bytes for tensor in weights.values())) as file:
        file.write(header)
        for tensor in weights.values():
            file.write(bytes_of(tensor.read()))
            written(tensor.bytes)
    return file.facts


def _header(weights: Weights, metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {_METADATA: dict(metadata)}
    end = 0
    for name, tensor in weights.items():
        begin, end = end, end + tensor.bytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the library aligns tensors so for those who map the file
    return struct.pack("<Q", len(text)) + text


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a tensor without gaps, to read or to fill."""
    memory: memoryview = tensor.view(-1).view(torch.uint8).numpy().data
    return memory
