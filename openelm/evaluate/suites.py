"""Named suites: what `openelm eval MODEL --suite NAME:WHAT` runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from openelm.data.manifest import SourceConfig
from openelm.data.reading import read_documents
from openelm.errors import ConfigError
from openelm.evaluate.score import Score, bits_per_byte
from openelm.model.transformer import OpenELM
from openelm.text.tokenizer import Tokenizer


def evaluate_suite(suite: str, model: OpenELM, tokenizer: Tokenizer, *, batch_rows: int = 8) -> Score:
    """Run one suite with its default settings.

    Args:
        suite: "bpb:PATH", bits per byte of the documents in a file, folder or glob (txt, jsonl, parquet).
        batch_rows: windows per forward pass; the score does not depend on it.

    Raises:
        ConfigError: no such suite, or nothing after the colon; lists the suites.
        DataError: the documents cannot be read or scored.
        NumericError: a log-likelihood is not finite.
    """
    name, _, argument = suite.partition(":")
    if name not in SUITES or not argument:
        raise ConfigError(f"no suite is called {suite!r}", fix=f"suites: {', '.join(f'{key}:PATH' for key in SUITES)}")
    return SUITES[name](argument, model, tokenizer, batch_rows)


def read_texts(paths: Sequence[str]) -> tuple[list[str], list[str]]:
    """Read all documents of files, folders or globs into memory: (texts, names), names like "file.jsonl:12".

    Raises:
        DataError: a file is missing or damaged.
    """
    found = list(read_documents([SourceConfig.parse({"name": "documents", "paths": paths})]))
    return [document.text for document in found], [f"{Path(item.path).name}:{item.row}" for item in found]


def _bits_per_byte(path: str, model: OpenELM, tokenizer: Tokenizer, batch_rows: int) -> Score:
    texts, names = read_texts([path])
    return bits_per_byte(model, tokenizer, texts, names, batch_rows=batch_rows)


SUITES: dict[str, Callable[[str, OpenELM, Tokenizer, int], Score]] = {"bpb": _bits_per_byte}
