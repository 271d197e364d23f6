"""Help that teaches, usage errors that name the nearest right thing, and exit codes scripts can rely on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from openelm import __version__
from openelm.cli import main

VERBS = (
    "demo",
    "train",
    "tune",
    "average",
    "report",
    "verify",
    "eval",
    "compare",
    "table",
    "inspect",
    "plan",
    "bench",
    "generate",
    "chat",
    "serve",
)
VERBS += ("convert", "push", "quantize", "adapter merge", "adapter mlx")
VERBS += ("data manifest", "data merge", "data check", "data decontaminate", "data dedup")
Failed = Callable[..., str]


@pytest.mark.parametrize("verb", VERBS)
def test_help_exits_0_and_shows_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*verb.split(), "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert f"example:\n  openelm {verb}" in text


def test_the_first_help_lists_every_verb_and_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(f"\n    {verb.split()[0]} " in text for verb in VERBS)
    assert "start here" in text and "75 stopped and resumable" in text


def test_every_verb_of_the_parser_is_tested_here() -> None:
    from openelm.cli.main import _HANDLERS

    assert set(_HANDLERS) == set(VERBS)


@pytest.mark.parametrize(("size", "code"), [("tiny", 0), ("no-such-size", 2)])
def test_one_of_several_processes_ends_without_ending_the_interpreter(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], size: str, code: int
) -> None:
    """Threads of PyTorch that outlive a process group would abort it now and then: exit code -6 after a good run."""

    def leave(code: int) -> None:
        raise SystemExit(f"left with {code}")

    monkeypatch.setattr("os._exit", leave)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match=f"left with {code}"):
        main(["inspect", size])
    assert (capsys.readouterr().out != "") == (code == 0)


def test_help_does_not_import_torch(openelm: Any) -> None:
    import subprocess
    import sys

    code = "import sys; sys.argv = ['openelm']; import openelm.cli.main; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"openelm {__version__}\n"


@pytest.mark.parametrize(
    "arguments", [[], ["trian"], ["train"], ["generate", "x"], ["inspect", "270m", "--jsn"], ["train", "demo", "steps"]]
)
def test_wrong_usage_exits_2_and_shows_the_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: openelm" in capsys.readouterr().err


# openelm.md, sections 1.3 and 1.4
SIZES = {
    "270m": (1280, 16, 16_128, 230_567_168, 271_527_168, (51_609_600, 178_913_280, 44_288)),
    "450m": (1536, 20, 23_296, 408_027_136, 457_179_136, (89_456_640, 318_504_960, 65_536)),
    "1.1b": (2048, 28, 43_264, 1_014_355_456, 1_079_891_456, (221_511_680, 792_723_456, 120_320)),
    "3b": (3072, 36, 83_968, 2_938_343_424, 3_036_647_424, (644_874_240, 2_293_235_712, 233_472)),
}


@pytest.mark.parametrize("size", SIZES)
def test_inspect_gives_the_published_numbers(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", size, "--json"]) == 0
    costs = json.loads(capsys.readouterr().out)
    dim, layers, kv_bytes, inner, parameters, split = SIZES[size]
    assert (costs["plan"]["dim"], len(costs["plan"]["ffn_dims"])) == (dim, layers)
    assert costs["kv_bytes_per_token"] == kv_bytes
    assert (costs["non_embedding_parameters"], costs["parameters"]) == (inner, parameters)
    assert tuple(costs[f"{part}_parameters"] for part in ("attention", "ffn", "norm")) == split


def test_inspect_270m_gives_the_published_widths(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "OpenELM-270M", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert plan["query_heads"] == [12] * 5 + [16] * 7 + [20] * 4
    assert plan["kv_heads"] == [3] * 5 + [4] * 7 + [5] * 4
    assert plan["ffn_dims"] == [*range(768, 2049, 256), *range(2560, 3841, 256), *range(4352, 5121, 256)]


def test_inspect_shows_a_table_and_the_same_totals(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "1.1b"]) == 0
    text = capsys.readouterr().out
    assert "1,079,891,456 parameters" in text and "43,264 bytes a token" in text


def test_inspect_reads_a_model_folder(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(trained / "model"), "--json"]) == 0
    costs = json.loads(capsys.readouterr().out)
    assert costs["parameters"] == json.loads((trained / "run.json").read_bytes())["parameters"]


def test_inspect_of_an_unknown_size_names_the_nearest(failed: Failed) -> None:
    line = failed(2, "inspect", "1.2b")
    assert "did you mean '1.1b'?" in line and "270m" in line


def test_a_typo_in_a_recipe_names_the_nearest_key(recipe: Path, tmp_path: Path, failed: Failed) -> None:
    wrong = tmp_path / "wrong.toml"
    wrong.write_text(recipe.read_text().replace("steps = 6", "stesp = 6"))
    line = failed(2, "train", wrong, "--out", tmp_path / "run")
    assert "train.stesp" in line and "'steps'" in line and str(wrong) in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.stpes=3", ["train.stpes", "'steps'"]),
        ("trian.steps=3", ["trian", "'train'"]),
        ("data.sources.nme=x", ["data.sources"]),
        ("train.steps.x=3", ["train.steps"]),
        ("train.steps=three", ["train.steps", "three"]),
        ("train.steps=0", ["train.steps", "0"]),
        ("train.steps=", ["train.steps"]),
        ("train.precision=fp64", ["train.precision", "fp64", "bf16"]),
        ("schedule.peak=nan", ["schedule.peak"]),
        ("schedule.peak=-1", ["schedule.peak"]),
        ("train.micro_rows=4", ["micro_rows"]),
        ("train.length=4096", ["train.length", "model.context"]),
        ("data.lanes=5", ["lanes"]),
        ("model.head_dim=7", ["head_dim"]),
        ("model.size=270", ["model.size", "270"]),
        ("model.size=openelm-270", ["270m"]),
        ("checkpoints.keep_last=1", ["keep_last"]),
        ("train.seed=-1", ["train.seed"]),
        ("train.seed=36893488147419103232", ["seed"]),
        ("train.device=cuda:7", ["device"]),
        ("model.dim=1000000", ["dim"]),
        ("train=5", ["train"]),
    ],
)
def test_a_bad_override_is_a_line_that_says_what_is_allowed(
    recipe: Path, tmp_path: Path, failed: Failed, override: str, words: list[str]
) -> None:
    line = failed(2, "train", recipe, "--out", tmp_path / "run", override)
    assert all(word in line for word in words)


@pytest.mark.parametrize("text", ["[train", "\x00", "train = 3\n[train]\n"])
def test_a_recipe_that_is_not_toml_is_named(tmp_path: Path, failed: Failed, text: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    assert str(path) in failed(2, "train", path, "--out", tmp_path / "run")


def test_recipes_that_are_not_there_or_no_files(tmp_path: Path, failed: Failed) -> None:
    assert "none.toml" in failed(2, "train", tmp_path / "none.toml", "--out", tmp_path / "run")
    assert "demo" in failed(2, "train", "dmeo", "--out", tmp_path / "run")
    assert str(tmp_path) in failed(2, "train", tmp_path, "--out", tmp_path / "run")
    (tmp_path / "latin.toml").write_bytes(b"\xff")
    assert "UTF-8" in failed(2, "train", tmp_path / "latin.toml", "--out", tmp_path / "run")


def test_the_run_file_is_a_recipe_too(trained: Path, tmp_path: Path) -> None:
    """The report page says so: `openelm train run.json` trains the same model again."""
    from openelm.model.folder import weights_sha256
    from openelm.train.checkpoint import load_checkpoint

    assert main(["train", str(trained / "run.json"), "--out", str(tmp_path / "again")]) == 0
    first, second = (weights_sha256(load_checkpoint(run, 6).weights) for run in (trained, tmp_path / "again"))
    assert first == second


def test_a_reader_that_leaves_early_is_no_error(openelm: Any) -> None:
    import subprocess
    import sys

    command = f"{sys.executable} -m openelm inspect 3b | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
