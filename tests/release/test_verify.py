"""`openelm verify`: honest runs pass whatever happened to them, and every forgery is caught at its level."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

import openelm.train.saving
from openelm.errors import CheckpointError, Stopped
from openelm.files.hashes import canonical_json, sha256_bytes, sha256_file
from openelm.optim.schedule import ScheduleConfig, learning_rate
from openelm.release.publication import read_publication
from openelm.release.segments import all_segments, schedule_boundaries
from openelm.train.checkpoint import checkpoint_folder

from .conftest import rechain


def assert_passes(workshop: Any, folder: Path, *levels: int) -> None:
    for level in levels:
        findings = workshop.verify(folder, level)
        assert (findings.verdict, findings.level) == ("verified", level), str(findings.difference)


def at(kind: str, step: int) -> Any:
    return lambda event: event["event"] == kind and event["step"] == step


@pytest.mark.parametrize("level", range(5))
def test_an_undisturbed_run_passes_at_every_level(workshop: Any, honest: Path, level: int) -> None:
    assert_passes(workshop, honest, level)


@pytest.mark.parametrize("level", [0, 3, 4])
def test_a_run_that_was_killed_and_rewound_passes_at_every_level(workshop: Any, rewound: Path, level: int) -> None:
    assert any(line.event == "rewind" for line in read_publication(rewound).lines)
    assert_passes(workshop, rewound, level)


@pytest.mark.parametrize(
    "stops",
    [
        (("step", 2),),
        (("checkpoint", 6),),
        (("resume", 3), ("step", 5)),
        (("step", 5), ("rewind", 5), ("step", 7), ("step", 4)),
        (("evaluation", 12),),
    ],
)
def test_a_run_killed_anywhere_passes(workshop: Any, tmp_path: Path, stops: tuple[tuple[str, int], ...]) -> None:
    for kind, step in stops:
        workshop.train(tmp_path, stop_at=at(kind, step))
    assert workshop.train(tmp_path)
    assert_passes(workshop, tmp_path, 4)


@pytest.mark.parametrize(
    "settings",
    [
        ("optimizer.kind=muon",),
        ("optimizer.weights=bf16", "train.precision=bf16"),
        ("optimizer.kind=muon", "optimizer.weights=bf16-stochastic", "train.precision=bf16"),
    ],
)
def test_a_run_with_another_optimizer_passes(workshop: Any, tmp_path: Path, settings: tuple[str, ...]) -> None:
    workshop.train(tmp_path, *settings)
    workshop.publish(tmp_path)
    assert_passes(workshop, tmp_path, 0, 4)


def test_a_run_from_before_a_setting_existed_passes(workshop: Any, honest: Path, tmp_path: Path) -> None:
    """Its `run.json` and the hash in its ledger know nothing of the setting, whose default is what it did."""
    shutil.copytree(honest, tmp_path, dirs_exist_ok=True)
    description = json.loads((tmp_path / "run.json").read_text())
    del description["config"]["optimizer"]["kind"], description["config"]["optimizer"]["weights"]
    (tmp_path / "run.json").write_text(json.dumps(description))
    digest = sha256_bytes(canonical_json(description["config"]))

    def older(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**event, "config_sha256": digest} if "config_sha256" in event else event for event in events]

    rechain(tmp_path, older)
    assert_passes(workshop, tmp_path, 0, 4)


def test_a_run_that_saves_in_the_background_passes(
    workshop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checkpoints are recorded some steps late, and one whose line a kill prevented is resumed from."""
    read_again, go_on = openelm.train.saving.load_checkpoint, threading.Event()

    def slow(*arguments: Any) -> Any:
        saved = read_again(*arguments)
        go_on.wait(0.3)
        return saved

    monkeypatch.setattr(openelm.train.saving, "load_checkpoint", slow)
    workshop.train(tmp_path, "checkpoints.background=true", stop_at=at("step", 8))
    assert_passes(workshop, tmp_path, 0)
    assert workshop.train(tmp_path, "checkpoints.background=true")
    order = [(line.event, line.step) for line in read_publication(tmp_path).lines]
    late = [
        index
        for index, (kind, step) in enumerate(order)
        if kind == "checkpoint" and ("step", step + 1) in order[:index]
    ]
    assert late
    assert_passes(workshop, tmp_path, 4)


