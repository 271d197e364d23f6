"""Dishonest publications: each is caught at the level that is named, and the levels below it see nothing wrong."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import openelm.train.update
from openelm.errors import DataError
from openelm.model.folder import read_tensors, write_tensors
from openelm.model.transformer import OpenELM
from openelm.optim.schedule import learning_rate
from openelm.release.probes import probes
from openelm.train.checkpoint import checkpoint_folder
from openelm.train.ledger import number
from openelm.train.run import open_run

from .conftest import Events, assert_caught, read_lines, rechain, write_corpus, write_lines


def change(folder: Path, kind: str, step: int, **fields: Any) -> None:
    """Change a line of the ledger and make every hash fit again."""

    def edit(events: Events) -> Events:
        return [{**e, **fields} if (e["event"], e["step"]) == (kind, step) else e for e in events]

    rechain(folder, edit)


def change_weights(path: Path, by: float) -> None:
    tensors = read_tensors(path)
    write_tensors(path, {name: tensor * (1 + by) for name, tensor in tensors.items()})


def publish_again(workshop: Any, folder: Path) -> None:
    """Measure the checkpoints again, write the scores into the ledger, and average: what a careful forger does."""
    config = workshop.config()
    run = open_run(folder, config)
    model = OpenELM(run.model_config)

    def edit(events: Events) -> Events:
        for event in events:
            weights = checkpoint_folder(folder, event["step"]) / "model.safetensors"
            if event["event"] in ("evaluation", "sample") and weights.exists():
                model.load_state_dict(read_tensors(weights))
                for probe in probes(run):
                    measured = probe.measure(model.eval(), event["step"])
                    event.update(measured if measured["event"] == event["event"] else {})
        return events

    rechain(folder, edit)
    workshop.publish(folder)


def test_the_forgers_tools_leave_an_honest_run_honest(workshop: Any, rewound: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(rewound, tmp_path / "run"))
    rechain(run)
    publish_again(workshop, run)
    assert workshop.verify(run, 4).verdict == "verified"


def test_01_a_loss_edited_in_its_line(workshop: Any, forged: Path) -> None:
    events = read_lines(forged)
    index = next(index for index, event in enumerate(events) if event["event"] == "step" and event["step"] == 5)
    events[index]["loss"] = (1.5).hex()
    write_lines(forged, events)
    assert_caught(workshop, forged, 0, f"line={index + 2}", "chain")


def test_02_a_loss_edited_with_the_chain_recomputed(workshop: Any, forged: Path) -> None:
    change(forged, "step", 5, loss=(1.5).hex())
    assert_caught(workshop, forged, 3, "step 5: loss", "recorded is 1.5")


def test_03_a_ledger_rewritten_with_smoother_losses(workshop: Any, forged: Path) -> None:
    def smooth(events: Events) -> Events:
        losses = [number(event["loss"]) for event in events if event["event"] == "step"]
        for event in events:
            if event["event"] == "step":
                event["loss"] = (losses[0] + (losses[-1] - losses[0]) * event["step"] / 12).hex()
        return events

    rechain(forged, smooth)
    assert_caught(workshop, forged, 3, "step 1: loss")


def test_04_the_final_weights_replaced(workshop: Any, forged: Path) -> None:
    change_weights(checkpoint_folder(forged, 12) / "model.safetensors", 0.01)
    assert_caught(workshop, forged, 0, "step-00000012", "model.safetensors", "damaged")


def test_05_the_final_weights_replaced_with_every_hash_and_score_recomputed(workshop: Any, forged: Path) -> None:
    change_weights(checkpoint_folder(forged, 12) / "model.safetensors", 0.01)
    publish_again(workshop, forged)
    assert_caught(workshop, forged, 3, "step 12: tensor", "replayed weights")


def test_06_the_end_of_another_run_spliced_in(workshop: Any, forged: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    workshop.train(other, "train.seed=1")
    for step in (9, 12):
        shutil.rmtree(checkpoint_folder(forged, step))
        shutil.copytree(checkpoint_folder(other, step), checkpoint_folder(forged, step))
    late = [event for event in read_lines(other) if event["step"] > 6]
    rechain(forged, lambda events: [event for event in events if event["step"] <= 6] + late)
    workshop.publish(forged)
    assert_caught(workshop, forged, 2, "step 7: batch_sha256")


class OtherData:
    """Gives other batches than the declared data at steps 7 to 9."""

    def __init__(self, stream: Any, *, hidden: bool) -> None:
        self._stream, self._hidden, self._step = stream, hidden, 0

    def __next__(self) -> Any:
        batch = next(self._stream)
        self._step += 1
        if not 7 <= self._step <= 9:
            return batch
        inputs, targets = (np.ascontiguousarray(part[:, ::-1]) for part in (batch.inputs, batch.targets))
        rows = bytearray().join(
            hashlib.sha256(a.tobytes() + b.tobytes()).digest() for a, b in zip(inputs, targets, strict=True)
        )
        hashes = batch.row_sha256 if self._hidden else np.frombuffer(rows, np.uint8).reshape(-1, 32)
        return dataclasses.replace(batch, inputs=inputs, targets=targets, row_sha256=hashes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def test_07_other_data_in_one_segment(workshop: Any, tmp_path: Path) -> None:
    workshop.train(tmp_path, wrap=lambda stream: OtherData(stream, hidden=False))
    assert_caught(workshop, tmp_path, 2, "step 7: batch_sha256")


def test_08_other_data_with_the_declared_hashes(workshop: Any, tmp_path: Path) -> None:
    workshop.train(tmp_path, wrap=lambda stream: OtherData(stream, hidden=True))
    assert_caught(workshop, tmp_path, 3, "step 7: ")
    not_drawn = workshop.verify(tmp_path, 3, segments=0)
    assert not_drawn.verdict == "verified"
    assert any("1 of 4 segments" in note.what for note in not_drawn.not_checked)
    assert workshop.verify(tmp_path, 4).verdict == "failed"


def test_09_a_better_score_in_the_ledger(workshop: Any, forged: Path) -> None:
    change(forged, "evaluation", 12, bits_per_byte=(1.0).hex())
    assert_caught(workshop, forged, 1, "step 12: bits_per_byte", "recorded is 1 ")


def test_09_a_better_score_at_a_step_without_a_checkpoint(workshop: Any, tmp_path: Path) -> None:
    workshop.train(tmp_path, "evaluation.every=4")
    change(tmp_path, "evaluation", 4, bits_per_byte=(1.0).hex())
    assert_caught(workshop, tmp_path, 3, "step 4: bits_per_byte", "recorded is 1 ")


@pytest.mark.parametrize("value", [1.0, float("nan"), "1.0", None])
@pytest.mark.parametrize(
    ("name", "key"), [("eval/final.json", "bits_per_byte"), ("result.json", "held_out_bits_per_byte")]
)
def test_09_a_better_score_of_the_published_model(
    workshop: Any, forged: Path, name: str, key: str, value: object
) -> None:
    content = json.loads((forged / name).read_bytes())
    content[key]["value"] = value
    (forged / name).write_text(json.dumps(content))
    assert_caught(workshop, forged, 1, name, "value", repr(value))


def drop(forbidden: Callable[[dict[str, Any]], bool]) -> Callable[[Events], Events]:
    """Leave out the lines after the rewind for which this holds, or the rewind itself."""

    def edit(events: Events) -> Events:
        place = next(index for index, event in enumerate(events) if event["event"] == "rewind")
        return events[:place] + [event for event in events[place:] if not forbidden(event)]

    return edit


def test_10_lines_removed_after_a_rewind(workshop: Any, rewound: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(rewound, tmp_path / "run"))
    write_lines(run, drop(lambda event: event["event"] == "resume" or event["step"] == 7)(read_lines(run)))
    assert_caught(workshop, run, 0, "chain")


@pytest.mark.parametrize("gone", [{"resume"}, {"step"}, {"resume", "step"}])
def test_10_lines_removed_after_a_rewind_with_the_chain_recomputed(
    workshop: Any, rewound: Path, tmp_path: Path, gone: set[str]
) -> None:
    run = Path(shutil.copytree(rewound, tmp_path / "run"))
    rechain(run, drop(lambda event: event["event"] in gone and event["step"] <= 7))
    assert_caught(workshop, run, 0, "ledger.jsonl", "lines are missing or were added")


@pytest.mark.parametrize("gone", [{"rewind"}, {"rewind", "resume"}])
def test_11_the_rewind_removed_with_the_chain_recomputed(
    workshop: Any, rewound: Path, tmp_path: Path, gone: set[str]
) -> None:
    run = Path(shutil.copytree(rewound, tmp_path / "run"))
    rechain(run, drop(lambda event: event["event"] in gone))
    assert_caught(workshop, run, 0, "ledger.jsonl", "lines are missing or were added")


def test_12_two_checkpoints_swapped(workshop: Any, forged: Path) -> None:
    first, second, aside = checkpoint_folder(forged, 6), checkpoint_folder(forged, 9), forged / "aside"
    first.rename(aside)
    second.rename(first)
    aside.rename(second)
    assert_caught(workshop, forged, 0, "step-00000006", "step is")


def test_13_another_learning_rate_than_the_declared_one(
    workshop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(openelm.train.update, "learning_rate", lambda *arguments: 2 * learning_rate(*arguments))
        workshop.train(tmp_path)

    def declare(events: Events) -> Events:
        for event in events:
            if event["event"] == "step":
                event["learning_rate"] = (number(event["learning_rate"]) / 2).hex()
        return events

    rechain(tmp_path, declare)
    assert_caught(workshop, tmp_path, 3, "step 2: ")


def test_14_a_run_that_started_from_other_weights_than_the_seeds(
    workshop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = OpenELM.initial_weights
    with monkeypatch.context() as patch:
        patch.setattr(OpenELM, "initial_weights", lambda self, draw: honest(self, torch.Generator().manual_seed(99)))
        workshop.train(tmp_path)
    assert_caught(workshop, tmp_path, 3, "step 1: ")


def test_16_a_flipped_bit_in_an_optimizer(workshop: Any, forged: Path) -> None:
    file = checkpoint_folder(forged, 9) / "optimizer.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert_caught(workshop, forged, 0, "step-00000009", "optimizer.safetensors", "first in bytes", "exp_avg")


def test_16_a_flipped_bit_in_an_optimizer_with_the_hashes_recomputed(workshop: Any, forged: Path) -> None:
    file = checkpoint_folder(forged, 9) / "optimizer.safetensors"
    tensors = read_tensors(file)
    name = sorted(name for name in tensors if name.endswith("exp_avg"))[0]
    tensors[name].view(-1)[0] *= -1
    write_tensors(file, tensors)
    rechain(forged)
    assert_caught(workshop, forged, 3, f"step 9: tensor {name}", "replayed moments")


@pytest.mark.parametrize(
    ("table", "key", "value"), [("schedule", "peak", 0.02), ("train", "seed", 3), ("train", "steps", 10**9)]
)
def test_17_settings_changed_in_the_description_of_the_run(
    workshop: Any, forged: Path, table: str, key: str, value: Any
) -> None:
    description = json.loads((forged / "run.json").read_bytes())
    description["config"][table][key] = value
    (forged / "run.json").write_text(json.dumps(description))
    assert_caught(workshop, forged, 0, "run.json" if key != "steps" else "finish at step 12")


def test_17_settings_changed_with_the_chain_recomputed(workshop: Any, forged: Path) -> None:
    description = json.loads((forged / "run.json").read_bytes())
    description["config"]["optimizer"]["beta1"] = 0.91
    (forged / "run.json").write_text(json.dumps(description))
    rechain(forged)
    assert_caught(workshop, forged, 3, "step 3: ")


def test_18_a_skipped_update_that_is_not_told(workshop: Any, tmp_path: Path) -> None:
    settings = ("train.steps=36", "train.on_spike=skip", "train.spike_sigmas=0.01", "schedule.peak=0.0001")
    workshop.train(tmp_path, *settings, "checkpoints.every=36", "evaluation.every=36")
    skip = next(event["step"] for event in read_lines(tmp_path) if event["event"] == "skip")
    rechain(tmp_path, lambda events: [event for event in events if event["event"] != "skip"])
    assert_caught(workshop, tmp_path, 3, f"step {skip}: events", "skip")


def test_18_a_checkpoint_that_hides_a_change_behind_a_link(workshop: Any, forged: Path) -> None:
    folder = checkpoint_folder(forged, 9)
    folder.rename(forged / "elsewhere")
    os.symlink(forged / "elsewhere", folder)
    assert_caught(workshop, forged, 0, "step-00000009", "link")


def test_18_counters_changed_in_a_checkpoint(workshop: Any, forged: Path) -> None:
    path = checkpoint_folder(forged, 6) / "state.json"
    state = json.loads(path.read_bytes())
    path.write_text(json.dumps({**state, "recent_losses": [(9.0).hex()] * 6}))
    rechain(forged)
    assert_caught(workshop, forged, 3, "step 6: recent_losses")


def test_18_cursors_changed_in_a_checkpoint(workshop: Any, forged: Path) -> None:
    early = json.loads((checkpoint_folder(forged, 6) / "state.json").read_bytes())
    path = checkpoint_folder(forged, 9) / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), "cursors": early["cursors"]}))
    rechain(forged)
    assert_caught(workshop, forged, 2, "step 9: cursors")


def test_19_a_lie_above_the_tolerance_is_caught_where_numerics_differ(workshop: Any, forged: Path) -> None:
    def elsewhere(events: Events) -> Events:
        for event in events:
            if event["event"] == "start":
                event["environment"]["torch"] = "1.0"
        return events

    rechain(forged, elsewhere)
    findings = workshop.verify(forged, 3)
    assert findings.verdict == "consistent (weaker: other numerics)"
    assert any(reason.startswith("torch: 1.0 there") for reason in findings.to_json()["numerics"]["differences"])
    loss = next(e["loss"] for e in read_lines(forged) if e["event"] == "step" and e["step"] == 7)
    change(forged, "step", 7, loss=(number(loss) * 0.99).hex())
    assert workshop.verify(forged, 3, segments=99).verdict == "failed"


def test_a_learning_rate_of_another_c_library_is_within_the_tolerances(workshop: Any, forged: Path) -> None:
    """The cosine of the schedule differs in its last bit between C libraries, and between CPUs with and without FMA."""

    def elsewhere(events: Events) -> Events:
        for event in events:
            if event["event"] == "start":
                event["environment"]["torch"] = "1.0"
            if event["event"] == "step":
                event["learning_rate"] = np.nextafter(number(event["learning_rate"]), 1).hex()
        return events

    rechain(forged, elsewhere)
    assert workshop.verify(forged, 3).verdict == "consistent (weaker: other numerics)"


def test_other_data_on_the_verifiers_disk_is_named_and_is_no_verdict(
    workshop: Any, honest: Path, tmp_path: Path
) -> None:
    write_corpus(tmp_path / "text.jsonl", 1, 50)
    shutil.copy(workshop.held_out, tmp_path)
    with pytest.raises(DataError, match=r"text\.jsonl has SHA-256") as caught:
        workshop.verify(honest, 2, data=[(str(workshop.folder), str(tmp_path))])
    assert "--data OLD=NEW" in str(caught.value)
