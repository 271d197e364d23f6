"""`openelm data` through the command line, and recipes that name a manifest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from openelm.cli.main import main, parse_arguments

Failed = Callable[..., str]


@pytest.fixture
def folder(text_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(text_folder, tmp_path / "texts"))


def make(folder: Path, out: Path, *options: str) -> Path:
    assert (
        main(["data", "manifest", str(folder), "--name", "texts", "--out", str(out), "--workers", "1", *options]) == 0
    )
    return out


@pytest.mark.parametrize("verb", ["manifest", "merge", "check"])
def test_help_of_a_sub_verb_teaches(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["data", verb, "--help"])
    assert caught.value.code == 0
    assert f"\n  openelm data {verb}" in capsys.readouterr().out


def test_parts_made_merged_and_checked(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = make(folder, tmp_path / "whole.json")
    parts = [str(make(folder, tmp_path / f"{part}.json", "--part", f"{part}/2")) for part in (1, 2)]
    assert main(["data", "merge", *parts, "--out", str(tmp_path / "merged.json")]) == 0
    assert (tmp_path / "merged.json").read_bytes() == whole.read_bytes()
    capsys.readouterr()
    assert main(["data", "check", str(whole), "--whole", "--workers", "1"]) == 0
    assert "40 files are as the manifest says" in capsys.readouterr().out


def test_a_check_of_changed_files_is_exit_3_and_names_them(folder: Path, tmp_path: Path, failed: Failed) -> None:
    whole = make(folder, tmp_path / "whole.json")
    (folder / "07.txt").write_text("other")
    (folder / "31.txt").unlink()
    line = failed(3, "data", "check", whole, "--workers", "1")
    assert "07.txt" in line and "31.txt" in line and "E_CHANGED" in line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--part", "3/2"], "'3/2'"),
        (["--part", "0/2"], "'0/2'"),
        (["--part", "half"], "'half'"),
        (["--workers", "0"], "--workers"),
        (["--block-bytes", "0"], "--block-bytes"),
        (["--document-bytes", "0"], "document_bytes"),
    ],
)
def test_a_setting_that_is_not_allowed_is_exit_2(
    folder: Path, tmp_path: Path, failed: Failed, options: list[str], words: str
) -> None:
    assert words in failed(2, "data", "manifest", folder, "--out", tmp_path / "m.json", *options)


def test_a_gap_between_parts_is_exit_2(folder: Path, tmp_path: Path, failed: Failed) -> None:
    part = make(folder, tmp_path / "1.json", "--part", "1/2")
    assert "part 2/2 is missing" in failed(2, "data", "merge", part, "--out", tmp_path / "m.json")


def with_manifest(recipe: Path, manifest: Path, target: Path, more: str = "") -> Path:
    before, _, after = recipe.read_text().partition("[[data.sources]]")
    after = "[train]" + after.partition("[train]")[2]
    target.write_text(f"{before}manifest = {json.dumps(str(manifest))}\n{more}\n{after}")
    return target


def ledger_losses(run: Path) -> list[str]:
    events = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    return [event["loss"] for event in events if event["event"] == "step"]


def test_a_run_with_a_manifest_is_the_run_that_scans(
    recipe: Path, trained: Path, text_folder: Path, tmp_path: Path, failed: Failed
) -> None:
    manifest = make(text_folder, tmp_path / "texts.json")
    named = with_manifest(recipe, manifest, tmp_path / "named.toml", "weights = { texts = 1.0 }")
    assert main(["train", str(named), "--out", str(tmp_path / "run")]) == 0
    first, second = (json.loads((run / "run.json").read_bytes())["data"] for run in (trained, tmp_path / "run"))
    assert first["sha256"] == second["sha256"]
    assert ledger_losses(tmp_path / "run") == ledger_losses(trained) != []
    assert main(["train", str(tmp_path / "run" / "run.json"), "--out", str(tmp_path / "run")]) == 0


def test_a_run_refuses_a_changed_file_a_damaged_manifest_and_a_wrong_weight(
    recipe: Path, folder: Path, tmp_path: Path, failed: Failed
) -> None:
    manifest, run = make(folder, tmp_path / "texts.json"), tmp_path / "run"
    named = with_manifest(recipe, manifest, tmp_path / "named.toml", "weights = { txets = 2.0 }")
    assert "'txets'" in (line := failed(2, "train", named, "--out", run)) and "allowed: texts" in line
    named = with_manifest(recipe, manifest, tmp_path / "named.toml")
    data = manifest.read_bytes()
    manifest.write_bytes(data.replace(b'"rows":1,', b'"rows":2,', 1))
    assert "E_CORRUPT" in (line := failed(3, "train", named, "--out", run)) and str(manifest) in line
    manifest.write_bytes(data)
    (folder / "07.txt").write_text("other")
    assert "E_CHANGED" in (line := failed(3, "train", named, "--out", run)) and "07.txt" in line
    (folder / "07.txt").unlink()
    assert "07.txt" in failed(3, "train", named, "--out", run)


def test_a_recipe_has_either_sources_or_a_manifest(recipe: Path, tmp_path: Path, failed: Failed) -> None:
    line = failed(2, "train", recipe, "--out", tmp_path / "run", "data.manifest=texts.json")
    assert "either sources or a manifest" in line
    assert "either" in failed(2, "train", recipe, "--out", tmp_path / "run", "data.sources=[]")


def test_ray_without_its_package_says_what_to_install(
    folder: Path, tmp_path: Path, failed: Failed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    line = failed(2, "data", "manifest", folder, "--out", tmp_path / "m.json", "--ray", "auto")
    assert "openelm-framework[ray]" in line


def test_the_default_number_of_processes_is_one_a_core() -> None:
    import os

    assert parse_arguments(["data", "check", "m.json"]).workers == os.cpu_count()
