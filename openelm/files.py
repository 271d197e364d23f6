"""The only place that renames files: atomic publishing, SHA-256 manifests, locks. A reader sees old or new."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO

from openelm.errors import CheckpointError, DiskError

MANIFEST = "manifest.json"
_READ_BYTES = 1 << 20
_LEAST_PIECE_BYTES, _MOST_PIECES = 1 << 12, 1 << 10
_HEADER_BYTES_MAX = 16 << 20
_NO_HEADER = (ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error)


def sha256_bytes(data: bytes) -> str:
    """Hash bytes; returns 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hash a file's content; returns 64 hex digits."""
    with path.open("rb") as file:
        return sha256_stream(file)


def read_file(path: Path) -> bytes:
    """Read a file whole.

    Raises:
        OSError: it cannot be read, or is a pipe or device, which could go on for ever.
    """
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, "not a file", path)
    return path.read_bytes()


def sha256_stream(file: BinaryIO) -> str:
    """Hash what is left of an open file; returns 64 hex digits."""
    digest = hashlib.sha256()
    while data := file.read(_READ_BYTES):
        digest.update(data)
    return digest.hexdigest()


def canonical_json(value: Any) -> bytes:
    """Encode plain data the same way everywhere: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full, read-only or forbidden disk into a DiskError that names the path and what is free.

    Raises:
        DiskError: the write inside the block failed for a reason the user can mend.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_FIXES:
            raise
        raise DiskError(
            f"cannot write: {os.strerror(error.errno)}{_free_space(path)}",
            file=path,
            fix=_DISK_FIXES[error.errno],
        ) from None


_DISK_FIXES = {
    errno.ENOSPC: "free some space and run the same command again; what was already saved is intact",
    errno.EDQUOT: "your quota is used up: free some space and run the same command again",
    errno.EFBIG: "a file size limit was reached (ulimit -f); what was already saved is intact",
    errno.EIO: "the disk reports an error; what was already saved is intact",
    errno.EROFS: "the file system is read-only: choose another folder with --out",
    errno.EACCES: "you may not write there: choose another folder with --out or change its permissions",
    errno.EPERM: "you may not write there: choose another folder with --out or change its permissions",
    errno.ENOTDIR: "a part of this path is a file: choose another folder with --out",
    errno.ENOENT: "a part of this path is missing: choose another folder with --out",
    errno.ENAMETOOLONG: "the name is too long: choose another folder with --out",
    errno.EEXIST: "a file of this name is in the way: choose another folder with --out",
}


def _free_space(path: Path) -> str:
    existing = next((parent for parent in (path, *path.parents) if os.path.exists(parent)), None)
    if existing is None:
        return ""
    return f" ({shutil.disk_usage(existing).free:,} bytes free)"


def make_folder(path: Path) -> None:
    """Create a folder and its parents.

    Raises:
        DiskError: it cannot be created.
    """
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)


def write_atomic(path: Path, data: bytes) -> None:
    """Replace a file's content; after a crash the file holds all of the old or all of the new bytes.

    Raises:
        DiskError: the disk is full, read-only or forbidden; the old file is intact.
    """
    with replacing(path) as file:
        file.write(data)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a file to write to that becomes `path` atomically when the block ends well.

    Raises:
        DiskError: the disk is full, read-only or forbidden; the old file is intact.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with disk_errors(path):
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


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
    make_folder(target.parent)
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    with disk_errors(target):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            write_manifest(temporary, known)
            for file in temporary.iterdir():
                sync_file(file)
            _sync_folder(temporary)
            _swap(temporary, target)
            _sync_folder(target.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _swap(temporary: Path, target: Path) -> None:
    if not target.exists():
        os.rename(temporary, target)
        return
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    os.rename(target, old)
    try:
        os.rename(temporary, target)
    except OSError:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder so that no half of it is ever seen under its name."""
    hidden = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    with disk_errors(folder):
        os.rename(folder, hidden)
        shutil.rmtree(hidden)


