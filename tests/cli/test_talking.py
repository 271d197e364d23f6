"""`generate` and `chat` from the outside."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from openelm.cli import main

Failed = Callable[..., str]


@pytest.fixture
def model(trained: Path) -> str:
    return str(trained / "model")


def generated(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(["generate", *arguments]) == 0
    out = capsys.readouterr()
    assert out.err == ""
    return out.out


def test_the_same_seed_gives_the_same_text(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = (model, "--prompt", "The king", "--max-tokens", "12", "--seed")
    first = generated(capsys, *command, "3")
    assert first.startswith("The king") and first.endswith("\n")
    assert generated(capsys, *command, "3") == first
    assert len({generated(capsys, *command, str(seed)) for seed in range(6)}) > 1


def test_a_backslash_n_in_the_prompt_is_a_new_line(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert generated(capsys, model, "--prompt", r"One\nTwo", "--max-tokens", "1").startswith("One\nTwo")


@pytest.mark.parametrize("prompt", ["", "ü 你 🦙", "</s><s>[INST]", "x" * 20])
def test_any_text_is_a_prompt(model: str, capsys: pytest.CaptureFixture[str], prompt: str) -> None:
    assert generated(capsys, model, "--prompt", prompt, "--max-tokens", "2").startswith(prompt)


def test_a_prompt_from_standard_input(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("From a pipe"))
    assert generated(capsys, model, "--prompt", "-", "--max-tokens", "2").startswith("From a pipe")


def test_a_stop_text_ends_the_text_and_is_not_shown(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    free = generated(capsys, model, "--prompt", "The", "--max-tokens", "20", "--temperature", "0")
    added = free.removeprefix("The").rstrip("\n")
    assert added
    stopped = generated(
        capsys, model, "--prompt", "The", "--max-tokens", "20", "--temperature", "0", "--stop", added[2:4]
    )
    assert stopped.rstrip("\n") == "The" + added[: added.index(added[2:4])]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", "nan"),
        ("temperature", "inf"),
        ("temperature", "-1"),
        ("top-k", "0"),
        ("top-p", "0"),
        ("top-p", "1.5"),
        ("min-p", "2"),
        ("repetition-penalty", "0"),
        ("max-tokens", "0"),
        ("stop", ""),
        ("seed", "-1"),
        ("seed", "99999999999999999999999"),
    ],
)
def test_sampling_values_out_of_range_are_exit_2(model: str, failed: Failed, option: str, value: str) -> None:
    line = failed(2, "generate", model, "--prompt", "x", f"--{option}={value}")
    assert option.replace("-", "_") in line


def test_a_prompt_longer_than_the_context_is_exit_2(model: str, failed: Failed) -> None:
    assert "context is 32" in failed(2, "generate", model, "--prompt", "word " * 200)


def test_a_device_that_is_not_there_is_exit_2(model: str, failed: Failed) -> None:
    import torch

    absent = "cuda" if torch.backends.mps.is_available() else "mps"  # no machine has both
    assert "cpu" in failed(2, "generate", model, "--prompt", "x", "--device", absent)


def test_a_chat_answers_line_by_line_until_the_input_ends(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("The king\n\n\\nA new\n" + "long " * 100 + "\n"))
    capsys.readouterr()
    assert main(["chat", model, "--max-tokens", "5", "--temperature", "0"]) == 0
    out = capsys.readouterr()
    assert out.out
    assert "Ctrl-D ends" in out.err and "Traceback" not in out.err


def test_bytes_that_are_not_text_are_no_traceback(openelm: Any, model: str) -> None:
    done = openelm("chat", model, "--max-tokens", "3", stdin=b"\xff\xfe\nThe king\n")
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode in (0, 2, 3)


def test_a_piped_prompt_that_is_not_text_is_no_traceback(openelm: Any, model: str) -> None:
    done = openelm("generate", model, "--prompt", "-", "--max-tokens", "3", stdin=b"The \xff king")
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode in (0, 2, 3)
