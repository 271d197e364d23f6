"""`generate` and `chat` from the outside."""

from __future__ import annotations

import io
import json
import re
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
        ("presence-penalty", "2.5"),
        ("frequency-penalty", "-3"),
        ("logit-bias", "65"),
        ("logit-bias", "65=101"),
        ("logit-bias", "100000=1"),
        ("top-logprobs", "21"),
        ("max-tokens", "0"),
        ("stop", ""),
        ("seed", "-1"),
        ("seed", "99999999999999999999999"),
    ],
)
def test_sampling_values_out_of_range_are_exit_2(model: str, failed: Failed, option: str, value: str) -> None:
    line = failed(2, "generate", model, "--prompt", "x", f"--{option}={value}")
    assert option.replace("-", "_") in line


def test_penalties_and_biases_change_the_text(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = (model, "--prompt", "The king", "--max-tokens", "20", "--temperature", "0")
    plain = generated(capsys, *command)
    assert generated(capsys, *command, "--presence-penalty=2") != plain
    assert generated(capsys, *command, "--frequency-penalty", "2") != plain
    ids = [token_id for token_id in range(3, 300) if token_id != ord("q") + 3]
    banned = [f"--logit-bias={token_id}=-100" for token_id in ids]
    assert generated(capsys, *command, "--logit-bias", f"{ord('q') + 3}=100", *banned).endswith(20 * "q" + "\n")


def test_the_likeliest_tokens_are_listed_on_standard_error(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    command = ["generate", model, "--prompt", "The", "--max-tokens", "3", "--temperature", "0", "--top-logprobs", "2"]
    assert main(command) == 0
    lines = [line.split("\t") for line in capsys.readouterr().err.splitlines()]
    assert len(lines) == 3
    assert all(len(words) == 3 and words[0] == words[1] for words in lines)  # greedy: the chosen one is the likeliest


def test_text_is_constrained_by_a_schema_a_regex_or_a_grammar(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schema, grammar = tmp_path / "list.json", tmp_path / "sum.lark"
    schema.write_text('{"type": "array", "items": {"enum": ["é", 2]}, "minItems": 2, "maxItems": 2}')
    grammar.write_text('start: DIGIT " + " DIGIT\nDIGIT: /[0-9]/\n')
    command = (model, "--prompt", "x ", "--max-tokens", "28", "--seed", "4")
    assert set(json.loads(generated(capsys, *command, "--json-schema", str(schema)).removeprefix("x "))) <= {"é", 2}
    assert re.fullmatch("x [a-c]{4}\n", generated(capsys, *command, "--regex", "[a-c]{4}"))
    assert re.fullmatch(r"x \d \+ \d\n", generated(capsys, *command, "--grammar", str(grammar)))


def test_a_constraint_that_cannot_be_used_is_exit_2(model: str, tmp_path: Path, failed: Failed) -> None:
    command, file = ("generate", model, "--prompt", "x"), tmp_path / "file"
    assert "no such file" in failed(2, *command, "--json-schema", str(file)).lower()
    for content, option, word in [
        (b"{", "json-schema", "not JSON"),
        (b"[" * 100_000, "json-schema", "not JSON"),
        (b"[]", "json-schema", "json_schema"),
        (b'{"uniqueItems": true}', "json-schema", "uniqueItems"),
        (b"\xff", "grammar", "UTF-8"),
        (b"start: nothing", "grammar", "nothing"),
    ]:
        file.write_bytes(content)
        assert word in failed(2, *command, f"--{option}", str(file))
    assert "at most one" in failed(2, *command, "--grammar", str(file), "--regex", "a")


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
