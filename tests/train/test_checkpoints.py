"""Checkpoints: whole or absent, verified on load, never lost to a full disk or to tidying up."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from openelm.errors import CheckpointError, DiskError, NumericError, Stopped
from openelm.train import checkpoint as checkpoint_module
from openelm.train.checkpoint import CheckpointConfig, checkpoint_folder, checkpoint_steps, load_checkpoint
from openelm.train.ledger import read_ledger

FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


def flip_bit(path: Path, place: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize("place", [0.0, 0.3, 0.999])
@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_in_the_newest_checkpoint_costs_only_its_steps(
    bench: Any, undisturbed: Path, tmp_path: Path, name: str, place: float
) -> None:
    bench.train_until(tmp_path, 8)
    flip_bit(checkpoint_folder(tmp_path, 6) / name, place)
    bench.train(tmp_path)
    (damage,) = bench.events(tmp_path, "damage")
    assert str(checkpoint_folder(tmp_path, 6)) in damage["reason"]
    assert name in damage["reason"] or name == "manifest.json"  # which may accuse the file it lists
    assert [event["to"] for event in bench.events(tmp_path, "rewind")] == [3]
    assert bench.fingerprint(tmp_path) == bench.fingerprint(undisturbed)
    assert bench.history(tmp_path) == bench.history(undisturbed)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_or_truncated_file_is_damage_too(bench: Any, undisturbed: Path, tmp_path: Path, name: str) -> None:
    bench.train_until(tmp_path, 11)
    (checkpoint_folder(tmp_path, 9) / name).unlink()
    file = checkpoint_folder(tmp_path, 6) / name
    os.truncate(file, file.stat().st_size // 2)
    bench.train(tmp_path)
    assert len(bench.events(tmp_path, "damage")) == 2
    assert bench.fingerprint(tmp_path) == bench.fingerprint(undisturbed)


def test_files_swapped_between_two_checkpoints_are_damage(bench: Any, undisturbed: Path, tmp_path: Path) -> None:
    bench.train_until(tmp_path, 8)
    newer, older = (checkpoint_folder(tmp_path, step) / "optimizer.safetensors" for step in (6, 3))
    newer.write_bytes(older.read_bytes())
    bench.train(tmp_path)
    assert len(bench.events(tmp_path, "damage")) == 1
    assert bench.fingerprint(tmp_path) == bench.fingerprint(undisturbed)


def test_a_run_without_one_whole_checkpoint_is_refused_and_names_the_file(bench: Any, tmp_path: Path) -> None:
    bench.train_until(tmp_path, 8)
    for step in (3, 6):
        flip_bit(checkpoint_folder(tmp_path, step) / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        bench.train(tmp_path)
    assert caught.value.exit_code == 4
    assert "step-00000006/model.safetensors" in str(caught.value)
    assert checkpoint_steps(tmp_path) == [3, 6], "nothing is removed"


def test_the_last_checkpoints_are_kept(bench: Any, tmp_path: Path) -> None:
    bench.train(tmp_path, "checkpoints.every=2", "checkpoints.keep_last=3")
    assert checkpoint_steps(tmp_path) == [8, 10, 12]


def test_a_run_that_only_stops_have_saved_has_two_checkpoints_to_fall_back_to(bench: Any, tmp_path: Path) -> None:
    settings = ("checkpoints.every=50",)
    for last in (3, 5, 8):

        def stop(event: Any, last: int = last) -> None:
            if event["event"] == "step" and event["step"] == last:
                signal.raise_signal(signal.SIGTERM)

        with pytest.raises(Stopped):
            bench.train(tmp_path, *settings, observers=(stop,))
    assert checkpoint_steps(tmp_path) == [5, 8]
    flip_bit(checkpoint_folder(tmp_path, 8) / "model.safetensors")
    bench.train(tmp_path, *settings)
    assert [event["step"] for event in bench.events(tmp_path, "resume")] == [3, 5, 5]
    assert checkpoint_steps(tmp_path) == [12]


def test_some_checkpoints_are_kept_for_good(bench: Any, tmp_path: Path) -> None:
    bench.train(tmp_path, "checkpoints.every=1", "checkpoints.keep_last=2", "checkpoints.keep_every=5")
    assert checkpoint_steps(tmp_path) == [5, 10, 11, 12]


def test_fewer_than_two_kept_checkpoints_cannot_be_asked_for() -> None:
    from openelm.errors import ConfigError

    with pytest.raises(ConfigError, match="keep_last"):
        CheckpointConfig.parse({"keep_last": 1})


def test_thinning_never_removes_what_was_just_saved(bench: Any, undisturbed: Path, tmp_path: Path) -> None:
    keep = ("checkpoints.keep_last=2", "checkpoints.keep_every=3")
    bench.train_until(tmp_path, 11, *keep)
    for step in (6, 9):
        flip_bit(checkpoint_folder(tmp_path, step) / "model.safetensors")
    with pytest.raises(Stopped):
        bench.train(tmp_path, *keep, observers=(stop_at(4),))
    assert load_checkpoint(tmp_path, 4).step == 4, "the error says that everything is saved"
    bench.train(tmp_path, *keep)
    assert bench.fingerprint(tmp_path) == bench.fingerprint(undisturbed)


def stop_at(step: int, number: signal.Signals = signal.SIGTERM) -> Any:
    def observer(event: Any) -> None:
        if event["event"] == "step" and event["step"] == step:
            signal.raise_signal(number)

    return observer


def test_what_a_killed_save_left_behind_is_cleaned(bench: Any, undisturbed: Path, tmp_path: Path) -> None:
    bench.train_until(tmp_path, 8)
    half = tmp_path / "checkpoints" / ".step-00000009.tmp-4194304"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    bench.train(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith(".")] == []
    assert bench.fingerprint(tmp_path) == bench.fingerprint(undisturbed)


def test_a_save_killed_between_its_two_renames_loses_nothing(bench: Any, undisturbed: Path, tmp_path: Path) -> None:
    bench.train_until(tmp_path, 8)
    newest = checkpoint_folder(tmp_path, 6)
    newest.rename(newest.with_name(f".{newest.name}.old-4194304"))
    bench.train(tmp_path)
    assert [event["step"] for event in bench.events(tmp_path, "resume")] == [6]
    assert bench.fingerprint(tmp_path) == bench.fingerprint(undisturbed)


def test_a_disk_that_fills_up_at_any_sync_is_one_error_and_costs_no_older_checkpoint(
    bench: Any, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.train_until(tmp_path, 5)
    before = {path: path.read_bytes() for path in checkpoint_folder(tmp_path, 3).iterdir()}
    real, failures = os.fsync, 0
    for failing in range(12):
        calls = iter(range(100))

        def full(descriptor: int, calls: Any = calls, failing: int = failing) -> None:
            if next(calls) == failing:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            try:
                bench.train_until(tmp_path, 7)
            except DiskError as error:
                failures += 1
                assert error.exit_code == 5
        assert {path: path.read_bytes() for path in before} == before
        read_ledger(tmp_path / "ledger.jsonl")
        assert not list((tmp_path / "checkpoints").glob(".*"))
        if failures <= failing:
            break
    assert failures >= 5, "the ledger, three files and two folders are synced"
    bench.train(tmp_path)
    assert bench.fingerprint(tmp_path) == bench.fingerprint(undisturbed)


def test_a_disk_that_is_full_when_tensors_are_written_is_a_disk_error(
    bench: Any, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.train_until(tmp_path, 5)

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "write_tensors", full)
        with pytest.raises(DiskError, match="No space left"):
            bench.train(tmp_path)
    assert checkpoint_steps(tmp_path) == [3]
    bench.train(tmp_path)
    assert bench.fingerprint(tmp_path) == bench.fingerprint(undisturbed)


def test_a_file_size_limit_met_by_the_tensor_writer_is_a_disk_error(
    bench: Any, undisturbed: Path, tmp_path: Path
) -> None:
    """safetensors raises its own kind of error when a write fails, not OSError."""
    bench.train_until(tmp_path, 5)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(DiskError) as caught:
            bench.train(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.exit_code == 5
    assert checkpoint_steps(tmp_path) == [3]
    bench.train(tmp_path)
    assert bench.fingerprint(tmp_path) == bench.fingerprint(undisturbed)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_process_killed_at_any_disk_call_of_a_save_leaves_the_old_or_the_new(
    bench: Any, undisturbed: Path, tmp_path: Path
) -> None:
    """Children of this process kill themselves at the k-th sync or rename of the save at step 6, for every k."""
    bench.train_until(tmp_path / "before", 5)
    for moment in range(60):
        folder = tmp_path / str(moment)
        shutil.copytree(tmp_path / "before", folder)
        child = os.fork()
        if child == 0:
            _save_and_die(bench, folder, moment)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            break
        bench.train(folder)
        assert bench.events(folder, "resume")[0]["step"] in (3, 6)
        assert bench.fingerprint(folder) == bench.fingerprint(undisturbed)
        assert bench.history(folder) == bench.history(undisturbed)
        assert not [path for path in (folder / "checkpoints").iterdir() if path.name.startswith(".")]
    assert os.WEXITSTATUS(status) == 75
    assert moment > 10, "the calls of a save"


def _save_and_die(bench: Any, folder: Path, moment: int) -> None:
    calls = 0

    def deadly(call: Any) -> Any:
        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            if calls == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            calls += 1
            return call(*arguments, **options)

        return counted

    def leave(event: Any) -> None:
        if event["event"] == "checkpoint" and event["step"] == 6:
            os._exit(75)

    try:
        for name in ("fsync", "rename", "replace"):
            setattr(os, name, deadly(getattr(os, name)))
        bench.train(folder, observers=(leave,))
    finally:
        os._exit(1)


def test_weights_that_are_not_finite_are_never_saved(bench: Any, tmp_path: Path) -> None:
    bench.train_until(tmp_path, 4)

    class Poison:
        every = 1

        def measure(self, model: Any, step: int) -> dict[str, Any]:
            if step == 6:
                next(model.parameters()).data[0, 0] = float("nan")
            return {"event": "evaluation", "bits_per_byte": (1.0).hex(), "documents": 0}

    with pytest.raises(NumericError, match="step 6"):
        bench.train(tmp_path, probes=(Poison(),))
    assert checkpoint_steps(tmp_path) == [3]


def test_a_checkpoint_is_safetensors_and_json_only(undisturbed: Path) -> None:
    folder = checkpoint_folder(undisturbed, 12)
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    weights = load_file(folder / "model.safetensors")
    assert all(name.startswith("transformer.") for name in weights)
    moments = load_file(folder / "optimizer.safetensors")
    assert {name.rpartition("/")[0] for name in moments} == set(weights)


@pytest.mark.parametrize("name", ["step-²", "step-3", "step-٠٠٠٠٠٠٠٣", "step-000000003", "step-", "step-1e3"])
def test_a_folder_that_only_looks_like_a_checkpoint_is_none(tmp_path: Path, name: str) -> None:
    for found in (name, "step-00000006", "step-123456789"):
        (tmp_path / "checkpoints" / found).mkdir(parents=True)
    assert checkpoint_steps(tmp_path) == [6, 123456789]


def test_two_processes_cannot_train_the_same_folder(bench: Any, tmp_path: Path) -> None:
    from openelm.files.locks import folder_lock

    with folder_lock(tmp_path), pytest.raises(CheckpointError, match="using this folder") as caught:
        bench.train(tmp_path)
    assert caught.value.exit_code == 4
