"""The GPU's benchmarks run to their end on a CPU, in small: what they would measure is there, or said to be skipped."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


def run(*arguments: str) -> str:
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(1600)
def test_the_table_has_every_section_and_nothing_is_wrong(tmp_path: Path) -> None:
    out = run("benchmarks.gpu", "--device", "cpu", "--smoke", "--minutes", "20", "--out", str(tmp_path))
    (file,) = tmp_path.glob("*-cpu.json")
    found: dict[str, Any] = json.loads(file.read_text())
    assert all(row["ok"] for row in found["kernel_errors"])
    assert {row["kernel"] for row in found["kernel_errors"]} >= {"attention, documents", "documents, flex"}
    assert found["loss"]["ok"] and found["compiled"]["ok"]
    assert found["repeats"]["deterministic"]
    assert [row["rows"] for row in found["decode"] if row["tokens_per_second"] > 0] == [1, 3, 1, 3]
    sides = {row["side"]: row for row in found["training"]}
    assert {"ours", "ours, compiled", "baseline", "compiled, documents", "compiled, float8", "exact"} <= sides.keys()
    assert sides["ours"]["first_loss"] == pytest.approx(sides["ours, compiled"]["first_loss"], rel=0.01)
    assert "needs CUDA capability" in sides["compiled, float8"]["skipped"]
    last = out.strip().splitlines()
    assert "ours, compiled" in "".join(last[-25:])


@pytest.mark.timeout(900)
def test_decoding_is_timed_by_every_side() -> None:
    lines = run("benchmarks.gpu_decode", "--device", "cpu", "--smoke").splitlines()
    assert len(lines) == 8 and all("tokens/s" in line for line in lines)
    assert sum("recorded, compiled" in line for line in lines) == 4


@pytest.mark.timeout(900)
def test_pre_training_goes_on_when_it_is_called_again(tmp_path: Path) -> None:
    words = ["cat", "dog", "king", "river", "house", "sees", "finds", "old", "red", "quiet"]
    draw = random.Random(0)
    for name, documents in (("text", 200), ("other", 2)):
        text = "\n\n".join(" ".join(draw.choice(words) for _ in range(60)) for _ in range(documents))
        (tmp_path / f"{name}.txt").write_text(text)
    settings = ["--size", "5m", "--steps", "6", "--rows", "2", "--length", "32", "--vocab-size", "280", "--scores", "1"]
    where = ["--text", str(tmp_path / "text.txt"), "--held-out", str(tmp_path / "other.txt"), "--work", str(tmp_path)]
    usual = ["benchmarks.pretrain_gpu", *settings, *where, "--device", "cpu", "--set", "precision=fp32"]
    run(*usual, "--seconds", "0.1")
    first = json.loads((tmp_path / "pretrain.json").read_text())
    run(*usual, "--seconds", "300")
    second = json.loads((tmp_path / "pretrain.json").read_text())
    for side in ("layer-wise", "uniform"):
        assert len(first["sides"][side]["steps"]) == 1
        assert [step for step, *_ in second["sides"][side]["steps"]] == [1, 2, 3, 4, 5, 6]
        assert second["sides"][side]["held_out"][-1][0] == 6
    sizes = [found["parameters"] for found in second["sides"].values()]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)
    assert (tmp_path / "pretrain.svg").read_text().count("<path") >= 7
