"""Published folders: they appear whole, with a manifest of SHA-256 and of checksums that say where damage is."""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from openelm.errors import CheckpointError
from openelm.files.atomic import replacing_folder, write_atomic
from openelm.files.hashes import (
    FileFacts,
    canonical_json,
    crc32,
    facts_of_file,
    piece_bytes,
    read_file,
    sha256_bytes,
    sha256_file,
)

MANIFEST = "manifest.json"
_HEADER_BYTES_MAX = 16 << 20
_NO_HEADER = (ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error)


@contextlib.contextmanager
def publish_folder(
    target: Path, *, replace: bool = False, known: Mapping[str, FileFacts] | None = None
) -> Iterator[Path]:
    """Yield a temporary folder that becomes `target` atomically, with a manifest, when the block ends well.

    Args:
        target: the final folder; its parents are created.
        replace: an existing `target` that this function published is removed after the new one is complete.
        known: of files by name, what was learned of them while they were written, so that they are not read again.

    Raises:
        CheckpointError: `target` exists, and `replace` is false or it is not a published folder.
        DiskError: the disk is full, read-only or forbidden; nothing is left under the final name.
    """
    published = (target / MANIFEST).is_file() or (target.is_dir() and not any(target.iterdir()))
    if target.exists() and not (replace and published):
        raise CheckpointError("the folder exists already", file=target, fix="choose another name or remove it")
    with replacing_folder(target) as temporary:
        yield temporary
        write_manifest(temporary, known)


def write_manifest(folder: Path, known: Mapping[str, FileFacts] | None = None) -> str:
    """Write `manifest.json` for a flat folder; returns its own hash. For `known` see `publish_folder`.

    It holds the size, SHA-256 and pieces' checksums of every file, and a checksum of all that, so that damage to the
    manifest is not taken for damage to a file.
    """
    names = sorted(file.name for file in folder.iterdir() if file.name != MANIFEST and file.is_file())
    files = {name: ((known or {}).get(name) or facts_of_file(folder / name)).to_json() for name in names}
    data = manifest_bytes(files)
    write_atomic(folder / MANIFEST, data)
    return sha256_bytes(data)


def manifest_bytes(files: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Lay out a manifest: what is known of each file, and the checksum of that."""
    return canonical_json({"crc32": crc32(canonical_json(files)), "files": files})


def verify_folder(folder: Path, *, names: Iterable[str] = ()) -> str:
    """Check every file against the folder's manifest; returns the manifest's SHA-256.

    Raises:
        CheckpointError: names the first file that is missing, of another size, or of other content; its `offset` is
            where the first damaged piece begins, or where the file ends too early or should have ended.
    """
    manifest = folder / MANIFEST
    try:
        data = read_file(manifest)
        files = json.loads(data)["files"]
        if manifest_bytes(files) != data:  # a flipped bit, or a name given twice
            raise ValueError
        expected = {
            str(name): (int(entry["bytes"]), str(entry["sha256"]), str(entry["crc32"])) for name, entry in files.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        raise CheckpointError(
            "the manifest is missing or damaged", file=manifest, fix="this folder was not published whole"
        ) from None
    if missing := [name for name in names if name not in expected]:
        raise CheckpointError(f"the manifest does not list {missing[0]}", file=manifest)
    for name, (size, digest, checksums) in expected.items():
        file = folder / name
        if Path(name).name != name or file.is_symlink() or not file.is_file():
            raise CheckpointError("a file listed in the manifest is missing", file=file)
        if (found := file.stat().st_size) != size:
            what = f"{found} bytes, but the manifest says {size}"
            raise CheckpointError(what, file=file, offset=min(found, size))
        if sha256_file(file) != digest:
            raise _damage(file, size, checksums)
    return sha256_bytes(data)


def _damage(path: Path, size: int, checksums: str) -> CheckpointError:
    """Find the first piece of a damaged file that is not what it was."""
    piece, start = piece_bytes(size), 0
    with path.open("rb") as file:
        while data := file.read(piece):
            if crc32(data) != checksums[start // piece * 8 :][:8]:
                what = f"damaged, first in bytes {start} to {start + len(data) - 1} of {size}"
                return CheckpointError(what + _tensors(path, start, len(data)), file=path, offset=start)
            start += len(data)
    return CheckpointError("damaged: another SHA-256 than the manifest's, though no piece is", file=path)


def _tensors(path: Path, start: int, length: int) -> str:
    """Name the tensors of a safetensors file that lie in a damaged piece, if its header lies before the piece."""
    if path.suffix != ".safetensors":
        return ""
    with path.open("rb") as file, contextlib.suppress(*_NO_HEADER):
        (size,) = struct.unpack("<Q", file.read(8))
        if 8 + size <= min(start, _HEADER_BYTES_MAX):
            header = json.loads(file.read(size))
            places = sorted((*entry["data_offsets"], name) for name, entry in header.items() if name != "__metadata__")
            first = start - 8 - size
            names = [name for begin, end, name in places if begin < first + length and end > first]
            return ", tensor" + (f" {names[0]}" if len(names) == 1 else f"s {names[0]} to {names[-1]}")
    return ""
