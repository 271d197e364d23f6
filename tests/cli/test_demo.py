"""`openelm demo` from text to a talking model, whatever interrupts it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from openelm.cli import main
from openelm.files.published import verify_folder
from openelm.model.folder import load_model, weights_sha256
from openelm.train.ledger import read_ledger, valid_events

KEYS = {
    "parameters",
    "train_seconds",
    "tokens_per_second",
    "mfu",
    "held_out_bits_per_byte",
    "baselines",
    "final_weights_sha256",
    "model_folder",
}


def demo(tiny: tuple[str, ...], text: Path, out: Path, *more: str) -> dict[str, Any]:
    assert main(["demo", "--text", str(text), "--out", str(out), *more, *tiny]) == 0
    result: dict[str, Any] = json.loads((out / "result.json").read_bytes())
    return result


@pytest.fixture(scope="module")
def finished(
    tiny: tuple[str, ...], text_folder: Path, one_thread: None, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "run"
    demo(tiny, text_folder, folder)
    return folder


def result_of(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "result.json").read_bytes())
    return values


def test_the_result_has_every_number(finished: Path) -> None:
    result = result_of(finished)
    assert result.keys() >= KEYS
    score = result["held_out_bits_per_byte"]
    assert score.keys() >= {"value", "low", "high", "documents"}
    assert score["documents"] == 2, "one in twenty"
    assert 0 < score["value"] < 9
    assert result["train_seconds"] > 0 and result["tokens_per_second"] > 0 and result["mfu"] >= 0
    assert result["baselines"] and all(row["bits_per_byte"] > 0 for row in result["baselines"])


def test_the_model_folder_is_the_one_of_the_result(finished: Path) -> None:
    result = result_of(finished)
    folder = Path(result["model_folder"])
    verify_folder(folder)
    model = load_model(folder)
    assert weights_sha256(model.state_dict()) == result["final_weights_sha256"]
    assert sum(parameter.numel() for parameter in model.parameters()) == result["parameters"]


def test_the_report_and_the_evaluation_are_written(finished: Path) -> None:
    assert "finished" in (finished / "report.html").read_text()
    final = json.loads((finished / "eval" / "final.json").read_bytes())
    assert final["bits_per_byte"]["value"] == result_of(finished)["held_out_bits_per_byte"]["value"]


def test_held_out_documents_are_never_trained_on(finished: Path, texts: list[str]) -> None:
    train, held_out = (
        [json.loads(line)["text"] for line in (finished / "text" / name).read_text().splitlines()]
        for name in ("train.jsonl", "held-out.jsonl")
    )
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(texts)


def test_a_finished_demo_again_gives_the_same_result(finished: Path, tiny: tuple[str, ...], text_folder: Path) -> None:
    before = result_of(finished)
    assert demo(tiny, text_folder, finished) == before


def test_jsonl_and_parquet_give_the_same_model_as_text_files(
    finished: Path, tiny: tuple[str, ...], texts: list[str], tmp_path: Path
) -> None:
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    pq.write_table(pa.table({"text": texts}), tmp_path / "texts.parquet")
    expected = result_of(finished)["final_weights_sha256"]
    for name in ("texts.jsonl", "texts.parquet"):
        result = demo(tiny, tmp_path / name, tmp_path / name.replace(".", "-"))
        assert result["final_weights_sha256"] == expected


def test_other_text_for_the_same_folder_is_refused(
    finished: Path, tiny: tuple[str, ...], text_folder: Path, tmp_path: Path, failed: Callable[..., str]
) -> None:
    """Otherwise a user who gives better text the second time gets the old model without a word."""
    demo(tiny, text_folder, tmp_path / "run")
    (tmp_path / "other").mkdir()
    for path in list(text_folder.iterdir())[:20]:
        (tmp_path / "other" / path.name).write_text(path.read_text().upper())
    assert main(["demo", "--text", str(tmp_path / "other"), "--out", str(tmp_path / "run"), *tiny]) in (2, 3)


def test_a_demo_broken_off_between_the_last_save_and_its_last_line_goes_on(
    finished: Path, tiny: tuple[str, ...], text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from openelm.train.progress import ProgressDisplay

    class Interrupted(Exception):
        pass

    usual = ProgressDisplay.__call__

    def interrupt(self: Any, event: Any) -> None:
        usual(self, event)
        if event["event"] == "checkpoint" and event["step"] == 12:
            raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(ProgressDisplay, "__call__", interrupt)
        with pytest.raises(Interrupted):
            main(["demo", "--text", str(text_folder), "--out", str(tmp_path), *tiny])
    assert demo(tiny, text_folder, tmp_path)["final_weights_sha256"] == result_of(finished)["final_weights_sha256"]


@pytest.mark.parametrize("step", [5, 11])
def test_a_demo_stopped_by_a_signal_ends_with_the_same_weights(
    finished: Path,
    tiny: tuple[str, ...],
    text_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    step: int,
) -> None:
    from openelm.train.progress import ProgressDisplay

    usual = ProgressDisplay.__call__

    def stop(self: Any, event: Any) -> None:
        usual(self, event)
        if event["event"] == "step" and event["step"] == step:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(ProgressDisplay, "__call__", stop)
        assert main(["demo", "--text", str(text_folder), "--out", str(tmp_path), *tiny]) == 75
    assert "everything is saved" in capsys.readouterr().err
    assert demo(tiny, text_folder, tmp_path)["final_weights_sha256"] == result_of(finished)["final_weights_sha256"]


def test_a_demo_killed_in_the_middle_ends_with_the_same_weights(
    finished: Path, tiny: tuple[str, ...], text_folder: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "openelm", "demo", "--text", str(text_folder), "--out", str(tmp_path), *tiny]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    ledger, limit = tmp_path / "ledger.jsonl", time.monotonic() + 120
    while process.poll() is None and time.monotonic() < limit:
        if ledger.exists() and ledger.read_bytes().count(b'"event": "step"') >= 5:
            break
        time.sleep(0.0005)
    process.kill()
    process.wait()
    assert not (tmp_path / "result.json").exists()
    assert demo(tiny, text_folder, tmp_path)["final_weights_sha256"] == result_of(finished)["final_weights_sha256"]
    steps = [event["step"] for event in valid_events(read_ledger(ledger)) if event["event"] == "step"]
    assert steps == list(range(1, 13))


def test_another_seed_gives_another_model(
    finished: Path, tiny: tuple[str, ...], text_folder: Path, tmp_path: Path
) -> None:
    result = demo(tiny, text_folder, tmp_path, "--seed", "1")
    assert result["final_weights_sha256"] != result_of(finished)["final_weights_sha256"]


def test_the_uniform_model_is_one_more_row(tiny: tuple[str, ...], text_folder: Path, tmp_path: Path) -> None:
    result = demo(tiny, text_folder, tmp_path, "--compare-uniform")
    assert "uniform layers" in [row["name"] for row in result["baselines"]]


def test_one_file_of_prose_is_cut_into_documents(tiny: tuple[str, ...], texts: list[str], tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("\n".join(texts))
    assert demo(tiny, tmp_path / "book.txt", tmp_path / "run")["held_out_bits_per_byte"]["value"] > 0


def test_a_small_text_with_many_characters_works_as_it_is(tiny: tuple[str, ...], tmp_path: Path) -> None:
    """A hundred different letters in 100 KB of text are an ordinary language, not a user's mistake."""
    import random

    draw = random.Random(0)
    letters = [chr(code) for code in (*range(0x410, 0x450), *range(0x3B1, 0x3CA), *range(97, 123))]
    words = ["".join(draw.choices(letters, k=5)) for _ in range(300)]
    (tmp_path / "texts").mkdir()
    for at in range(10):
        (tmp_path / "texts" / f"{at}.txt").write_text(" ".join(draw.choices(words, k=500)) + "\n")
    assert demo(tiny, tmp_path / "texts", tmp_path / "run")