@pytest.mark.parametrize("step", [6, 12])
def test_a_run_killed_between_a_checkpoint_and_its_line_passes(
    workshop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    read_again = openelm.train.saving.load_checkpoint

    def read_and_die(run: Path, at: int) -> Any:
        if at == step:
            raise KeyboardInterrupt
        return read_again(run, at)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(openelm.train.saving, "load_checkpoint", read_and_die)
        workshop.train(tmp_path)
    assert_passes(workshop, tmp_path, 3)
    assert workshop.train(tmp_path)
    assert_passes(workshop, tmp_path, 4)


def test_a_run_stopped_by_a_signal_passes_before_and_after_it_goes_on(workshop: Any, tmp_path: Path) -> None:
    def signal_at(event: Any) -> bool:
        if event["event"] == "step" and event["step"] == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return False

    with pytest.raises(Stopped):
        workshop.train(tmp_path, stop_at=signal_at)
    assert_passes(workshop, tmp_path, 4)
    workshop.train(tmp_path)
    assert_passes(workshop, tmp_path, 4)


def test_a_run_whose_newest_checkpoint_was_damaged_passes(workshop: Any, tmp_path: Path) -> None:
    workshop.train(tmp_path, stop_at=at("step", 8))
    (checkpoint_folder(tmp_path, 6) / "model.safetensors").write_bytes(b"damaged")
    workshop.train(tmp_path)
    assert_passes(workshop, tmp_path, 4)
    notes = workshop.verify(tmp_path, 0).not_checked
    assert any("damaged-step-00000006" in note.what for note in notes)


def test_a_run_with_updates_that_were_skipped_as_spikes_passes(workshop: Any, skipping: Path) -> None:
    assert any(line.event == "skip" for line in read_publication(skipping).valid)
    assert_passes(workshop, skipping, 3)


@pytest.fixture(scope="module")
def skipping(workshop: Any, one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("skipping") / "run"
    settings = ("train.steps=40", "train.on_spike=skip", "train.spike_sigmas=0.01", "schedule.peak=0.0001")
    workshop.train(folder, *settings, "checkpoints.every=20", "evaluation.every=40")
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        ("checkpoints.keep_last=2",),
        ("schedule.shape=warmup-stable-decay", "train.seed=5"),
        ("train.numerics=exact", "train.shards=2"),
        ("train.micro_rows=2", "train.document_mask=false", "checkpoints.every=5"),
        ("train.recompute=full", "data.lanes=4", "held_out=[]"),
        ("train.precision=bf16", "schedule.warmup_steps=0"),
    ],
)
def test_runs_with_other_settings_pass(workshop: Any, tmp_path: Path, settings: tuple[str, ...]) -> None:
    workshop.train(tmp_path, *settings, stop_at=at("step", 7))
    workshop.train(tmp_path, *settings)
    assert_passes(workshop, tmp_path, 4)


def test_thinned_checkpoints_are_said_not_to_be_there(workshop: Any, tmp_path: Path) -> None:
    workshop.train(tmp_path, "checkpoints.keep_last=2")
    findings = workshop.verify(tmp_path, 3)
    assert [note.what for note in findings.not_checked if "checkpoints" in note.what] == [
        "2 checkpoints between steps 3 and 6"
    ]
    assert any(note.what.startswith("steps 1 to 9") for note in findings.checked)


def test_a_run_that_was_given_more_steps_passes_as_far_as_its_settings_are_known(workshop: Any, tmp_path: Path) -> None:
    workshop.train(tmp_path)
    workshop.train(tmp_path, "train.steps=15", allow_change=["train.steps"])
    findings = workshop.verify(tmp_path, 4)
    assert findings.verdict == "consistent (weaker: settings changed on the way)"
    assert any(note.what == "updates 1 to 12" for note in findings.not_checked)
    assert [note.what for note in findings.checked if note.what.startswith("steps")] == ["steps 13 to 15"]


def test_nothing_is_written_to_the_run(workshop: Any, rewound: Path) -> None:
    def state() -> dict[Path, tuple[str, int]]:
        files = [path for path in rewound.rglob("*") if path.is_file()]
        return {path: (sha256_file(path), path.stat().st_mtime_ns) for path in files}

    before = state()
    workshop.verify(rewound, 4)
    assert state() == before


def test_a_moved_run_is_verified_with_the_verifiers_own_copy_of_the_data(
    workshop: Any, honest: Path, tmp_path: Path
) -> None:
    run, mine = tmp_path / "downloaded", tmp_path / "mine"
    shutil.copytree(honest, run)
    mine.mkdir()
    for file in (workshop.text, workshop.held_out):
        shutil.copy(file, mine)
    away = workshop.folder.rename(workshop.folder.with_name("away"))
    try:
        findings = workshop.verify(run, 3, data=[(str(workshop.folder), str(mine))])
    finally:
        away.rename(workshop.folder)
    assert findings.verdict == "verified"


