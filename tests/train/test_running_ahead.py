"""The host one update ahead of the device, as on CUDA: the same weights, the same ledger, whatever happens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from openelm.errors import NumericError
from openelm.train.ledger import read_ledger
from openelm.train.loop import _Trainer
from openelm.train.update import Updater

from .test_nonfinite import Bad, Weights

TIMES = ("seconds", "wait_seconds", "tokens_per_second", "mfu", "matmul_flops_per_second", "manifest_sha256", "prev")


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let CPUs run ahead; the list gets the step of each update that was launched before the last one was recorded."""
    monkeypatch.setattr(Updater, "runs_ahead", property(lambda self: True))
    early: list[int] = []
    plain = Updater.launch

    def launch(self: Updater, batch: Any) -> Any:
        if getattr(self, "unfinished", 0):
            early.append(self.state.step + 1)
        self.unfinished = 1
        return plain(self, batch)

    finish = Updater.finish

    def finished(self: Updater, launched: Any) -> Any:
        self.unfinished = int(self.state.step > launched.step)
        return finish(self, launched)

    monkeypatch.setattr(Updater, "launch", launch)
    monkeypatch.setattr(Updater, "finish", finished)
    return early


def lines(folder: Path) -> list[dict[str, Any]]:
    """The ledger without clocks and without the hashes of lines, which cover them."""
    return [
        {name: value for name, value in event.items() if name not in TIMES and not isinstance(value, dict)}
        for event in read_ledger(folder / "ledger.jsonl")
    ]


CASES: dict[str, Mapping[int, float]] = {
    "nothing": {},
    "skips": {5: math.nan, 6: math.inf, 12: math.nan},
    "the first": {1: math.nan},
}


@pytest.mark.parametrize("case", CASES)
def test_weights_moments_counters_and_ledger_are_those_of_a_host_that_waits(
    bench: Any, tmp_path: Path, request: pytest.FixtureRequest, case: str
) -> None:
    at = dict(CASES[case])
    before = Weights()
    before.every = 4
    bench.train(tmp_path / "waits", objective=Bad(at), probes=(before,))
    early = request.getfixturevalue("ahead")
    after = Weights()
    after.every = 4
    bench.train(tmp_path / "ahead", objective=Bad(at), probes=(after,))
    assert early == [2, 3, 6, 8, 11, 12], "not after the checkpoints of 3, 6, 9 and not after the probes of 4 and 8"
    for step in (3, 6, 9, 12):
        assert bench.fingerprint(tmp_path / "ahead", step) == bench.fingerprint(tmp_path / "waits", step)
    assert after.after == before.after
    assert lines(tmp_path / "ahead") == lines(tmp_path / "waits")


@pytest.mark.parametrize("settings", [("train.on_nonfinite=stop",), ("train.max_skips=1",)])
def test_a_run_that_must_stop_ends_with_the_same_ledger(
    bench: Any, tmp_path: Path, request: pytest.FixtureRequest, settings: tuple[str, ...]
) -> None:
    def stopped(folder: Path) -> str:
        with pytest.raises(NumericError, match="step 8") as caught:
            bench.train(folder, *settings, objective=Bad({8: math.nan}))
        return str(caught.value).replace(str(folder), "")

    waits = stopped(tmp_path / "waits")
    request.getfixturevalue("ahead")
    assert stopped(tmp_path / "ahead") == waits
    assert lines(tmp_path / "ahead") == lines(tmp_path / "waits")


def test_an_update_that_was_launched_is_recorded_when_the_next_batch_cannot_be_read(
    bench: Any, tmp_path: Path, ahead: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = _Trainer._step

    def step(self: _Trainer, batches: Any) -> None:
        plain(self, iter([]) if self.state.step == 4 else batches)

    monkeypatch.setattr(_Trainer, "_step", step)
    with pytest.raises(StopIteration):
        bench.train(tmp_path)
    assert [event["step"] for event in bench.events(tmp_path, "step")] == [1, 2, 3, 4]


def test_a_break_and_a_resume_give_the_same_bits(
    bench: Any, undisturbed: Path, tmp_path: Path, ahead: list[int]
) -> None:
    bench.train_until(tmp_path, 8)
    bench.train(tmp_path)
    assert bench.fingerprint(tmp_path) == bench.fingerprint(undisturbed)
    assert bench.history(tmp_path) == bench.history(undisturbed)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device and `pytest -m gpu`")
@pytest.mark.parametrize("documents", [True, False])
def test_a_steady_step_on_cuda_waits_for_nothing(bench: Any, tmp_path: Path, documents: bool) -> None:
    """Whatever waits for the device is an error; to read the numbers of the step before is none."""
    masked = f"train.document_mask={str(documents).lower()}"
    run = bench.open(tmp_path, "train.device=cuda", "train.precision=bf16", "model.head_dim=16", masked)
    from openelm.data.stream import BatchStream
    from openelm.train.objectives import NextToken

    data = (run.config.data, run.manifest, run.tokenizer, run.tokenizer_folder)
    with BatchStream(*data, seed=0, rows=4, length=16) as stream:
        updater = Updater(run, NextToken())
        assert updater.runs_ahead
        for _ in range(3):
            updater.update(next(stream))
        launched = updater.launch(next(stream))
        batch = next(stream)
        torch.cuda.set_sync_debug_mode("error")
        try:
            later = updater.launch(batch)
            updater.finish(launched)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert updater.finish(later)[1] is None
