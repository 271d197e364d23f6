"""A publication with a pipe in place of a file is refused; reading the pipe would wait for ever."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from openelm.errors import OpenELMError


@pytest.fixture(autouse=True)
def deadline() -> Iterator[None]:
    def too_late(number: int, frame: object) -> None:
        raise TimeoutError("it waits for the pipe")

    before = signal.signal(signal.SIGALRM, too_late)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    "name",
    [
        "run.json",
        "ledger.jsonl",
        "result.json",
        "tokenizer/manifest.json",
        "tokenizer/tokenizer.model",
        "checkpoints/step-00000012/manifest.json",
        "checkpoints/step-00000012/state.json",
        "checkpoints/step-00000012/model.safetensors",
        "model/manifest.json",
        "model/config.json",
        "model/origin.json",
        "model/README.md",
    ],
)
def test_a_pipe_is_refused(workshop: Any, forged: Path, name: str) -> None:
    assert (forged / name).is_file()
    (forged / name).unlink()
    os.mkfifo(forged / name)
    try:
        assert workshop.verify(forged, 1).verdict == "failed"
    except OpenELMError as error:
        assert error.exit_code in (4, 7)
