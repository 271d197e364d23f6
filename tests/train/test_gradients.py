"""The step itself: averages over target tokens however the rows are cut, z-loss, precision, recomputation."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from openelm.data.stream import Batch
from openelm.model.transformer import OpenELM
from openelm.train.ledger import number
from openelm.train.objectives import NextToken
from openelm.train.update import Updater


@pytest.fixture
def batch() -> Batch:
    """Four rows with 16, 3, 0 and 9 targets."""
    draw = np.random.default_rng(0)
    inputs, targets = draw.integers(3, 300, (2, 4, 16))
    for row, kept in enumerate((16, 3, 0, 9)):
        targets[row, kept:] = -100
    documents = np.zeros((4, 16), np.int32)
    documents[3, 5:] = 1
    return Batch(inputs, targets, documents, 100, np.zeros((4, 32), np.uint8))


def gradients(bench: Any, folder: Path, batch: Batch, *overrides: str) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Return (loss, nats, gradients by name) of one batch on the initial weights."""
    run = bench.open(folder, *overrides)
    updater = Updater(run, NextToken(run.config.train.z_loss))
    loss, nll = updater._accumulate(batch, int((batch.targets != -100).sum())).tolist()
    found = {name: parameter.grad for name, parameter in updater.model.named_parameters()}
    return loss, nll, found


def oracle(bench: Any, folder: Path, batch: Batch, z_loss: float) -> tuple[float, float, dict[str, torch.Tensor]]:
    """The same in float64 from plain logits, one row and one document at a time."""
    run = bench.open(folder)
    model = OpenELM(run.model_config)
    model.initialise(torch.Generator().manual_seed(run.config.train.seed))
    model.double()
    loss = nll = torch.zeros((), dtype=torch.float64)
    for row in range(4):
        for document in np.unique(batch.documents[row]):
            place = np.flatnonzero(batch.documents[row] == document)
            logits = model(torch.from_numpy(batch.inputs[row, place])[None])[0]
            for logit, target in zip(logits, batch.targets[row, place], strict=True):
                if target != -100:
                    log_sum = torch.logsumexp(logit, 0)
                    nll = nll + log_sum - logit[target]
                    loss = loss + log_sum - logit[target] + z_loss * log_sum**2
    targets = int((batch.targets != -100).sum())
    (loss / targets).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return loss.item() / targets, nll.item() / targets, found


@pytest.mark.parametrize("micro_rows", [1, 2, 4])
def test_rows_may_be_cut_in_any_way_the_average_is_over_target_tokens(
    bench: Any, tmp_path: Path, batch: Batch, micro_rows: int
) -> None:
    """fp32 against float64: 1e-5 relative to the largest gradient of each tensor."""
    z_loss = 1e-2
    loss, nll, found = gradients(bench, tmp_path, batch, f"train.micro_rows={micro_rows}", f"train.z_loss={z_loss}")
    expected_loss, expected_nll, expected = oracle(bench, tmp_path / "oracle", batch, z_loss)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert nll == pytest.approx(expected_nll, rel=1e-5)
    assert loss - nll > 0.1
    for name, gradient in expected.items():
        error = (found[name].double() - gradient).abs().max() / gradient.abs().max()
        assert error < 1e-5, name


def test_micro_rows_must_divide_rows(bench: Any) -> None:
    from openelm.errors import ConfigError

    with pytest.raises(ConfigError, match="micro_rows 3 must divide rows 4"):
        bench.config("train.micro_rows=3")


@pytest.mark.parametrize("micro_rows", [1, 2])
def test_a_run_in_small_portions_stays_close_to_one_in_whole_batches(
    bench: Any, undisturbed: Path, tmp_path: Path, micro_rows: int
) -> None:
    """Only the order of fp32 sums differs: losses within 1e-4 after 12 updates, the same batches to the bit."""
    bench.train(tmp_path, f"train.micro_rows={micro_rows}")
    for found, expected in zip(bench.history(tmp_path), bench.history(undisturbed), strict=True):
        assert found[-1] == expected[-1]
        assert number(found[4]) == pytest.approx(number(expected[4]), rel=1e-4)


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_recomputing_layers_changes_no_bit(bench: Any, undisturbed: Path, tmp_path: Path, kind: str) -> None:
    bench.train(tmp_path, f"train.recompute={kind}")
    assert bench.fingerprint(tmp_path) == bench.fingerprint(undisturbed)


def test_bf16_stays_close_to_fp32(bench: Any, undisturbed: Path, tmp_path: Path) -> None:
    """bf16 keeps 8 bits: losses within 2 % over the whole tiny run; weights are saved in fp32."""
    bench.train(tmp_path, "train.precision=bf16")
    for found, expected in zip(bench.history(tmp_path), bench.history(undisturbed), strict=True):
        assert number(found[4]) == pytest.approx(number(expected[4]), rel=0.02)
    assert bench.fingerprint(tmp_path) != bench.fingerprint(undisturbed)


def test_a_bf16_run_resumes_to_the_bit(bench: Any, tmp_path: Path) -> None:
    bench.train(tmp_path / "whole", "train.precision=bf16")
    bench.train_until(tmp_path / "broken", 8, "train.precision=bf16")
    bench.train(tmp_path / "broken", "train.precision=bf16")
    assert bench.fingerprint(tmp_path / "broken") == bench.fingerprint(tmp_path / "whole")


def test_the_z_loss_of_the_ledger_is_what_was_added(bench: Any, undisturbed: Path, tmp_path: Path) -> None:
    bench.train(tmp_path, "train.z_loss=0.0")
    assert all(number(event["z_loss"]) == 0 for event in bench.events(tmp_path, "step"))
    first, plain = bench.events(undisturbed, "step")[0], bench.events(tmp_path, "step")[0]
    assert first["loss"] == plain["loss"]
    expected = 1e-4 * math.log(300) ** 2  # an untrained model is nearly uniform
    assert number(first["z_loss"]) == pytest.approx(expected, rel=0.3)


def test_documents_packed_into_a_row_are_hidden_from_each_other_unless_asked_otherwise(
    bench: Any, tmp_path: Path, batch: Batch
) -> None:
    hidden = gradients(bench, tmp_path / "a", batch)
    seen = gradients(bench, tmp_path / "b", batch, "train.document_mask=false")
    assert hidden[0] != seen[0]


def test_the_gradient_norm_is_the_one_before_clipping(bench: Any, tmp_path: Path) -> None:
    bench.train(tmp_path / "tight", "train.clip_norm=1e-3", "train.steps=1")
    bench.train(tmp_path / "loose", "train.clip_norm=1e3", "train.steps=1")
    (tight,), (loose,) = (bench.events(tmp_path / name, "step") for name in ("tight", "loose"))
    assert tight["gradient_norm"] == loose["gradient_norm"]
    assert number(tight["gradient_norm"]) > 1e-3


def test_a_batch_without_any_target_is_no_division_by_zero(bench: Any, tmp_path: Path, batch: Batch) -> None:
    nothing = dataclasses.replace(batch, targets=np.full_like(batch.targets, -100))
    losses = Updater(bench.open(tmp_path), NextToken())._accumulate(nothing, 1)
    assert losses.tolist() == [0.0, 0.0]
