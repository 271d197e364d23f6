"""Whole rows come out of every format alike, each with its line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from openelm.data.manifest import Manifest, SourceConfig, build_manifest
from openelm.data.reading import read_documents
from openelm.data.rows import read_rows, whole_rows
from openelm.errors import DataError

ROWS = [{"id": at, "messages": [{"role": "user", "content": f"é {at}\n" * (at % 7)}]} for at in range(300)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def manifest(path: Path, **settings: object) -> Manifest:
    return build_manifest(whole_rows([SourceConfig.parse({"name": "rows", "paths": [str(path)], **settings})]))


def write_parquet(path: Path, rows: list[dict[str, object]], group: int = 70) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=group)


def written(folder: Path, name: str) -> Path:
    path = folder / name
    if name.endswith(".parquet"):
        write_parquet(path, ROWS)
    elif name.startswith("frames"):
        half = LINES.index(b"\n", len(LINES) // 2) + 1
        parts = [LINES[:half], LINES[half:]]
        path.write_bytes(b"".join(gzip.compress(part) for part in parts))
    else:
        data = json.dumps(ROWS, indent=2).encode() if name.startswith("array") else LINES
        packed = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}.get(path.suffix, bytes)(data)
        path.write_bytes(packed)
    return path


PLACES = ["rows.jsonl", "rows.jsonl.gz", "frames.jsonl.gz", "rows.jsonl.zst", "rows.json", "rows.parquet"]
ARRAYS = ["array.json", "array.json.gz", "array.json.zst"]


@pytest.mark.parametrize("name", PLACES + ARRAYS)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    found = list(read_rows(manifest(written(tmp_path, name))))
    assert [place.row.value for place in found] == ROWS


@pytest.mark.parametrize("name", PLACES)
def test_lines_and_rows_of_a_table_count_from_1(tmp_path: Path, name: str) -> None:
    lines = [place.row.line for place in read_rows(manifest(written(tmp_path, name)))]
    assert lines == list(range(1, 1 + len(ROWS)))


@pytest.mark.parametrize("name", ARRAYS)
def test_a_row_of_an_array_has_the_line_where_it_begins(tmp_path: Path, name: str) -> None:
    lines = json.dumps(ROWS, indent=2).splitlines()
    begins = [number for number, line in enumerate(lines, 1) if line == "  {"]
    assert [place.row.line for place in read_rows(manifest(written(tmp_path, name)))] == begins


@pytest.mark.parametrize("text", ["[]", " [ ] ", '[{"a": 1}]', '\n[ {"a" : [1, "]"]} ,\n{"b": "[,"}\n]\n', "[[1], 2]"])
def test_an_array_has_the_elements_that_the_json_module_finds(tmp_path: Path, text: str) -> None:
    path = tmp_path / "array.json"
    path.write_text(text)
    rows = [place.row.value for place in read_rows(Manifest(manifest_or_nothing(path)))]
    expected = json.loads(text)
    assert [row for row in rows if isinstance(row, dict)] == [one for one in expected if isinstance(one, dict)]
    assert len(rows) == len(expected)


def manifest_or_nothing(path: Path) -> tuple:
    try:
        return manifest(path).sources
    except DataError as error:
        assert error.code == "E_EMPTY"
        return ()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('[\n{"a": 1},\n{"a": 2\n', 3),
        ('[\n{"a": 1}\n{"a": 2}]', 3),
        ('[{"a": 1},\n]', 2),
        ('[{"a": 1}]\n\n[]', 3),
        ("[" * 100_000, 1),
        ('[{"a": "\t"}]', 1),
    ],
)
def test_a_damaged_array_is_refused_at_its_line(tmp_path: Path, text: str, line: int) -> None:
    path = tmp_path / "array.json"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        manifest(path)
    assert (caught.value.code, caught.value.file, caught.value.line) == ("E_JSON", path, line)


def test_a_bad_row_of_an_array_leaves_the_others(tmp_path: Path) -> None:
    path = tmp_path / "array.json"
    path.write_text('[{"a": 1},\n{"a": 1, "a": 2},\n"b",\n{"a": NaN},\n{"a": 3}]')
    values = [(place.row.line, place.row.value) for place in read_rows(manifest(path))]
    assert [line for line, _ in values] == [1, 2, 3, 4, 5]
    codes = [value.code if isinstance(value, DataError) else value for _, value in values]
    assert codes == [{"a": 1}, "E_JSON", "E_SCHEMA", "E_JSON", {"a": 3}]


def test_texts_can_be_read_from_an_array(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text('[\n  {"text": "a"},\n  {"text": "b"}\n]\n')
    documents = list(read_documents([SourceConfig(name="text", paths=(str(path),))]))
    assert [(document.text, document.row) for document in documents] == [("a", 0), ("b", 1)]


def test_a_string_of_a_table_that_is_not_utf8_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    values = pyarrow.array([b"a", b"\xff", b"c"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"completion": values}), path)
    values = [place.row.value for place in read_rows(manifest(path))]
    assert [value if isinstance(value, dict) else (value.code, value.line) for value in values] == [
        {"completion": "a"},
        ("E_TEXT", 2),
        {"completion": "c"},
    ]


def test_a_text_file_has_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    path.write_text("text")
    with pytest.raises(DataError, match="has no rows") as caught:
        list(read_rows(manifest(path)))
    assert caught.value.code == "E_FORMAT"


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "rows.jsonl")
    found = manifest(path)
    path.write_bytes(LINES + b"{}\n")
    with pytest.raises(DataError) as caught:
        list(read_rows(found))
    assert caught.value.code == "E_CHANGED"
