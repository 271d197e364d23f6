from __future__ import annotations

import functools
import gzip
import io

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import strategies as st

from openelm.data.manifest import SourceConfig, build_manifest
from openelm.data.reading import read_documents
from openelm.errors import DataError, OpenELMError

GOOD = b'{"text": "good"}\n'
JSONL = {
    "bad UTF-8": (b'{"text": "\xff"}', "E_TEXT"),
    "cut UTF-8": (b'{"text": "\xe4\xbd"}', "E_TEXT"),
    "encoded surrogate": (b'{"text": "\xed\xa0\x80"}', "E_TEXT"),
    "NUL byte": (b'{"text": "a\0b"}', "E_TEXT"),
    "escaped NUL": (b'{"text": "a\\u0000b"}', "E_TEXT"),
    "lone surrogate": (b'{"text": "\\ud800"}', "E_TEXT"),
    "surrogates in the wrong order": (b'{"text": "\\udc00\\ud800"}', "E_TEXT"),
    "byte order mark": (b'\xef\xbb\xbf{"text": "a"}', "E_JSON"),
    "no JSON": (b"text", "E_JSON"),
    "cut": (b'{"text": "a', "E_JSON"),
    "two values": (b'{"text": "a"} {"text": "b"}', "E_JSON"),
    "control character": (b'{"text": "a\tb"}', "E_JSON"),
    "NaN": (b'{"text": "a", "score": NaN}', "E_JSON"),
    "Infinity": (b'{"text": "a", "score": -Infinity}', "E_JSON"),
    "duplicate key": (b'{"text": "a", "text": "b"}', "E_JSON"),
    "deep array": (b'{"text": "a", "b": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "E_JSON"),
    "deep object": (b'{"text": ' + b'{"a":' * 40_000, "E_JSON"),
    "5,000-digit number": (b'{"text": "a", "n": ' + b"1" * 5000 + b"}", "E_JSON"),
    "array": (b'["text"]', "E_SCHEMA"),
    "string": (b'"text"', "E_SCHEMA"),
    "null": (b"null", "E_SCHEMA"),
    "missing key": (b'{"content": "a"}', "E_SCHEMA"),
    "no keys": (b"{}", "E_SCHEMA"),
    "number as text": (b'{"text": 3}', "E_SCHEMA"),
    "null as text": (b'{"text": null}', "E_SCHEMA"),
    "list as text": (b'{"text": ["a"]}', "E_SCHEMA"),
    "too long": (b'{"text": "' + b"a" * 300_000 + b'"}', "E_LINE_TOO_LONG"),
}


def source(path, **settings) -> SourceConfig:
    return SourceConfig(name="text", paths=(str(path),), max_document_bytes=250_000, **settings)


@pytest.mark.parametrize("name", JSONL)
def test_a_bad_line_is_named_or_skipped_and_counted(tmp_path, name):
    content, code = JSONL[name]
    path = tmp_path / "data.jsonl"
    path.write_bytes(GOOD * 3 + content + b"\n" + GOOD * 2)
    with pytest.raises(DataError) as caught:
        list(read_documents([source(path)]))
    assert (caught.value.code, caught.value.line, caught.value.exit_code) == (code, 4, 3)
    assert caught.value.file == path and len(str(caught.value)) < 1000
    drops = {}
    texts = [document.text for document in read_documents([source(path)], on_bad_row="skip", drops=drops)]
    assert texts == ["good"] * 5 and drops == {"text": {code: 1}}


def test_one_value_over_many_lines_gets_a_hint(tmp_path):
    path = tmp_path / "data.json"
    path.write_text('[\n  {"text": "a"}\n]\n')
    with pytest.raises(DataError, match="one object a line"):
        list(read_documents([source(path, format="jsonl")]))


def test_a_missing_key_error_lists_the_keys_present(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"content": "a", "id": 3}\n')
    with pytest.raises(DataError, match="'content', 'id'"):
        list(read_documents([source(path)]))


@pytest.mark.parametrize(
    "content, line",
    [(b"one\n\ntwo\xff\n", 3), (b"\xff\xfeo\0n\0", 1), (b"\x7fELF\0\0", 1), (b"a\n\n\n\0", 4)],
)
def test_a_txt_file_that_is_not_text_is_named_with_its_line(tmp_path, content, line):
    path = tmp_path / "data.txt"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(read_documents([source(path)]))
    assert (caught.value.code, caught.value.line) == ("E_TEXT", line)


def test_a_bad_txt_document_is_skipped_alone(tmp_path):
    path, drops = tmp_path / "data.txt", {}
    path.write_bytes(b"one\n\ntw\xff\n\n" + b"x" * 300_000 + b"\n\nfour\n\n")
    documents = read_documents([source(path, document_bytes=1)], on_bad_row="skip", drops=drops)
    assert [document.text for document in documents] == ["one\n\n", "four\n\n"]
    assert drops == {"text": {"E_TEXT": 1, "E_LINE_TOO_LONG": 1}}


def test_a_txt_document_over_the_limit_says_how_to_cut_it(tmp_path):
    path = tmp_path / "data.txt"
    path.write_bytes(b"line\n\n" * 50_000)
    with pytest.raises(DataError, match="document_bytes") as caught:
        build_manifest([source(path)])
    assert caught.value.code == "E_LINE_TOO_LONG"
    assert len(list(read_documents([source(path, document_bytes=1000)]))) > 100


def write_parquet(path, column, name="text"):
    pyarrow.parquet.write_table(pyarrow.table({"id": [1] * len(column), name: column}), path)


def test_parquet_without_the_column_names_the_columns(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["a"], "content")
    with pytest.raises(DataError, match=r"id \(int64\), content \(string\)") as caught:
        build_manifest([source(tmp_path / "a.parquet")])
    assert caught.value.code == "E_SCHEMA"


@pytest.mark.parametrize("column", [[1, 2], [["a"]], [b"a"], [{"a": "b"}]])
def test_parquet_with_another_type_is_refused(tmp_path, column):
    write_parquet(tmp_path / "a.parquet", column)
    with pytest.raises(DataError) as caught:
        build_manifest([source(tmp_path / "a.parquet")])
    assert caught.value.code == "E_SCHEMA"


def test_bad_parquet_rows_are_named_or_skipped(tmp_path):
    path, drops = tmp_path / "a.parquet", {}
    write_parquet(path, ["good", None, "a\0b", "x" * 300_000, "good"])
    with pytest.raises(DataError) as caught:
        list(read_documents([source(path)]))
    assert (caught.value.code, caught.value.line) == ("E_SCHEMA", 2)
    texts = [document.text for document in read_documents([source(path)], on_bad_row="skip", drops=drops)]
    assert texts == ["good"] * 2
    assert drops == {"text": {"E_SCHEMA": 1, "E_TEXT": 1, "E_LINE_TOO_LONG": 1}}


def test_parquet_text_that_is_not_utf8_is_a_bad_row(tmp_path):
    column = pyarrow.Array.from_buffers(
        pyarrow.string(), 1, [None, pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xff\xfe")]
    )
    write_parquet(tmp_path / "a.parquet", column)
    with pytest.raises(DataError) as caught:
        list(read_documents([source(tmp_path / "a.parquet")]))
    assert (caught.value.code, caught.value.line) == ("E_TEXT", 1)


@pytest.mark.faults
@pytest.mark.quick
def test_a_cut_parquet_file_is_noticed_at_64_points(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, [f"text {at}" for at in range(100)])
    whole = path.read_bytes()
    for part in range(1, 64):
        path.write_bytes(whole[: len(whole) * part // 64])
        with pytest.raises(DataError) as caught:
            build_manifest([source(path)])
        assert caught.value.code == "E_TRUNC"


MUTATION = st.tuples(st.sampled_from(["flip", "delete", "insert", "cut"]), st.floats(0, 1), st.binary(max_size=3))
SEEDS = b"".join(content[:200] + b"\n" + GOOD for content, _ in JSONL.values())


def mutate(data: bytes, mutations) -> bytes:
    for kind, place, extra in mutations:
        at = int(place * max(0, len(data) - 1))
        if kind == "flip" and data:
            data = data[:at] + bytes([data[at] ^ (1 << (len(extra) + 1))]) + data[at + 1 :]
        elif kind == "delete":
            data = data[:at] + data[at + len(extra) + 1 :]
        elif kind == "insert":
            data = data[:at] + extra + data[at:]
        else:
            data = data[:at] if place > 0.5 else data
    return data


MUTATED = st.builds(
    lambda name, mutations, on_bad_row: (name, mutate(_whole(name), mutations), on_bad_row),
    st.sampled_from(["a.jsonl", "a.txt", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"]),
    st.lists(MUTATION, min_size=1, max_size=4),
    st.sampled_from(["error", "skip"]),
).filter(lambda case: case[1] != _whole(case[0]))


def read_mutated(folder, name, data, on_bad_row) -> None:
    path = folder / name
    path.write_bytes(data)
    try:
        for document in read_documents([source(path, document_bytes=40)], on_bad_row=on_bad_row):
            document.text.encode()
    except OpenELMError as error:
        assert error.exit_code in (2, 3) and str(path) in str(error)


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.faults)])
def test_mutated_files_raise_nothing_but_our_errors(tmp_path, check_distinct, count):
    check_distinct(MUTATED, count, lambda case: read_mutated(tmp_path, *case))


@functools.cache
def _whole(name) -> bytes:
    if name.endswith(".parquet"):
        table = io.BytesIO()
        write_parquet(table, ["some text", "more text é 你好", ""] * 5)
        return table.getvalue()
    compress = {"gz": gzip.compress, "zst": zstandard.compress}.get(name.rpartition(".")[2], bytes)
    return compress(SEEDS)
