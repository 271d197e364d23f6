from __future__ import annotations

import json
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openelm.data.manifest import Manifest, SourceConfig, build_manifest
from openelm.data.stream import BatchStream, DataConfig
from openelm.text.tokenizer import ByteTokenizer, Tokenizer

T = TypeVar("T", bound=Hashable)

WORDS = [
    "model",
    "layer",
    "width",
    "depth",
    "head",
    "token",
    "batch",
    "lane",
    "epoch",
    "é",
    "你好",
    "🦙",
    "\n",
]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return ByteTokenizer()


@pytest.fixture(scope="session")
def tokenizer_path(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """61 documents of 4 to about 500 bytes, each starting with its own number."""
    random = np.random.Generator(np.random.PCG64(7))
    lengths = random.integers(0, 80, 61)
    return [f"{at:03d} " + " ".join(random.choice(WORDS, length)) for at, length in enumerate(lengths)]


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    def write(texts: list[str], name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
        return path

    return write


@pytest.fixture
def open_stream(tokenizer: Tokenizer, tokenizer_path: Path) -> Callable[..., BatchStream]:
    def open_(sources: object, *, seed=0, rows=4, length=32, cursors=None, manifest=None, **settings) -> BatchStream:
        if not isinstance(sources, list):
            sources = [{"name": "text", "paths": (str(sources),)}]
        settings = {"min_characters": 0, "min_tokens": 0, "lanes": 4, "workers": 0, **settings}
        config = DataConfig(sources=tuple(SourceConfig(**source) for source in sources), **settings)
        found: Manifest = manifest or build_manifest(config.sources, on_bad_row=config.on_bad_row)
        return BatchStream(
            config, found, tokenizer, tokenizer_path, seed=seed, rows=rows, length=length, cursors=cursors
        )

    return open_


@pytest.fixture(scope="session")
def check_distinct() -> Callable[[st.SearchStrategy[T], int, Callable[[T], None]], None]:
    """Check exactly `count` different cases of a strategy, the same every time; Hypothesis alone may repeat some."""

    def run(cases: st.SearchStrategy[T], count: int, check: Callable[[T], None]) -> None:
        seen: set[T] = set()

        @settings(max_examples=count * 3 // 2, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(case=cases)
        def one(case: T) -> None:
            if len(seen) < count or case in seen:
                seen.add(case)  # before the check, so that a failing case fails again
                check(case)

        one()
        assert len(seen) == count

    return run
