"""`openelm tune`, from a folder and examples to a tuned model: resumed, repeated and verified to the bit."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from openelm.adapters.adapter import load_adapter
from openelm.cli.main import main
from openelm.files.published import write_manifest
from openelm.model.folder import (
    is_chat_tuned,
    load_model,
    read_tensors,
    save_model,
    weights_sha256,
    write_tensors,
)
from openelm.release.verify import verify_run
from openelm.text.tokenizer import ByteTokenizer
from openelm.train.checkpoint import checkpoint_folder, load_checkpoint
from openelm.train.ledger import Ledger, read_ledger, valid_events

from ..conftest import save_tiny_base

QUIET = [
    "train.device=cpu",
    "train.precision=fp32",
    "train.length=96",
    "train.rows=4",
    "train.micro_rows=2",
    "train.steps=6",
    "checkpoints.every=2",
    "evaluation.every=3",
]
METHODS = {
    "sft": [],
    "lora": ["adapter.rank=2", "adapter.dropout=0.3", "schedule.peak=0.01"],
    "dora": ["adapter.rank=2", "adapter.targets=['qkv_proj','proj_2']"],
    "dpo": ["tune.prompt_tokens=16", "schedule.peak=0.001"],
}


class Interrupted(Exception):
    """What pulls the plug."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("examples")
    numbers = range(12)
    shapes: dict[str, Callable[[int], Any]] = {
        "chats": lambda n: {
            "messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"It is {n}."}]
        },
        "pairs": lambda n: {"prompt": f"{n} is ", "chosen": f"number {n}", "rejected": f"no {n + 1}"},
        "text": lambda n: {"text": f"Number {n} comes before number {n + 1}, as everybody knows."},
    }
    found = {}
    for name, shape in shapes.items():
        found[name] = folder / f"{name}.jsonl"
        found[name].write_text("".join(json.dumps(shape(number)) + "\n" for number in numbers))
    return found


@pytest.fixture
def tune(base: Path, examples: Mapping[str, Path]) -> Callable[..., int]:
    def run(method: str, out: Path, *more: str, leave_out: str = "") -> int:
        settings = [word for word in QUIET if not leave_out or not word.startswith(leave_out)]
        data = examples["pairs" if method == "dpo" else "chats"]
        words = ["tune", "--method", method, "--model", str(base), "--data", str(data), "--held-out", str(data)]
        return main([*words, "--text", str(examples["text"]), "--out", str(out), *settings, *METHODS[method], *more])

    return run


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in valid_events(read_ledger(run / "ledger.jsonl")) if event["event"] == kind]


def history(run: Path) -> list[tuple[Any, ...]]:
    names = ("step", "loss", "gradient_norm", "batch_sha256", "target_tokens", "learning_rate")
    return [tuple(event[name] for name in names) for event in events(run, "step")]


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_goes_on_to_the_same_bits(
    tune: Callable[..., int], tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tune(method, tmp_path / "whole") == 0
    plain = Ledger.append

    def append(ledger: Ledger, event: Mapping[str, Any]) -> None:
        plain(ledger, event)
        if event["event"] == "step" and event["step"] == 5:
            raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "append", append)
        with pytest.raises(Interrupted):
            tune(method, tmp_path / "cut")
    assert tune(method, tmp_path / "cut") == 0
    assert history(tmp_path / "cut") == history(tmp_path / "whole")
    last = [load_checkpoint(tmp_path / name, 6) for name in ("whole", "cut")]
    assert weights_sha256(last[0].weights) == weights_sha256(last[1].weights)
    assert weights_sha256(last[0].optimizer) == weights_sha256(last[1].optimizer)


def test_a_run_that_begins_again_is_measured_again_and_once(
    tune: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Ledger.append

    def append(ledger: Ledger, event: Mapping[str, Any]) -> None:
        plain(ledger, event)
        if event["event"] == "step":
            raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "append", append)
        with pytest.raises(Interrupted):
            tune("sft", tmp_path / "run", "evaluation.prompts=['1']")
    assert tune("sft", tmp_path / "run", "evaluation.prompts=['1']") == 0
    for kind in ("evaluation", "examples", "sample"):
        assert [event["step"] for event in events(tmp_path / "run", kind)] == [0, 3, 6]
    assert verify_run(tmp_path / "run", level=4, segments=1, seed=0).difference is None