def set_aside(folder: Path) -> Path:
    """Rename a damaged folder so that it is kept for a look but never read as a good one; returns its new path."""
    aside = folder.with_name(f"damaged-{folder.name}")
    with disk_errors(folder):
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(folder, aside)
        _sync_folder(folder.parent)
    return aside


def remove_leftovers(folder: Path) -> None:
    """Remove temporary folders and files that a killed process left behind; call only while holding the lock."""
    for path in folder.glob(".*.tmp-*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in folder.glob(".*.old-*"):  # killed between the two renames: the old folder is the good one
        target = folder / path.name[1:].rpartition(".old-")[0]
        os.rename(path, target) if not target.exists() else shutil.rmtree(path)


def write_manifest(folder: Path, known: Mapping[str, FileFacts] | None = None) -> str:
    """Write `manifest.json` for a flat folder; returns its own hash. For `known` see `publish_folder`.

    It holds the size, SHA-256 and pieces' checksums of every file, and a checksum of all that, so that damage to the
    manifest is not taken for damage to a file.
    """
    names = sorted(file.name for file in folder.iterdir() if file.name != MANIFEST and file.is_file())
    files = {name: ((known or {}).get(name) or _facts(folder / name)).to_json() for name in names}
    data = manifest_bytes(files)
    write_atomic(folder / MANIFEST, data)
    return sha256_bytes(data)


def manifest_bytes(files: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Lay out a manifest: what is known of each file, and the checksum of that."""
    return canonical_json({"crc32": _crc32(canonical_json(files)), "files": files})


def piece_bytes(size: int) -> int:
    """Say how long the pieces of a file are: a power of two, 4 KiB or more, so that there are at most 1,024."""
    return max(_LEAST_PIECE_BYTES, 1 << (-(-size // _MOST_PIECES) - 1).bit_length())


class FileFacts:
    """What a manifest says of a file: SHA-256 decides whether it is damaged, the pieces' checksums only say where.

    Args:
        size: of the whole file, which decides how long the pieces are.
    """

    def __init__(self, size: int) -> None:
        self.size, self._seen = size, 0
        self._digest, self._pieces, self._piece = hashlib.sha256(), list[str](), 0

    def update(self, data: bytes | memoryview) -> None:
        """Take the next bytes of the file, as many as you like."""
        self.digest(data)
        self.check(data)

    def digest(self, data: bytes | memoryview) -> None:
        """Do the first half of `update`, which another thread may do while one does the second."""
        self._digest.update(data)

    def check(self, data: bytes | memoryview) -> None:
        """Do the second half of `update`."""
        data, length = memoryview(data), piece_bytes(self.size)
        while data:
            part = data[: length - self._seen % length]
            self._piece = zlib.crc32(part, self._piece)
            self._seen += len(part)
            if self._seen % length == 0 or self._seen == self.size:
                self._pieces.append(f"{self._piece:08x}")
                self._piece = 0
            data = data[len(part) :]

    def to_json(self) -> dict[str, Any]:
        """Return the manifest's entry."""
        assert self._seen == self.size
        return {"bytes": self.size, "sha256": self._digest.hexdigest(), "crc32": "".join(self._pieces)}


def _facts(path: Path) -> FileFacts:
    facts = FileFacts(path.stat().st_size)
    with path.open("rb") as file:
        while data := file.read(_READ_BYTES):
            facts.update(data)
    return facts


def _crc32(data: bytes) -> str:
    return f"{zlib.crc32(data):08x}"


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
            if _crc32(data) != checksums[start // piece * 8 :][:8]:
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


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; the lock goes with the process, however it ends.

    Raises:
        CheckpointError: another process holds it.
    """
    path = folder / ".lock"
    with disk_errors(path):
        file = path.open("a+")
    with file:
        if not lock_file(file):
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise CheckpointError(
                f"{owner} is using this folder",
                file=folder,
                fix="wait for it, stop it, or choose another --out",
            )
        with disk_errors(path):
            file.truncate(0)
            file.write(f"process {os.getpid()}")
            file.flush()
        yield


def lock_file(file: IO[Any]) -> bool:
    """Lock an open file for this process until it is closed; False when another process holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def sync_file(path: Path) -> None:
    """Wait until a file's content is on disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