def test_a_small_text_of_few_words_works_as_it_is(tiny: tuple[str, ...], tmp_path: Path) -> None:
    """Twenty kilobytes of a log, say: it has fewer pieces than an ordinary text of its size."""
    import random

    draw = random.Random(0)
    words = ["started", "stopped", "request", "answer", "error", "at", "by", "the", "server", "client", "of", "line"]
    (tmp_path / "texts").mkdir()
    for at in range(10):
        (tmp_path / "texts" / f"{at}.txt").write_text(" ".join(draw.choices(words, k=300)) + "\n")
    assert demo(tiny, tmp_path / "texts", tmp_path / "run")


def test_documents_that_are_all_alike_are_a_clear_error(
    tiny: tuple[str, ...], texts: list[str], tmp_path: Path, failed: Callable[..., str]
) -> None:
    (tmp_path / "same.jsonl").write_text((json.dumps({"text": texts[0]}) + "\n") * 30)
    line = failed(3, "demo", "--text", tmp_path / "same.jsonl", "--out", tmp_path / "run", *tiny)
    assert "train.jsonl" not in line, "the user never heard of this file"


def test_the_model_is_exported_where_that_was_asked_for(
    tiny: tuple[str, ...], text_folder: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):  # the second time replaces the first
        demo(tiny, text_folder, finished, "--export", "all")
    assert set(os.listdir(finished / "export")) == {"hf", "mlx", "gguf", "onnx", "corenet"}
    expected = weights_sha256(load_model(finished / "model").state_dict())
    for name in ("hf", "mlx"):
        verify_folder(finished / "export" / name)
        assert weights_sha256(load_model(finished / "export" / name).state_dict()) == expected
    assert "export/gguf: docs/gguf.md says what reads it" in capsys.readouterr().out