@pytest.mark.parametrize("method", METHODS)
def test_a_stranger_verifies_a_tuned_run_by_doing_it_again(
    tune: Callable[..., int], tmp_path: Path, method: str
) -> None:
    assert tune(method, tmp_path / "run") == 0
    findings = verify_run(tmp_path / "run", level=4, segments=1, seed=0)
    assert findings.difference is None


def test_a_forged_loss_of_a_tuned_run_is_found(tune: Callable[..., int], tmp_path: Path) -> None:
    assert tune("dpo", tmp_path / "run", "schedule.peak=0.002") == 0
    description = json.loads((tmp_path / "run/run.json").read_text())
    assert description["config"]["schedule"]["peak"] == 0.002
    lines = (tmp_path / "run/ledger.jsonl").read_text()
    forged = re.sub(r'("preference_margin": ")[^"]+', r"\g<1>0x1.8p+1", lines, count=1)
    assert forged != lines
    (tmp_path / "run/ledger.jsonl").write_text(forged)
    assert verify_run(tmp_path / "run", level=0, segments=0, seed=0).difference is not None


def test_another_base_under_the_same_name_is_refused(
    tune: Callable[..., int], tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "base"
    shutil.copytree(base, own)
    more = ["--model", str(own)]
    assert tune("lora", tmp_path / "run", *more, "train.steps=2") == 0
    other = load_model(own)
    with torch.no_grad():
        other.transformer.norm.weight[0] += 1
    save_model(own, other, tokenizer=ByteTokenizer(), replace=True)
    capsys.readouterr()
    assert tune("lora", tmp_path / "run", *more, "train.steps=4", "--allow-change", "train.steps") == 2
    assert "base_sha256" in capsys.readouterr().err


def test_a_base_in_the_place_of_the_tuned_model_is_not_overwritten(
    tune: Callable[..., int], tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "run/model"
    shutil.copytree(base, own)
    before = (own / "model.safetensors").read_bytes()
    assert tune("sft", tmp_path / "run", "--model", str(own)) == 2
    assert "take the place of its base" in capsys.readouterr().err
    assert (own / "model.safetensors").read_bytes() == before and not (tmp_path / "run/run.json").exists()
    assert tune("lora", tmp_path / "other", "--model", str(own), "train.steps=2") == 0
    assert main(["average", str(tmp_path / "other"), "--last", "1", "--out", str(tmp_path / "run")]) == 2
    assert (own / "model.safetensors").read_bytes() == before


def test_an_adapters_checkpoint_holds_nothing_of_the_base(tune: Callable[..., int], tmp_path: Path) -> None:
    assert tune("lora", tmp_path / "run") == 0
    names = load_checkpoint(tmp_path / "run", 6).weights.keys()
    assert names and all(".lora_" in name for name in names)
    assert (checkpoint_folder(tmp_path / "run", 6) / "model.safetensors").stat().st_size < 60_000


def test_the_published_adapter_is_the_last_checkpoint_on_the_base(
    tune: Callable[..., int], tmp_path: Path, base: Path
) -> None:
    assert tune("lora", tmp_path / "run") == 0
    model = load_model(base)
    load_adapter(model, tmp_path / "run/adapter")
    state = model.state_dict()
    checkpoint = load_checkpoint(tmp_path / "run", 6).weights
    assert all(torch.equal(state[name], value) for name, value in checkpoint.items())


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_an_exchanged_adapter_is_found_and_a_merge_into_the_run_is_no_fault(
    tune: Callable[..., int], tmp_path: Path, base: Path, method: str
) -> None:
    run = tmp_path / "run"
    assert tune(method, run) == 0
    assert main(["adapter", "merge", str(run / "adapter"), "-o", str(run / "model")]) == 0
    assert verify_run(run, level=0, segments=0, seed=0).difference is None
    weights = run / "adapter/adapter_model.safetensors"
    tensors = read_tensors(weights)
    name = next(name for name in tensors if name.endswith("lora_B.weight"))
    tensors[name][0, 0] += 1
    write_tensors(weights, tensors)
    write_manifest(run / "adapter")
    difference = verify_run(run, level=0, segments=0, seed=0).difference
    assert difference is not None and name in str(difference)


def test_an_adapter_that_learned_chats_is_merged_into_a_model_that_did(
    tune: Callable[..., int], tmp_path: Path
) -> None:
    assert tune("lora", tmp_path / "run") == 0
    assert main(["adapter", "merge", str(tmp_path / "run/adapter"), "-o", str(tmp_path / "merged")]) == 0
    assert is_chat_tuned(tmp_path / "merged")


def test_an_adapter_is_not_published_for_a_base_that_changed_since(
    tune: Callable[..., int], tmp_path: Path, base: Path
) -> None:
    own = tmp_path / "base"
    shutil.copytree(base, own)
    assert tune("lora", tmp_path / "run", "--model", str(own), "train.steps=2") == 0
    other = load_model(own)
    with torch.no_grad():
        other.transformer.norm.weight[0] += 1
    save_model(own, other, tokenizer=ByteTokenizer(), replace=True)
    assert main(["average", str(tmp_path / "run"), "--last", "1"]) == 4


def test_a_folder_called_like_a_recipe_is_not_taken_for_it(
    tune: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tune-lora").mkdir()
    assert tune("lora", tmp_path / "run", "train.steps=2") == 0


def test_a_model_that_learned_chats_is_published_as_one(tune: Callable[..., int], tmp_path: Path, base: Path) -> None:
    assert tune("sft", tmp_path / "run") == 0
    assert is_chat_tuned(tmp_path / "run/model") and not is_chat_tuned(base)


def test_everything_is_measured_before_and_after(tune: Callable[..., int], tmp_path: Path, base: Path) -> None:
    assert tune("dpo", tmp_path / "run", "evaluation.prompts=['1 is ']", "evaluation.questions=['2?']") == 0
    assert [event["step"] for event in events(tmp_path / "run", "evaluation")] == [0, 3, 6]
    first, *_, last = events(tmp_path / "run", "examples")
    assert float.fromhex(first["preference_margin"]) == pytest.approx(0, abs=1e-6)  # the model is still the base
    assert float.fromhex(last["preference_accuracy"]) > 0.5
    questions = [event.get("question") for event in events(tmp_path / "run", "sample")]
    assert questions.count("2?") == questions.count(None) == 3
    page = (tmp_path / "run/report.html").read_text()
    assert "Before and after" in page and "chosen answer preferred" in page


def test_a_suite_is_answered_before_meanwhile_and_after_as_openelm_eval_answers_it(
    tune: Callable[..., int], tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    questions = tmp_path / "questions.jsonl"
    rows = ({"query": f"{n} is ", "choices": [f"number {n}", f"no {n + 1}"], "gold": 0} for n in range(20))
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    suite = f"choices:{questions}"
    more = ["--suite", suite, "evaluation.suites.every=4", "evaluation.suites.limit=12"]
    assert tune("dpo", tmp_path / "run", *more) == 0
    found = events(tmp_path / "run", "suite")
    assert [(event["step"], event["suite"]) for event in found] == [(step, suite) for step in (0, 4, 6)]
    for event, folder in ((found[0], base), (found[2], tmp_path / "run/model")):
        capsys.readouterr()
        asked = ["--suite", suite, "--limit", "12", "--json", "--device", "cpu", "--out", str(tmp_path / folder.name)]
        assert main(["eval", str(folder), *asked]) == 0
        (task,) = json.loads(capsys.readouterr().out)["tasks"]
        (recorded,) = event["tasks"]
        assert float.fromhex(recorded["value"]) == task["value"] and len(recorded["values"]) == task["n"] == 12
        assert recorded["questions_sha256"] == task["questions_sha256"]
    assert "questions (acc" in (tmp_path / "run/report.html").read_text()


def test_dpo_starts_at_the_loss_of_a_model_that_is_its_own_reference(tune: Callable[..., int], tmp_path: Path) -> None:
    assert tune("dpo", tmp_path / "run", "train.steps=1") == 0
    (step,) = events(tmp_path / "run", "step")
    assert float.fromhex(step["loss"]) == pytest.approx(0.693147, abs=1e-5)


def test_an_adapter_is_trained_on_a_quantised_base_which_stays_as_it_is(
    tune: Callable[..., int], tmp_path: Path, base: Path
) -> None:
    packed = tmp_path / "packed"
    assert main(["quantize", str(base), "-o", str(packed), "--bits", "4", "--group", "32"]) == 0
    before = (packed / "model.safetensors").read_bytes()
    assert tune("lora", tmp_path / "run", "--model", str(packed)) == 0
    losses = [float.fromhex(event["loss"]) for event in events(tmp_path / "run", "step")]
    assert losses[-1] < losses[0]
    assert (packed / "model.safetensors").read_bytes() == before
    assert verify_run(tmp_path / "run", level=4, segments=1, seed=0).difference is None


def test_the_whole_of_a_quantised_model_is_not_trained(
    tune: Callable[..., int], tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = tmp_path / "packed"
    assert main(["quantize", str(base), "-o", str(packed), "--bits", "8", "--group", "32"]) == 0
    assert tune("sft", tmp_path / "run", "--model", str(packed)) == 2
    assert "--adapter" in capsys.readouterr().err


def test_preferences_are_learned_by_an_adapter_too(tune: Callable[..., int], tmp_path: Path) -> None:
    assert tune("dpo", tmp_path / "run", "--adapter", "dora", "adapter.rank=2", "schedule.peak=0.01") == 0
    config = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert config["use_dora"] is True and config["r"] == 2
    first, *_, last = events(tmp_path / "run", "examples")
    assert float.fromhex(last["loss"]) < float.fromhex(first["loss"])


def test_epochs_become_steps(tune: Callable[..., int], tmp_path: Path) -> None:
    more = ["--epochs", "1.5", "train.rows=8"]
    assert tune("sft", tmp_path / "run", *more, leave_out="train.steps") == 0
    config = json.loads((tmp_path / "run/run.json").read_text())["config"]
    assert config["train"]["steps"] == 3  # 12 examples one and a half times, 8 a step, rounded up
    assert config["tune"]["epochs"] == 1.5


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("train.document_mask=false", "must not see each other"),
        ("data.exclude_documents=list.jsonl", "data.exclude_documents"),
        ("data.packing=apple", "data.packing"),
        ('evaluation.suites={ names = ["bpb:texts"] }', "--text"),
    ],
)
def test_settings_that_would_be_missed_in_silence_are_refused(
    tune: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, said: str
) -> None:
    assert tune("sft", tmp_path / "run", setting) == 2
    assert said in capsys.readouterr().err


def test_a_recipes_rows_are_as_short_as_the_context_of_the_base_asks_for(
    tune: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune("sft", tmp_path / "run", leave_out="train.length") == 0
    config = json.loads((tmp_path / "run/run.json").read_text())["config"]
    assert config["train"]["length"] == 128
    assert tune("sft", tmp_path / "asked", "train.length=256") == 2
    assert "128" in capsys.readouterr().err


def test_bad_rows_stop_the_run_or_are_counted_in_its_ledger(
    tune: Callable[..., int], tmp_path: Path, examples: Mapping[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(examples["chats"].read_text() + '{"messages": []}\n{"no": "example"}\n')
    assert tune("sft", tmp_path / "strict", "--data", str(bad)) == 3
    assert "bad.jsonl" in (said := capsys.readouterr().err) and "line=13" in said
    assert tune("sft", tmp_path / "lenient", "--data", str(bad), "data.on_bad_row=skip") == 0
    (start,) = events(tmp_path / "lenient", "start")
    assert sum(start["examples"]["dropped"]["examples"].values()) == 2 and start["examples"]["count"] == 12
    (listed,) = events(tmp_path / "lenient", "bad_rows")
    assert listed["count"] == 2 and [row["line"] for row in listed["rows"]] == [13, 14]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tune", "--out", "x"], "either a recipe or a --method"),
        (["tune", "--method", "sft", "--out", "x", "--data", "y"], "--model"),
        (["tune", "--method", "sft", "--out", "x", "--model", "y"], "--data"),
        (["tune", "demo", "--out", "x"], "does not tune"),
        (["tune", "--method", "lora", "--adapter", "dora", "--out", "x"], "two adapters"),
    ],
)
def test_what_is_missing_is_said(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) in (2, 3, 4)
    assert said in capsys.readouterr().err
