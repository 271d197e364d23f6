"""The pages about other runtimes are real: their commands and programs run, in order, on a small model."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from openelm.cli.main import main

from .conftest import Command, Publish

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {
    "huggingface": "transformers",
    "mlx": "mlx_lm",
    "gguf": "xllamacpp",
    "onnx": "onnxruntime",
    "openvino": "openvino",
    "executorch": "executorch",
}
HEAVY = {"peft": "peft", "trl": "trl", "torch.compile": "torch"}
"""What a program of a page contains -> the package that it needs; these run apart."""


def blocks(page: str) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = re.findall(
        r"```(sh|python)\n(.*?)```", (DOCS / f"{page}.md").read_text(), flags=re.DOTALL
    )
    return found


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


@pytest.mark.timeout(1000)  # ExecuTorch compiles for minutes
@pytest.mark.parametrize("page", PAGES)
def test_everything_on_a_page_runs(
    publish: Publish, page: str, mlx_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(PAGES[page])
    monkeypatch.chdir(publish().parent)
    texts(Path("data"), "train.jsonl", "valid.jsonl")
    assert {kind for kind, _ in blocks(page)} == {"sh", "python"}
    for kind, text in blocks(page):
        if kind == "python":
            if not any(word in text for word in HEAVY):
                assert run(text) or page == "huggingface"
            continue
        for line in text.splitlines():
            program, *arguments = shlex.split(line)
            if program.startswith("mlx_lm."):
                mlx_command(program, *arguments)
            else:
                assert program == "openelm" and main(arguments) == 0


@pytest.mark.parametrize(
    "word", ["peft", *(pytest.param(word, marks=pytest.mark.slow) for word in ("trl", "torch.compile"))]
)
def test_programs_that_tune_and_compile_run(publish: Publish, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(HEAVY[word])
    monkeypatch.chdir(publish().parent)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    texts(Path(), "train.jsonl")
    (text,) = (text for _, text in blocks("huggingface") if next((w for w in HEAVY if w in text), None) == word)
    assert run(text)


def texts(folder: Path, *names: str) -> None:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text('{"text": "the quick brown fox jumps over the lazy dog"}\n' * 8)
