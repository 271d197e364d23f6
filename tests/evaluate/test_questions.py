"""Files of questions are read whole, or refused with the row that is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from openelm.errors import DataError
from openelm.evaluate.questions import read_questions

GOOD = {"query": "1 + 1 =", "choices": ["2", "3"], "gold": 0}


def test_both_formats_say_the_same(tmp_path: Path) -> None:
    rows = [GOOD, {"query": "é?", "choices": ["a", "b", "c"], "gold": 2}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row | {"other": 1}) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read_questions(tmp_path / "a.jsonl") == read_questions(tmp_path / "a.parquet") == rows


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ("{", "not valid JSON"),
        ("[]", "an object is expected"),
        (json.dumps({**GOOD, "query": " "}), "query is"),
        (json.dumps({**GOOD, "choices": ["one"]}), "choices is"),
        (json.dumps({**GOOD, "choices": ["one", ""]}), "choices is"),
        (json.dumps({**GOOD, "gold": 2}), "gold is 2, and there are 2 choices"),
        (json.dumps({**GOOD, "gold": True}), "gold is True"),
        (json.dumps({"query": "a", "choices": ["b", "c"]}), "gold is None"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, row: str, told: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + row + "\n")
    with pytest.raises(DataError, match=told) as caught:
        read_questions(path)
    assert caught.value.line == 2 and caught.value.file == path


@pytest.mark.parametrize(
    ("name", "data"), [("a.jsonl", b""), ("a.parquet", b"no"), ("a.txt", b"{}"), ("a.jsonl", None)]
)
def test_a_file_without_questions_is_refused(tmp_path: Path, name: str, data: bytes | None) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError):
        read_questions(tmp_path / name)
