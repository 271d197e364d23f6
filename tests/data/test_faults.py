"""Faults of disks, files and their makers: each is named, none is read as if it were good, memory stays bounded."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from openelm.data import retry
from openelm.data.manifest import SourceConfig, build_manifest
from openelm.data.readers import jsonl, lines
from openelm.data.reading import read_documents
from openelm.errors import DataError

pytestmark = [pytest.mark.faults, pytest.mark.quick]


def config(path, **settings) -> SourceConfig:
    return SourceConfig(name="text", paths=(str(path),), **settings)


def as_lines(texts) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_a_cut_at_any_64th_is_refused_by_the_manifest_also_between_frames(tmp_path, texts, name):
    compress = gzip.compress if name.endswith("gz") else zstandard.compress
    parts = [compress(as_lines(texts[at : at + 8])) for at in range(0, len(texts), 8)]
    path, whole = tmp_path / name, b"".join(parts)
    path.write_bytes(whole)
    manifest = build_manifest([config(path)])
    ends = {len(b"".join(parts[:count])) for count in range(len(parts))}
    for cut in sorted({len(whole) * part // 64 for part in range(64)} | ends):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError) as caught:
            list(read_documents(manifest))
        assert caught.value.code == "E_CHANGED", cut


MEMORY = """
import json, sys
from pathlib import Path
from typing import ClassVar
from openelm.data.document import ReadOptions
from openelm.data.readers import jsonl
from openelm.errors import DataError
try:
    jsonl.scan(Path(sys.argv[1]), ReadOptions("text"), strict=sys.argv[2] == "strict")
except DataError as error:
    read_bytes = int(open("/proc/self/io").readline().split()[1])
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))  # getrusage counts the parent's peak too
    peak_bytes = int(status["VmHWM"].split()[0]) << 10
    print(json.dumps([error.code, error.line, error.offset, peak_bytes, read_bytes]))
"""


def scan_apart(path: Path, strict: bool) -> list:
    """Scan in a process of its own; returns code, line, offset, peak memory and bytes read."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path[:] = {sys.path!r}\n{MEMORY}",
            str(path),
            "strict" if strict else "",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


needs_account = pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="reads the kernel's account of a process")


@needs_account
def test_a_line_of_two_gigabytes_is_refused_without_reading_it(tmp_path):
    path = tmp_path / "huge.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "one"}\n')
        file.truncate(2 << 30)
    code, line, offset, peak_bytes, read_bytes = scan_apart(path, strict=True)
    assert (code, line, offset) == ("E_LINE_TOO_LONG", 2, 16)
    assert peak_bytes < 200 << 20 and read_bytes < 64 << 20


BOMBS = {
    "one endless line": b"\0" * (32 << 20),
    "many rows": (b'{"text": "' + b"a" * 1000 + b'"}\n') * 8192,
}


