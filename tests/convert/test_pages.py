"""The pages about other runtimes are real: their commands and programs run, in order, on a small model."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from openelm.cli.main import main

from .conftest import Publish

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {"huggingface": "transformers", "mlx": "mlx_lm", "gguf": "xllamacpp", "onnx": "onnxruntime"}
PAGES |= {"openvino": "openvino", "executorch": "executorch"}


@pytest.mark.timeout(1000)  # ExecuTorch compiles for minutes
@pytest.mark.parametrize("page", PAGES)
def test_everything_on_a_page_runs(publish: Publish, page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(PAGES[page])
    monkeypatch.chdir(publish().parent)
    blocks = re.findall(r"```(sh|python)\n(.*?)```", (DOCS / f"{page}.md").read_text(), flags=re.DOTALL)
    assert {kind for kind, _ in blocks} == {"sh", "python"}
    for kind, text in blocks:
        if kind == "python":
            done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=900)
            assert done.returncode == 0, done.stderr[-2000:]
            assert page == "huggingface" or done.stdout.strip()
            continue
        for line in text.splitlines():
            program, *arguments = shlex.split(line)
            assert program == "openelm" and main(arguments) == 0
