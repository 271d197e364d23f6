"""Whole runs whose layers are compiled: close to plain ones, the same bits after a break, also with a shared model."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from openelm.model import transformer
from openelm.train.ledger import number

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"),
]
COMPILED = "train.compile=on"


def close(bench: Any, folder: Path, expected: Path) -> None:
    for found, plain in zip(bench.history(folder), bench.history(expected), strict=True):
        assert found[-1] == plain[-1], "the same batches"
        assert number(found[4]) == pytest.approx(number(plain[4]), rel=1e-4)


def test_a_compiled_run_stays_close_and_resumes_to_the_bit(bench: Any, undisturbed: Path, tmp_path: Path) -> None:
    bench.train(tmp_path / "whole", COMPILED)
    close(bench, tmp_path / "whole", undisturbed)
    bench.train_until(tmp_path / "broken", 8, COMPILED)
    bench.train(tmp_path / "broken", COMPILED)
    assert bench.fingerprint(tmp_path / "broken") == bench.fingerprint(tmp_path / "whole")


def trace_only() -> None:
    """Let the compiler's graphs run on plain kernels; a fork cannot use the compiling processes of its parent."""
    plain = functools.cache(lambda function: torch.compile(function, backend="aot_eager", fullgraph=True))
    transformer.compiled = plain  # type: ignore[assignment]


def test_compiled_layers_of_a_shared_model(bench: Any, launch: Any, undisturbed: Path, tmp_path: Path) -> None:
    """FSDP2 gathers a layer's weights around the compiled function; half of the layers' memory is recomputed."""
    settings = ("train.shard_processes=2", "train.recompute=selective", "train.timeout_seconds=240")
    launch.run(tmp_path, 2, COMPILED, *settings, before={0: trace_only, 1: trace_only})
    close(bench, tmp_path, undisturbed)
