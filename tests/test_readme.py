"""The README's commands are real: they parse, their targets exist, and they run."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from openelm.cli.main import main, parse_arguments

ROOT = Path(__file__).parents[1]
COMMANDS = [
    line.partition("  #")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]
TINY = [
    "model.dim=32",
    "model.layers=2",
    "model.context=64",
    "train.rows=2",
    "train.length=32",
    "train.steps=6",
    "data.lanes=2",
    "tokenizer.vocab_size=300",
    "checkpoints.every=1",
    "evaluation.every=6",
    "evaluation.max_bytes=256",
]


def test_the_readme_shows_the_two_commands_of_a_newcomer() -> None:
    assert "make demo" in COMMANDS
    assert "make test" in COMMANDS


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("make ")])
def test_a_make_command_of_the_readme_has_its_target(command: str) -> None:
    planned = subprocess.run(["make", "--dry-run", *shlex.split(command)[1:]], cwd=ROOT, capture_output=True, text=True)
    assert planned.returncode == 0, planned.stderr


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("openelm ")])
def test_an_openelm_command_of_the_readme_parses(command: str) -> None:
    parse_arguments(shlex.split(command)[1:])


def test_the_openelm_commands_of_the_readme_run_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda prompt="": (_ for _ in ()).throw(EOFError))
    text = tmp_path / "my-texts"
    text.mkdir()
    for number in range(4):
        lines = [f"On day {number} the {word} said that line {i} is fine.\n" for i, word in enumerate("abc" * 80)]
        (text / f"{number}.txt").write_text("".join(lines))
    shutil.copy(ROOT / "openelm" / "recipes" / "demo.toml", tmp_path / "recipe.toml")
    for command in COMMANDS:
        words = shlex.split("openelm demo" if command == "make demo" else command)
        if words.pop(0) != "openelm":
            continue
        if words[0] == "demo":  # the same commands on a model that takes seconds
            words += ([] if "--text" in words else ["--text", str(text)]) + TINY
        if words[0] == "train":
            words += [*TINY, f'data.sources=[{{name="x", paths=["{text}"]}}]', "held_out=[]"]
        assert main(words) == 0, (command, capsys.readouterr().err)
