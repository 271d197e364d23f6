from __future__ import annotations

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from openelm.data.document import ReadOptions
from openelm.data.manifest import SourceConfig, build_manifest
from openelm.data.readers import jsonl, txt
from openelm.data.reading import read_block, read_documents
from openelm.errors import DataError


def config(path, **settings) -> SourceConfig:
    return SourceConfig(name="text", paths=(str(path),), **settings)


def as_lines(texts):
    return "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts).encode()


def frames(data, compress, cut=997):
    """Compress in several frames whose borders fall inside lines."""
    return b"".join(compress(data[start : start + cut]) for start in range(0, len(data), cut))


@pytest.fixture
def formats(tmp_path, texts):
    """The same documents in every format: name -> source."""
    data = as_lines(texts)
    for name, content in {
        "plain.jsonl": data,
        "crlf.jsonl": data.replace(b"\n", b"\r\n").rstrip(),
        "one.jsonl.gz": gzip.compress(data),
        "many.json.gz": frames(data, gzip.compress),
        "one.jsonl.zst": zstandard.compress(data),
        "many.jsonl.zst": frames(data, zstandard.compress) + b"\x50\x2a\x4d\x18\x03\0\0\0abc",  # a skippable frame
    }.items():
        (tmp_path / name).write_bytes(content)
    table = pyarrow.table({"id": [1] * len(texts), "text": texts})
    pyarrow.parquet.write_table(table, tmp_path / "groups.parquet", row_group_size=20)
    encoded = pyarrow.table({"text": pyarrow.array(texts).dictionary_encode()})
    pyarrow.parquet.write_table(encoded, tmp_path / "dictionary.parquet")
    (tmp_path / "txt").mkdir()
    for at, text in enumerate(texts):
        (tmp_path / "txt" / f"{at:03d}.txt").write_bytes(text.encode())
    return {path.name: config(path) for path in tmp_path.iterdir()}


def test_every_format_gives_the_same_documents(formats, texts):
    for name, source in formats.items():
        assert [document.text for document in read_documents([source])] == texts, name


def test_a_block_can_be_read_from_any_row(formats, texts):
    for name, config_ in formats.items():
        (source,) = build_manifest([config_], block_bytes=600).sources
        for shard in source.shards:
            first_row = texts.index(next(read_block(source, shard, shard.blocks[0])).text)
            assert sum(block.rows for block in shard.blocks) == shard.rows
            assert name == "txt" or len(shard.blocks) >= 10
            for block in shard.blocks:
                start = first_row + block.first_row
                for first in {0, 1, block.rows // 2, block.rows}:
                    rows = list(read_block(source, shard, block, first))
                    assert [row.text for row in rows] == texts[start + first : start + block.rows], name
                    assert [row.row for row in rows] == list(
                        range(block.first_row + first, block.first_row + block.rows)
                    )


@pytest.mark.faults
@pytest.mark.quick
@pytest.mark.parametrize("name", ["data.jsonl.gz", "data.jsonl.zst"])
@pytest.mark.parametrize("frame", [10**9, 800])
def test_a_cut_compressed_file_is_noticed_at_64_points(tmp_path, texts, name, frame):
    compress = gzip.compress if name.endswith("gz") else zstandard.compress
    data, path = as_lines(texts), tmp_path / name
    whole = frames(data, compress, frame)
    ends = {len(frames(data[:stop], compress, frame)) for stop in range(frame, len(data), frame)}
    cuts = {len(whole) * part // 64 for part in range(64)} - ends  # a cut between frames leaves a whole file
    for cut in cuts:
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match="rows") as caught:
            build_manifest([config(path)])
        assert (caught.value.code, caught.value.offset, caught.value.file) == ("E_TRUNC", cut, path)
    assert len(cuts) == 64 or frame == 800


@pytest.mark.parametrize(
    "name, garbage",
    [("a.jsonl.gz", b"garbage!" * 4), ("a.jsonl.zst", b"garbage!" * 4), ("a.jsonl.gz", b"\0" * 64)],
)
def test_trailing_garbage_and_damage_are_errors(tmp_path, texts, name, garbage):
    compress = gzip.compress if name.endswith("gz") else zstandard.ZstdCompressor(write_checksum=True).compress
    whole = compress(as_lines(texts))
    for content in (whole + garbage, whole[:40] + b"\xff\0\xff" + whole[43:]):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError) as caught:
            list(read_documents([config(tmp_path / name)]))
        assert caught.value.code == "E_CORRUPT" and caught.value.offset is not None


def test_a_decompression_bomb_stops_at_the_limit(tmp_path):
    for name, content in {
        "a.jsonl.gz": gzip.compress(b" " * (40 << 20), 1),
        "a.jsonl.zst": zstandard.compress(b" " * (40 << 20)),
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError) as caught:
            build_manifest([config(tmp_path / name)])
        assert (caught.value.code, caught.value.line) == ("E_LINE_TOO_LONG", 1)


def test_a_huge_line_is_refused_without_reading_it(tmp_path):
    path = tmp_path / "huge.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "one"}\n')
        file.truncate(200 << 20)
    with pytest.raises(DataError) as caught:
        jsonl.scan(path, ReadOptions("text"))
    assert (caught.value.code, caught.value.line, caught.value.offset) == ("E_LINE_TOO_LONG", 2, 16)


TXT = st.lists(st.sampled_from(["a", "word", "é", "\n", "\n\n", " \n", "\r\n\r\n", "\t", "\n \n\n"]), max_size=60)


@settings(max_examples=150, deadline=None)
@given(TXT, st.integers(1, 40), st.booleans(), st.integers(1, 64))
def test_documents_of_a_txt_file_joined_are_the_file(tmp_path_factory, parts, document_bytes, bom, block_bytes):
    text = "".join(parts)
    path = tmp_path_factory.mktemp("txt") / "a.txt"
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + text.encode())
    options = ReadOptions("text", document_bytes=document_bytes)
    blocks = txt.scan(path, options, block_bytes=block_bytes)
    documents = [row for block in blocks for row in txt.read(path, block, options)]
    assert "".join(document.text for document in documents) == text
    assert [document.row for document in documents] == list(range(len(documents)))
    for document in documents[:-1]:
        assert len(document.text.encode()) > document_bytes and not document.text.splitlines()[-1].strip()


def test_a_txt_file_is_cut_at_the_first_blank_line_after_document_bytes(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n\n\nthree\nfour\n \nfive\n")
    documents = [document.text for document in read_documents([config(tmp_path / "a.txt", document_bytes=5)])]
    assert documents == ["one\n\ntwo\n\n\n", "three\nfour\n \n", "five\n"]


@pytest.mark.parametrize("name, offset", [("a.jsonl", 1600), ("a.jsonl.gz", None), ("a.jsonl.zst", None)])
def test_a_bad_line_is_named_in_a_late_block_too(tmp_path, name, offset):
    compress = {"gz": gzip.compress, "zst": zstandard.compress}.get(name.split(".")[-1], bytes)
    (tmp_path / name).write_bytes(frames(b'{"text": "one"}\n' * 100 + b"bad\xff\n", compress, 300))
    with pytest.raises(DataError, match="at byte 3") as caught:
        list(read_documents([config(tmp_path / name)]))
    assert caught.value.line == 101 and caught.value.offset == (offset and offset + 3)


def test_empty_documents_are_dropped_and_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n\n{"text": " \\n"}\n{"text": "x"}\n\n')
    drops = {}
    assert [row.text for row in read_documents([config(tmp_path / "a.jsonl")], drops=drops)] == ["x"]
    assert drops == {"text": {"empty": 4}}
