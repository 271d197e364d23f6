"""A tiny trained model, made once through the command line itself."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from openelm.cli import main

TINY = (
    "model.layers=2",
    "model.dim=32",
    "model.head_dim=8",
    "model.ffn_dim_divisor=16",
    "model.context=256",  # the demo's prompt has forty characters
    "train.length=32",
    "train.rows=2",
    "train.steps=12",
    "train.precision=fp32",
    "train.device=cpu",
    "data.lanes=2",
    "data.workers=0",
    "schedule.warmup_steps=2",
    "checkpoints.every=3",
    "evaluation.every=6",
    "evaluation.max_bytes=512",
    "evaluation.sample_tokens=4",
)
_WORDS = (
    *("the", "a", "old", "red", "quiet", "small", "king", "river", "house", "storm", "garden", "letter"),
    *("finds", "loves", "fears", "and", "of", "in"),
)
_SYLLABLES = ("ba", "ce", "di", "fo", "gu", "la", "me", "ni", "or", "pu", "ra", "se", "ti", "vo", "wy")


def prose(seed: int, words: int) -> str:
    """English-like text of so many words, in sentences and paragraphs."""
    draw = random.Random(seed)
    invented = ["".join(draw.choices(_SYLLABLES, k=3)) for _ in range(20)]
    lines = [" ".join(draw.choices([*_WORDS, *invented], k=8)).capitalize() + "." for _ in range(words // 8)]
    return "\n\n".join("\n".join(lines[at : at + 4]) for at in range(0, len(lines), 4)) + "\n"


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return [prose(seed, 120) for seed in range(40)]


@pytest.fixture(scope="session")
def text_folder(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty text files."""
    folder = tmp_path_factory.mktemp("texts")
    for number, text in enumerate(texts):
        (folder / f"{number:02d}.txt").write_text(text)
    return folder


@pytest.fixture(scope="session")
def tiny() -> tuple[str, ...]:
    """Overrides that make any recipe tiny."""
    return TINY


@pytest.fixture(scope="session")
def recipe(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text(
        f"""
[model]
layers = 2
dim = 32
head_dim = 8
ffn_dim_divisor = 16
context = 32

[tokenizer]
vocab_size = 400

[data]
lanes = 2
min_characters = 1
min_tokens = 1
workers = 0

[[data.sources]]
name = "texts"
paths = [{json.dumps(str(text_folder))}]

[train]
steps = 6
rows = 2
length = 32
precision = "fp32"
device = "cpu"

[checkpoints]
every = 2
"""
    )
    return path


@pytest.fixture(scope="session")
def trained(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run folder with a model. Tests must not write to it."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert main(["train", str(recipe), "--out", str(folder)]) == 0
    assert main(["average", str(folder), "--last", "2"]) == 0
    torch.set_num_threads(threads)
    return folder


@pytest.fixture
def failed(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must fail with an exit code and one line; returns the line."""

    def run(code: int, *arguments: object) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == code
        error = capsys.readouterr().err
        assert "Traceback" not in error
        (line,) = error.splitlines()
        assert line.startswith("openelm: error[E_")
        return line

    return run


Openelm = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def openelm() -> Openelm:
    """Run the command in a process of its own."""

    def run(*arguments: object, stdin: str | bytes = "") -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "openelm", *map(str, arguments)],
            input=stdin.encode() if isinstance(stdin, str) else stdin,
            capture_output=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
            timeout=120,
        )
        return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())

    return run
