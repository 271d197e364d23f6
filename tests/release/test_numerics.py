"""Numerics that CPUs of two makers share: recorded with a run, taken over by its verifier, and nothing else is."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from openelm.release.ground import stand_on
from openelm.release.numerics import PORTABLE
from openelm.release.publication import read_publication
from openelm.text.tokenizer import load_tokenizer
from openelm.train.environment import environment

from .conftest import read_lines

PYTHON = {name: value for name, value in os.environ.items() if name not in PORTABLE} | {"OMP_NUM_THREADS": "1"}

ADOPTED = """
import os, sys
from pathlib import Path
before = dict(os.environ)
from openelm.release.numerics import adopt
if len(sys.argv) > 2:
    sys.modules["torch"] = sys
adopt(Path(sys.argv[1]))
print(sorted(name + "=" + value for name, value in os.environ.items() if before.get(name) != value))
"""


def adopted(folder: Path, *words: str, **more: str) -> str:
    command = [sys.executable, "-S", "-c", ADOPTED, str(folder), *words]
    path = os.pathsep.join(sys.path)
    done = subprocess.run(command, capture_output=True, text=True, env={**PYTHON, **more, "PYTHONPATH": path})
    assert done.stderr == ""
    return done.stdout.strip()


def test_the_profile_is_adopted_and_nothing_else(tmp_path: Path) -> None:
    more = {"LD_PRELOAD": "evil.so", "PATH": "/evil", "OMP_NUM_THREADS": "64", "PYTHONPATH": "/evil"}
    (tmp_path / "run.json").write_text(json.dumps({"environment": {**PORTABLE, **more}}))
    assert adopted(tmp_path) == str(sorted(f"{name}={value}" for name, value in PORTABLE.items()))
    assert "MKL_CBWR=" not in adopted(tmp_path, MKL_CBWR="AVX2")  # the verifier's own word comes first
    assert adopted(tmp_path, "torch is loaded") == "[]"


@pytest.mark.parametrize(
    "content",
    [
        json.dumps({"environment": {"MKL_CBWR": "AVX512", "ATEN_CPU_CAPABILITY": ["default"], "LD_PRELOAD": "x"}}),
        json.dumps({"environment": dict.fromkeys(PORTABLE)}),
        json.dumps({"environment": [*PORTABLE]}),
        json.dumps([PORTABLE]),
        '{"environment":' * 100_000,
        "",
    ],
    ids=lambda content: content[:30],
)
def test_a_description_that_records_something_else_changes_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    assert adopted(tmp_path) == "[]"


def test_a_description_that_is_missing_or_lies_elsewhere_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text(json.dumps({"environment": PORTABLE}))
    assert adopted(tmp_path) == "[]"
    (tmp_path / "run.json").symlink_to(tmp_path / "other.json")
    assert adopted(tmp_path) == "[]"


def test_every_variable_of_the_profile_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in PORTABLE.items():
        monkeypatch.setenv(name, value)
    assert environment(torch.device("cpu"), "fp32").items() >= PORTABLE.items()


def test_cpus_of_two_makers_are_compared_to_the_bit_with_the_profile_only(honest: Path) -> None:
    publication = read_publication(honest)
    ground = stand_on(publication, load_tokenizer(honest / "tokenizer"), ())
    start = publication.starts[0]

    def differences(mine: str, theirs: str, **more: str) -> list[str]:
        there = start.model_copy(update={"environment": {**start.environment, "device": f"cpu {theirs}", **more}})
        here = dataclasses.replace(ground, here={**ground.here, "device": f"cpu {mine}", **more})
        return here.differences(there)

    assert differences("AMD EPYC 7B13", "AMD Ryzen 5") == []
    assert differences("AMD EPYC 7B13", "Intel(R) Xeon(R)")[0].startswith("device: cpu Intel")
    assert differences("AMD EPYC 7B13", "Intel(R) Xeon(R)", **PORTABLE) == []
    assert differences("something", "something else") != []


def test_a_run_made_with_the_profile_is_replayed_with_it_to_the_bit(workshop: Any, tmp_path: Path) -> None:
    """In processes of their own, for torch reads the variables once; this takes some seconds."""
    recipe, run = tmp_path / "run.json", tmp_path / "run"
    config = workshop.config("train.steps=3", "evaluation.every=3").model_dump(mode="json")
    recipe.write_text(json.dumps({"config": config, "model": {}}))

    def openelm(*words: object, **more: str) -> str:
        command = [sys.executable, "-m", "openelm", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, env={**PYTHON, **more})
        assert done.returncode == 0, done.stderr
        return done.stdout

    openelm("train", recipe, "--out", run, **PORTABLE)
    result = json.loads(openelm("verify", run, "--level", 4, "--json"))
    assert (result["verdict"], result["numerics"]["differences"]) == ("verified", [])
    assert result["numerics"]["here"].items() >= PORTABLE.items()
    assert read_lines(run)[0]["environment"]["cpu_capability"] == "DEFAULT"
