"""One file a format; each cuts a file into blocks (`scan`) and reads the rows of a block as texts (`read`).

Those whose rows are objects also read them whole (`read_objects`).
"""

from __future__ import annotations

from types import ModuleType

from openelm.data.readers import json_array, jsonl, parquet, txt
from openelm.data.remote import DataPath
from openelm.errors import DataError

READERS: dict[str, ModuleType] = {"txt": txt, "jsonl": jsonl, "json": json_array, "parquet": parquet}
_MAYBE_ARRAYS = (".json", ".json.gz", ".json.zst")
SUFFIXES = {
    **dict.fromkeys((".txt", ".md", ".text"), "txt"),
    **{
        suffix + compression: "jsonl"
        for suffix in (".jsonl", ".json", ".jsonlines", ".ndjson")
        for compression in ("", ".gz", ".zst")
    },
    ".parquet": "parquet",
}


def format_of(path: DataPath) -> str:
    """Name a file's format by its suffix.

    Raises:
        DataError: E_FORMAT naming the allowed suffixes.
    """
    name = path.name.lower()
    for suffix, kind in SUFFIXES.items():
        if name.endswith(suffix):
            return kind
    raise DataError(
        f"unknown format; allowed: {' '.join(SUFFIXES)}",
        fix="leave the file out with exclude, or set format",
        file=path,
        code="E_FORMAT",
    )


def look_inside(path: DataPath, kind: str) -> str:
    """Correct the format that a name stands for: many a .json file is one array instead of JSON Lines."""
    is_array = path.name.lower().endswith(_MAYBE_ARRAYS) and json_array.is_array(path)
    return "json" if kind == "jsonl" and is_array else kind
