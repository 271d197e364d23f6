"""One file a format; each cuts a file into blocks (`scan`) and reads the rows of a block (`read`)."""

from __future__ import annotations

from types import ModuleType

from openelm.data.readers import jsonl, parquet, txt
from openelm.data.remote import DataPath
from openelm.errors import DataError

READERS: dict[str, ModuleType] = {"txt": txt, "jsonl": jsonl, "parquet": parquet}
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
