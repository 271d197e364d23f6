"""Lines of a plain, gzip or Zstandard file, bounded in memory, with every truncation noticed."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, BinaryIO, NamedTuple

import zstandard

from openelm.data.remote import DataPath
from openelm.errors import DataError

_REPAIR = "fetch or write the file again"
_UNPACK = "leave the file out; if it is honest text, decompress it and list the plain file"
_RATIO, _FREE_BYTES = 200, 64 << 20
_READ_BYTES = 1 << 18
# One read of this size can grow to at most 16 MiB (deflate, 1032:1) or 32 MiB (Zstandard run-length blocks).
_GZIP_FEED_BYTES, _ZSTD_FEED_BYTES = 1 << 14, 1 << 10


class Line(NamedTuple):
    """One line with its line end; `data` is None as soon as it is longer than the limit.

    `offset` counts decompressed bytes from where reading started. `frame` is the compressed offset of the
    frame in which the line starts (0 in a plain file) and `skip` the line ends before it in that frame.
    """

    frame: int
    skip: int
    offset: int
    data: bytes | None


def is_compressed(path: DataPath) -> bool:
    """Tell by the suffix whether a file is gzip or Zstandard."""
    return path.suffix.lower() in (".gz", ".zst")


def most_text_bytes(path: DataPath) -> int | None:
    """Bound the text that a compressed file may hold by its size; None for a plain one.

    Text packs 3 to 20 times, and rarely 100 times; a bomb more than 1000 times.
    """
    return max(_FREE_BYTES, _RATIO * path.stat().st_size) if is_compressed(path) else None


def read_lines(path: DataPath, offset: int, limit_bytes: int, *, most_bytes: int | None = None) -> Iterator[Line]:
    """Yield the lines of a file from a byte (plain) or a frame (compressed) on.

    A line over `limit_bytes` is yielded as None when the limit is passed, before the rest of it is read.

    Args:
        most_bytes: refuse a file that holds more text than this, as `most_text_bytes` says.

    Raises:
        DataError: E_TRUNC with the compressed offset and the good rows so far; E_CORRUPT for damaged frames;
            E_BOMB for more text than `most_bytes`.
    """
    frame, newlines, position, count = -1, 0, 0, 0
    mark = (0, 0, 0)
    parts: list[bytes] = []
    size = 0
    try:
        for chunk_frame, data in _chunks(path, offset):
            if most_bytes is not None and position + len(data) > most_bytes:
                what = f"over {most_bytes:,} bytes of text, {_RATIO} times the compressed size: a decompression bomb?"
                raise DataError(what, fix=_UNPACK, code="E_BOMB")
            if chunk_frame != frame:
                frame, newlines = chunk_frame, 0
            start = 0
            while start < len(data):
                if not size:
                    mark = (frame, newlines, position + start)
                stop = data.find(b"\n", start) + 1
                piece = data[start : stop or None]
                before, size = size, size + len(piece)
                if size <= limit_bytes:
                    parts.append(piece)
                elif before <= limit_bytes:
                    parts.clear()
                    yield Line(*mark, None)
                if not stop:
                    break
                if size <= limit_bytes:
                    yield Line(*mark, piece if len(parts) == 1 else b"".join(parts))
                newlines, start, size, count = newlines + 1, stop, 0, count + 1
                parts.clear()
            position += len(data)
    except DataError as error:
        what = f"{error.what} after {count} whole rows"
        raise DataError(what, fix=error.fix, file=path, offset=error.offset, code=error.code) from None
    if 0 < size <= limit_bytes:
        yield Line(*mark, b"".join(parts))


def _chunks(path: DataPath, offset: int) -> Iterator[tuple[int, bytes]]:
    """Yield (compressed offset of the frame, decompressed bytes); a chunk never crosses a frame."""
    with path.open("rb") as file:
        file.seek(offset)
        if path.suffix.lower() == ".gz":
            yield from _frames(file, offset, partial(zlib.decompressobj, 31), _GZIP_FEED_BYTES)
        elif path.suffix.lower() == ".zst":
            decoder = zstandard.ZstdDecompressor(max_window_size=1 << 27)
            yield from _frames(file, offset, decoder.decompressobj, _ZSTD_FEED_BYTES)
        else:
            while data := file.read(_READ_BYTES):
                yield 0, data


def _frames(
    file: BinaryIO, offset: int, new_decoder: Callable[[], Any], feed_bytes: int
) -> Iterator[tuple[int, bytes]]:
    # Both libraries end silently when the input ends inside a frame, so each frame's end is checked here.
    decoder, frame, position, inside = new_decoder(), offset, offset, True
    while data := file.read(feed_bytes):
        position += len(data)
        inside = True
        while data:
            try:
                text = decoder.decompress(data)
            except (zlib.error, zstandard.ZstdError):
                what = "damaged compressed data" if frame == offset else "damaged frame or trailing garbage"
                at = f"{what} in the frame that starts at byte {frame}"
                raise DataError(at, fix=_REPAIR, offset=frame, code="E_CORRUPT") from None
            if text:
                yield frame, text
            if not decoder.eof:
                break
            data = decoder.unused_data
            decoder, frame, inside = new_decoder(), position - len(data), bool(data)
    if inside:
        what = f"the compressed data ends inside a frame at byte {position}"
        raise DataError(what, fix=_REPAIR, offset=position, code="E_TRUNC")
