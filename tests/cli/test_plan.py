"""`openelm plan`: numbers, assumptions, and errors that say what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from openelm.cli import main

RECIPE = """
[model]
size = "270m"
[tokenizer]
path = "not-here.model"
[[data.sources]]
name = "text"
paths = ["nowhere"]
[train]
steps = 350_000
rows = 2048
length = 2048
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "270m.toml"
    path.write_text(RECIPE)
    return str(path)


def test_the_published_270m_run(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "plan",
        recipe,
        "--devices",
        "128",
        "--vocab-size",
        "32000",
        "--price-per-hour",
        "2.5",
        "--mfu",
        "0.4",
        "--json",
    ]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == 271_527_168 and found["tokens"] == 350_000 * 2048 * 2048
    flops = 1.827e9 * found["tokens"]  # docs/inspect.md
    assert found["days"] == pytest.approx(flops / (128 * 989.4e12 * 0.4) / 86_400, rel=1e-3)
    assert found["device_hours"] == pytest.approx(128 * 24 * found["days"])
    assert found["cost"] == pytest.approx(2.5 * found["device_hours"])
    assert found["work"]["rows"] == 16 and found["memory_bytes"]["replicated"]["weights"] == 4 * 271_527_168


def test_every_assumption_is_printed(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", recipe, "--vocab-size", "32000", "train.micro_rows=4"]) == 0
    text = capsys.readouterr().out
    for word in ("989.4 TFLOP/s", "data sheet", "MFU 0.238", "2026-11-22-h100.json", "4 bytes each", "4 rows of 2,048"):
        assert word in text
    assert "sharded" not in text.split("assumed")[0]  # one device


def test_memory_for_activations_decides_what_is_computed_again(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", recipe, "--vocab-size", "32000", "--devices", "128", "--json"]
    assert main(words) == 0
    free = json.loads(capsys.readouterr().out)
    kept = free["memory_bytes"]["replicated"]["activations"]
    assert main([*words, f"train.activation_gb={0.9 * kept / 1e9}"]) == 0
    found = json.loads(capsys.readouterr().out)
    kinds = found["work"]["recompute"]
    assert kinds.count("selective") + kinds.count("none") == 16 and 0 < kinds.count("selective") < 16
    assert 0.8 * kept < found["memory_bytes"]["replicated, recompute by layer"]["activations"] <= 0.9 * kept
    assert free["seconds"] < found["seconds"] < 1.03 * free["seconds"]
    told = f"recompute by layer: {kinds.count('selective')} selective and 0 full of 16 layers"
    assert any(line.startswith(told) for line in found["assumptions"])


def test_exact_sums_take_the_rows_of_one_shard_at_once(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train.numerics=exact", "train.shards=256"]
    assert main(["plan", recipe, "--vocab-size", "32000", "--devices", "2", "--json", *words]) == 0
    assert json.loads(capsys.readouterr().out)["work"]["rows"] == 2048 // 256


def test_a_tokenizer_that_is_not_here_is_named(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", recipe]) == 2
    assert "--vocab-size" in capsys.readouterr().err


def test_rows_that_devices_cannot_share_are_refused_with_the_next_number_that_fits(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["plan", "demo", "--devices", "3"]) == 2
    assert "train.rows=9" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--mfu", "1.5"], ["--devices", "0"], ["train.precision=fp32"]])
def test_impossible_wishes_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "demo", *words]) == 2
    assert "error[E_CONFIG]" in capsys.readouterr().err


def test_no_recipe_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan"]) == 2
    assert "--check" in capsys.readouterr().err


def test_the_demo_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "demo", "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["device"]["flops_per_second"] > 1e8 and found["parameters"] == 2_086_112
    assert found["seconds"] == pytest.approx(found["tokens"] / found["tokens_per_second"])


def test_check_shows_each_measured_run_with_its_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--check"]) == 0
    text = capsys.readouterr().out
    assert text.count("h100") >= 9 and "128,597" in text and "%" in text
    assert main(["plan", "--check", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 14