def test_files_that_nothing_lists_are_named(workshop: Any, forged: Path) -> None:
    places = [forged / "notes.txt", checkpoint_folder(forged, 6) / "more.bin", forged / "checkpoints" / "old.zip"]
    for path in places:
        path.write_bytes(b"anything")
    findings = workshop.verify(forged, 0)
    assert findings.verdict == "verified"
    named = {Path(note.what).name for note in findings.not_checked}
    assert named >= {"notes.txt", "more.bin", "old.zip"}


def test_the_first_and_last_segment_and_every_turn_are_mandatory_and_others_are_drawn(
    workshop: Any, tmp_path: Path
) -> None:
    settings = ("checkpoints.every=1", "checkpoints.keep_last=20", "evaluation.every=50", "schedule.warmup_steps=3")
    workshop.train(tmp_path, *settings, stop_at=at("step", 8))
    workshop.train(tmp_path, *settings)
    replayed = {
        note.what for note in workshop.verify(tmp_path, 3, segments=2, seed=7).checked if note.what.startswith("steps")
    }
    reasons = {int(what.split()[1]): what.partition("(")[2] for what in replayed}
    assert "first" in reasons[1] and "last" in reasons[12]
    assert "schedule" in reasons[3] and "schedule" in reasons[4]
    assert "resume" in reasons[8] and "rewind" in reasons[8]
    assert sum("random" in reason for reason in reasons.values()) == 2
    assert len(replayed) < 12
    assert len(all_segments(read_publication(tmp_path))) == 12


@pytest.mark.parametrize("fraction", [0.2, 0.35, 1.0])
def test_the_boundaries_of_the_schedule_are_where_the_learning_rate_turns(fraction: float) -> None:
    schedule = ScheduleConfig.parse(
        {"shape": "warmup-stable-decay", "warmup_steps": 0 if fraction == 1 else 4, "decay_fraction": fraction}
    )
    rates = [learning_rate(schedule, step, 20) for step in range(20)]
    at_peak = [update for update, rate in enumerate(rates, start=1) if rate == schedule.peak]
    turns = [at_peak[0] - 1, at_peak[-1]] if at_peak[0] > 1 else [at_peak[-1]]
    assert schedule_boundaries(schedule, 20) == turns


def test_a_folder_without_a_run_is_no_failed_verification(workshop: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"run\.json is missing"):
        workshop.verify(tmp_path, 0)


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(20))
def test_runs_with_random_settings_killed_at_random_moments_pass(workshop: Any, tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    settings = (
        f"train.seed={draw.randrange(1000)}",
        f"train.steps={draw.randrange(8, 50)}",
        f"checkpoints.every={draw.randrange(1, 9)}",
        f"checkpoints.keep_last={draw.randrange(2, 6)}",
        f"data.lanes={draw.choice([1, 2, 4])}",
        f"schedule.shape={draw.choice(['cosine', 'warmup-stable-decay'])}",
        f"train.on_spike={draw.choice(['warn', 'skip'])}",
        f"train.spike_sigmas={draw.choice([0.01, 1, 6])}",
    )
    for _ in range(draw.randrange(5)):
        lines = draw.randrange(1, 60)
        left = iter(range(lines))
        if workshop.train(tmp_path, *settings, stop_at=lambda event, left=left: next(left, None) is None):
            break
    workshop.train(tmp_path, *settings)
    if draw.random() < 0.5:
        workshop.publish(tmp_path, last=1)
    assert_passes(workshop, tmp_path, 3, 4)


def test_a_difference_that_other_code_may_have_made_says_so(workshop: Any, forged: Path) -> None:
    def made_elsewhere(events: Any) -> Any:
        for event in events:
            if event["event"] == "start":
                event["environment"]["code"] = "0" * 64
            if event["event"] == "step" and event["step"] == 7:
                event["batch_sha256"] = "1" * 64
        return events

    rechain(forged, made_elsewhere)
    findings = workshop.verify(forged, 2)
    assert findings.verdict == "failed"
    assert "step 7: batch_sha256" in str(findings.difference)
    assert "other code of openelm" in str(findings.difference) and "git_commit" in str(findings.difference)
    assert "other code" in findings.to_json()["first_difference"]["what"]


@pytest.mark.parametrize(
    ("before", "after", "change"),
    [
        (("checkpoints.background=true",), ("checkpoints.background=false",), "checkpoints.background"),
        ((), ("evaluation.max_bytes=96",), "evaluation"),
    ],
)
def test_settings_changed_on_the_way_weaken_the_verdict_and_are_no_fault(
    workshop: Any, tmp_path: Path, before: tuple[str, ...], after: tuple[str, ...], change: str
) -> None:
    workshop.train(tmp_path, *before, stop_at=at("step", 8))
    workshop.train(tmp_path, *after, allow_change=[change])
    findings = workshop.verify(tmp_path, 3)
    assert findings.verdict.startswith("consistent (weaker: settings changed"), findings.difference
