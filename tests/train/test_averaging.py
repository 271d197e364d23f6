"""The mean of the last checkpoints, and which ones those are."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from openelm.errors import CheckpointError, ConfigError, Stopped
from openelm.model.folder import weights_sha256
from openelm.train.average import average_checkpoints
from openelm.train.checkpoint import checkpoint_folder


def test_the_mean_equals_one_taken_in_float64(undisturbed: Path) -> None:
    mean, steps = average_checkpoints(undisturbed, 3)
    assert steps == [6, 9, 12]
    files = [load_file(checkpoint_folder(undisturbed, step) / "model.safetensors") for step in steps]
    assert mean.keys() == files[0].keys()
    for name, tensor in mean.items():
        expected = (sum(file[name].astype(np.float64) for file in files) / 3).astype(np.float32)
        assert tensor.numpy().dtype == np.float32
        assert np.array_equal(tensor.numpy(), expected), name


def test_the_mean_of_one_is_that_one(bench: Any, undisturbed: Path) -> None:
    mean, steps = average_checkpoints(undisturbed, 1)
    assert steps == [12]
    assert weights_sha256(mean) == bench.fingerprint(undisturbed)[0]


@pytest.mark.parametrize("last", [5, 0, -1])
def test_more_than_there_are_or_none_is_an_error_that_says_how_many_there_are(undisturbed: Path, last: int) -> None:
    with pytest.raises(ConfigError, match="the run has 4") as caught:
        average_checkpoints(undisturbed, last)
    assert caught.value.exit_code == 2


def test_a_folder_without_checkpoints_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the run has 0"):
        average_checkpoints(tmp_path, 1)


def test_a_damaged_checkpoint_is_not_averaged_in(bench: Any, tmp_path: Path) -> None:
    bench.train(tmp_path)
    file = checkpoint_folder(tmp_path, 9) / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="step-00000009"):
        average_checkpoints(tmp_path, 2)


@pytest.mark.parametrize("step", [4, 8, 11])
def test_a_stop_in_between_does_not_change_which_checkpoints_are_averaged(
    bench: Any, undisturbed: Path, tmp_path: Path, step: int
) -> None:
    """A stop saves off the grid; the mean of a stopped and resumed run must still be that of an undisturbed one."""

    def stop(event: Any) -> None:
        if event["event"] == "step" and event["step"] == step:
            signal.raise_signal(signal.SIGTERM)

    settings = ("checkpoints.keep_last=3",)
    with pytest.raises(Stopped):
        bench.train(tmp_path, *settings, observers=(stop,))
    bench.train(tmp_path, *settings)
    mean, steps = average_checkpoints(tmp_path, 3)
    expected, expected_steps = average_checkpoints(undisturbed, 3)
    assert steps == expected_steps
    assert weights_sha256(mean) == weights_sha256(expected)
