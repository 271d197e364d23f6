"""Every bad row that a stream passes over is listed with the batch it was passed over for."""

from __future__ import annotations

import hashlib
import json
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest

from openelm.data.document import list_bad_rows
from openelm.data.manifest import SourceConfig, build_manifest

from .test_bad_rows import JSONL

BAD = {name: row for name, row in JSONL.items() if len(row[0]) < 1000}
STEPS = 40


@pytest.fixture
def spoiled(tmp_path, texts):
    """A file in which every second row is bad; returns it and what must be listed in an epoch."""
    lines, expected = [], []
    for number, text in enumerate(texts):
        lines.append(json.dumps({"text": text}).encode())
        content, code = list(BAD.values())[number % len(BAD)]
        lines.append(content)
        digest = hashlib.sha256(content + b"\n").hexdigest()
        expected.append(("text", "data.jsonl", len(lines), code, digest))
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path, expected


def listed(batch) -> list[tuple]:
    return [tuple(row[name] for name in ("source", "file", "line", "code", "sha256")) for row in batch.bad_rows]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_each_is_listed_once_an_epoch(open_stream, spoiled, workers):
    path, expected = spoiled
    with open_stream(path, on_bad_row="skip", workers=workers, lanes=2, length=16) as stream:
        found: Counter = Counter()
        while min((cursor["sources"][0][0] for cursor in stream.cursors()[1:] if cursor), default=0) < 2:
            found.update(listed(next(stream)))
    assert found.keys() == set(expected)
    assert set(found.values()) <= {2, 3}  # two whole epochs, and lanes that were ahead


def test_workers_and_resumes_list_the_same_with_every_batch(open_stream, spoiled):
    path, _ = spoiled
    shape = {"on_bad_row": "skip", "lanes": 2, "length": 64}
    stream, alone, states = open_stream(path, **shape), [], []
    for _ in range(STEPS):
        states.append(stream.cursors())
        alone.append(list_bad_rows(next(stream).bad_rows))
    assert sum(listing["count"] for listing in alone) > 30
    with open_stream(path, workers=2, **shape) as together:
        assert [list_bad_rows(next(together).bad_rows) for _ in range(STEPS)] == alone
    for step in range(STEPS):
        assert list_bad_rows(next(open_stream(path, cursors=states[step], **shape)).bad_rows) == alone[step]


def test_documents_that_filters_drop_are_counted_and_not_listed(open_stream, write_jsonl, texts):
    with open_stream(write_jsonl([*texts, "", "  "]), on_bad_row="skip", min_tokens=20) as stream:
        assert not any(next(stream).bad_rows for _ in range(STEPS))
        assert stream.counts()["text"].keys() == {"empty", "too_few_tokens"}


def test_pieces_of_the_published_packing_list_them_too(open_stream, spoiled):
    path, expected = spoiled
    with open_stream(path, on_bad_row="skip", packing="apple", lanes=2) as stream:
        found = {row for _ in range(STEPS) for row in listed(next(stream))}
    assert found == set(expected)


def test_a_row_of_parquet_is_hashed_by_its_value_and_a_missing_one_is_not(open_stream, tmp_path, texts):
    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [*texts, None, "a\0b"]}), path)
    with open_stream(path, on_bad_row="skip", length=200) as stream:
        found = {row for _ in range(STEPS) for row in listed(next(stream))}
    place = ("text", "data.parquet")
    assert found == {
        (*place, len(texts) + 1, "E_SCHEMA", None),
        (*place, len(texts) + 2, "E_TEXT", hashlib.sha256(b"a\0b").hexdigest()),
    }


def test_a_document_of_plain_text_is_named_by_the_line_and_byte_of_its_fault(open_stream, tmp_path):
    good, bad = b"one two three\n\n", b"four\nfi\xffve\n\n"
    path = tmp_path / "data.txt"
    path.write_bytes(good * 3 + bad + good)
    sources = [{"name": "text", "paths": (str(path),), "document_bytes": 1}]
    with open_stream(sources, on_bad_row="skip", lanes=1) as stream:
        rows = next(stream).bad_rows
    assert rows[0] == {
        "source": "text",
        "file": "data.txt",
        "line": 8,
        "offset": len(good * 3) + 7,
        "code": "E_TEXT",
        "sha256": hashlib.sha256(bad).hexdigest(),
    }


def test_a_row_over_the_limit_is_listed_without_a_hash(open_stream, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + b'{"text": "' + b"a" * 5000 + b'"}\n')
    source = {"name": "text", "paths": (str(path),), "max_document_bytes": 1000}
    manifest = build_manifest([SourceConfig(**source)], on_bad_row="skip")
    with open_stream([source], manifest=manifest, on_bad_row="skip", lanes=1) as stream:
        row = next(stream).bad_rows[0]
    assert (row["line"], row["code"], row["sha256"]) == (2, "E_LINE_TOO_LONG", None)


def test_a_listing_is_bounded_and_says_how_many_there_were():
    rows = [
        {"source": "a", "file": "f", "line": line, "offset": None, "code": "E_JSON", "sha256": None}
        for line in range(2500, 0, -1)
    ]
    listing = list_bad_rows(rows)
    assert listing["count"] == 2500
    assert [row["line"] for row in listing["rows"]] == list(range(1, 1001))


@pytest.mark.parametrize("seed", range(4))
def test_files_of_one_name_in_two_folders_are_listed_in_one_order(open_stream, tmp_path, texts, seed):
    for folder, bad in (("a", "[1]"), ("b", "[2]")):
        (tmp_path / folder).mkdir()
        lines = [bad, *(json.dumps({"text": text}) for text in texts[:8])]
        (tmp_path / folder / "x.jsonl").write_text("\n".join(lines) + "\n")
    source = {"name": "text", "paths": (str(tmp_path / "a"), str(tmp_path / "b"))}
    listings = []
    for workers in (0, 1, 2):
        with open_stream([source], on_bad_row="skip", workers=workers, rows=8, seed=seed, length=600) as stream:
            listings.append([list_bad_rows(next(stream).bad_rows) for _ in range(3)])
    assert listings[0] == listings[1] == listings[2]
    assert max(listing["count"] for listing in listings[0]) >= 2