@needs_account
@pytest.mark.parametrize("kind", BOMBS)
@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_a_decompression_bomb_is_refused_in_bounded_memory(tmp_path, name, kind):
    compress = gzip.compress if name.endswith("gz") else zstandard.compress
    frame = compress(BOMBS[kind])
    path = tmp_path / name
    path.write_bytes(frame * (1 + (200 << 10) // len(frame)))
    code, _, _, peak_bytes, _ = scan_apart(path, strict=False)
    assert code == "E_BOMB" and peak_bytes < 300 << 20


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_text_that_packs_well_is_no_bomb(tmp_path, name):
    compress = gzip.compress if name.endswith("gz") else zstandard.compress
    (tmp_path / name).write_bytes(compress(as_lines(["the same again"] * 20_000)))
    assert build_manifest([config(tmp_path / name)]).sources[0].rows == 20_000


def test_a_file_that_unpacks_to_very_many_rows_keeps_a_bounded_list_of_blocks(tmp_path, monkeypatch):
    """Its size asks for tiny blocks, of which there would be millions."""
    path, texts = tmp_path / "a.jsonl.zst", [str(at) for at in range(5000)]
    path.write_bytes(zstandard.compress(as_lines(texts)))
    before = build_manifest([config(path)]).sources[0].shards[0]
    monkeypatch.setattr(jsonl, "_MOST_STARTS", 50)
    manifest = build_manifest([config(path)])
    assert [document.text for document in read_documents(manifest)] == texts
    assert 1 < len(manifest.sources[0].shards[0].blocks) <= len(before.blocks)


@pytest.fixture
def parquet(tmp_path, texts) -> Path:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(
        pyarrow.table({"text": texts}), path, compression="none", use_dictionary=False, write_page_checksum=True
    )
    return path


def test_a_flipped_bit_in_parquet_text_fails_its_page_checksum(parquet, texts):
    whole = parquet.read_bytes()
    places = [whole.index(text.encode()) + 1 for text in texts[1:-1:6]]  # first and last are in the statistics too
    for place in places:
        parquet.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(DataError) as caught:
            list(read_documents([config(parquet)]))
        assert caught.value.code == "E_CORRUPT" and caught.value.file == parquet


def test_every_flipped_bit_of_a_parquet_file_is_found_by_the_manifest(parquet):
    whole, status = parquet.read_bytes(), parquet.stat()
    manifest = build_manifest([config(parquet)])
    for place in range(0, len(whole), 97):
        parquet.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        os.utime(parquet, ns=(status.st_atime_ns, status.st_mtime_ns))
        with pytest.raises(DataError, match=manifest.sources[0].shards[0].sha256):
            manifest.check_unchanged(whole=True)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file whose reading is an I/O error")
def test_a_disk_that_reports_an_error_is_named_after_three_tries(tmp_path, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(retry.time, "sleep", waits.append)
    (tmp_path / "a.jsonl").symlink_to("/proc/self/mem")  # its first page is not mapped: the kernel answers EIO
    with pytest.raises(DataError, match="Input/output error") as caught:
        build_manifest([config(tmp_path / "a.jsonl")])
    assert caught.value.code == "E_READ" and caught.value.file == tmp_path / "a.jsonl"
    assert len(waits) == 2


class Failing(io.FileIO):
    """A file that reports I/O errors, each after some more reads."""

    faults: ClassVar[list[int]] = []  # reads before each fault
    kind: ClassVar[OSError] = OSError(5, "Input/output error")

    def read(self, size: int = -1) -> bytes:
        if self.faults:
            self.faults[0] -= 1
            if self.faults[0] < 0:
                self.faults.pop(0)
                raise self.kind
        return super().read(size)


@pytest.fixture
def failing(monkeypatch) -> type[Failing]:
    """Make every data file fail as `faults` says; returns the class that holds it."""
    monkeypatch.setattr(retry.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(Path, "open", lambda path, mode: Failing(str(path), mode))
    monkeypatch.setattr(lines, "_READ_BYTES", 512)
    monkeypatch.setattr(lines, "_GZIP_FEED_BYTES", 512)
    return Failing


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_reading_goes_on_with_the_same_row_after_two_io_errors(tmp_path, texts, failing, name):
    data = as_lines(texts)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    source = config(tmp_path / name)
    manifest = build_manifest([source], block_bytes=1 << 30)
    for first in range(8):
        failing.faults = [first, first]
        assert [document.text for document in read_documents(manifest)] == texts
        assert failing.faults == []


def test_three_io_errors_end_the_reading(tmp_path, texts, failing):
    (tmp_path / "a.jsonl").write_bytes(as_lines(texts))
    manifest = build_manifest([config(tmp_path / "a.jsonl")])
    failing.faults = [3, 0, 0]
    with pytest.raises(DataError) as caught:
        list(read_documents(manifest))
    assert caught.value.code == "E_READ"


def test_a_refusal_is_not_tried_again(tmp_path, texts, failing, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(as_lines(texts))
    manifest = build_manifest([config(tmp_path / "a.jsonl")])
    monkeypatch.setattr(failing, "kind", PermissionError(13, "Permission denied"))
    failing.faults = [1, 1000]
    with pytest.raises(DataError, match="Permission denied") as caught:
        list(read_documents(manifest))
    assert caught.value.code == "E_READ" and len(failing.faults) == 1
