"""Questions of yours with answers to choose from: rows of a jsonl or parquet file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pyarrow.lib import ArrowInvalid
from pyarrow.parquet import read_table

from openelm.errors import DataError

_FIX = 'each row has "query" (text), "choices" (two texts or more) and "gold" (the place of the right one, from 0)'


def read_questions(path: Path) -> list[dict[str, Any]]:
    """Read questions: `query`, `choices`, and `gold`, the right one's index; other columns are left out.

    Raises:
        DataError: the file is missing, is neither jsonl nor parquet, or a row is wrong; names the row.
    """
    found = []
    for row, value in enumerate(_rows(path), start=1):
        if wrong := _wrong(value):
            raise DataError(wrong, fix=_FIX, file=path, line=row, code="E_SCHEMA")
        found.append({key: value[key] for key in ("query", "choices", "gold")})
    if not found:
        raise DataError("there is no question", fix=_FIX, file=path)
    return found


def _rows(path: Path) -> Iterator[Any]:
    try:
        if path.suffix == ".parquet":
            yield from read_table(path).to_pylist()  # type: ignore[no-untyped-call]
            return
        if path.suffix != ".jsonl":
            raise DataError("neither .jsonl nor .parquet", fix="use one of them", file=path)
        for row, line in enumerate(path.read_bytes().splitlines(), start=1):
            try:
                yield json.loads(line)
            except ValueError as error:
                raise DataError(f"not valid JSON: {error}", fix=_FIX, file=path, line=row, code="E_JSON") from None
    except FileNotFoundError:
        raise DataError("no such file", fix="check the path", file=path, code="E_PATH") from None
    except (OSError, ArrowInvalid) as error:
        raise DataError(f"cannot be read: {error}", fix="check the file", file=path, code="E_READ") from None


def _wrong(row: Any) -> str | None:
    """Say what is wrong with a row, if anything is."""
    if not isinstance(row, dict):
        return f"an object is expected, not {type(row).__name__}"
    query, choices, gold = (row.get(key) for key in ("query", "choices", "gold"))
    if not _is_text(query):
        return f"query is {query!r:.60}"
    if not isinstance(choices, list) or len(choices) < 2 or not all(_is_text(choice) for choice in choices):
        return f"choices is {choices!r:.60}"
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(choices):
        return f"gold is {gold!r:.60}, and there are {len(choices)} choices"
    return None


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
