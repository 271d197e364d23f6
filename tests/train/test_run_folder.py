"""Opening a run folder: the same settings or a refusal that lists them; run.json starts the same run again."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import openelm
import openelm.train.environment as environment_module
from openelm.data.manifest_file import load_manifest, read_manifest_file, write_manifest_file
from openelm.errors import CheckpointError, ConfigError, OpenELMError
from openelm.files.hashes import sha256_file
from openelm.train.ledger import read_ledger
from openelm.train.run import RunConfig


def run_file(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "run.json").read_bytes())
    return values


@pytest.mark.parametrize(
    ("override", "name"),
    [
        ("train.seed=1", "train.seed"),
        ("schedule.peak=0.02", "schedule.peak"),
        ("train.rows=2", "train.rows"),
        ("model.layers=3", "model.layers"),
        ("data.min_tokens=2", "data.min_tokens"),
        ("optimizer.beta2=0.9", "optimizer.beta2"),
    ],
)
def test_a_changed_setting_is_refused_by_name_with_both_values(
    bench: Any, tmp_path: Path, override: str, name: str
) -> None:
    bench.open(tmp_path)
    with pytest.raises(ConfigError) as caught:
        bench.open(tmp_path, override)
    assert caught.value.exit_code == 2
    assert f"{name}: " in str(caught.value)
    assert override.partition("=")[2] in str(caught.value)
    assert "--allow-change" in str(caught.value)


def test_two_changed_settings_are_both_listed(bench: Any, tmp_path: Path) -> None:
    bench.open(tmp_path)
    with pytest.raises(ConfigError, match=r"schedule\.peak.*train\.seed"):
        bench.open(tmp_path, "train.seed=1", "schedule.peak=0.5")


def test_only_what_is_allowed_may_change(bench: Any, tmp_path: Path) -> None:
    bench.open(tmp_path)
    bench.open(tmp_path, "schedule.peak=0.5", allow_change=["schedule"])
    with pytest.raises(ConfigError, match=r"train\.seed"):
        bench.open(tmp_path, "train.seed=1", "schedule.peak=0.5", allow_change=["schedule.peak", "train.se"])


def test_a_run_of_a_version_without_an_option_has_its_default(bench: Any, tmp_path: Path) -> None:
    bench.open(tmp_path)
    path = tmp_path / "run.json"
    stored = json.loads(path.read_bytes())
    del stored["config"]["train"]["numerics"], stored["config"]["checkpoints"]["background"]
    path.write_text(json.dumps(stored))
    bench.open(tmp_path)
    with pytest.raises(ConfigError, match=r"train\.numerics"):
        bench.open(tmp_path, "train.numerics=exact", "train.shards=4")


def test_an_allowed_change_is_recorded(bench: Any, tmp_path: Path) -> None:
    """A reader of the run folder must learn of it: run.json or the ledger names the setting and its new value."""
    bench.train_until(tmp_path, 5)
    bench.train(tmp_path, "schedule.peak=0.0123", allow_change=["schedule.peak"])
    record = (tmp_path / "run.json").read_text() + (tmp_path / "ledger.jsonl").read_text()
    assert "0.0123" in record


def test_changed_text_is_refused_and_named(bench: Any, tmp_path: Path, corpus: Path) -> None:
    text = tmp_path / "own.jsonl"
    text.write_bytes(corpus.read_bytes())
    source = f'data.sources=[{{name="tiny", paths=["{text}"]}}]'
    bench.train_until(tmp_path / "run", 5, source)
    text.write_bytes(corpus.read_bytes().replace(b"The old", b"The new", 1))
    with pytest.raises(OpenELMError) as caught:
        bench.train(tmp_path / "run", source)
    assert caught.value.exit_code in (2, 3)
    assert "data_sha256" in str(caught.value) or caught.value.code == "E_CHANGED"


@pytest.fixture
def shelf(tmp_path: Path, corpus: Path) -> tuple[Path, str, str]:
    """A folder of three files, and the settings that train or measure on it."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    for name in ("a", "b", "c"):
        (folder / f"{name}.jsonl").write_bytes(corpus.read_bytes().replace(b"The old", f"The {name}".encode()))
    sources = f'[{{name="own", paths=["{folder}"]}}]'
    return folder, f"data.sources={sources}", f"held_out={sources}"


def test_a_second_start_does_not_read_files_that_look_as_they_did(
    bench: Any, tmp_path: Path, shelf: tuple[Path, str, str]
) -> None:
    """Each file gets other bytes of the same size and time: a start that read one of them would see that."""
    folder, *sources = shelf
    first = bench.open(tmp_path / "run", *sources)
    for path in folder.iterdir():
        status = path.stat()
        path.write_bytes(path.read_bytes()[::-1])
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    again = bench.open(tmp_path / "run", *sources)
    assert (again.manifest, again.held_out) == (first.manifest, first.held_out)


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("change", ["replaced", "added", "removed"])
def test_a_second_start_names_the_file_that_was_replaced_added_or_removed(
    bench: Any, tmp_path: Path, shelf: tuple[Path, str, str], change: str, kind: int
) -> None:
    folder, *sources = shelf
    bench.open(tmp_path / "run", sources[kind])
    before = sha256_file(folder / "b.jsonl")
    if change == "replaced":
        (folder / "b.jsonl").write_bytes((folder / "a.jsonl").read_bytes())
    elif change == "removed":
        (folder / "b.jsonl").unlink()
    else:
        (folder / "bb.jsonl").write_bytes((folder / "a.jsonl").read_bytes())
    for _ in range(2):  # a refused start leaves the lists as they were
        with pytest.raises(ConfigError, match=r"(data|held_out)_sha256") as caught:
            bench.open(tmp_path / "run", sources[kind])
        assert ("bb.jsonl" if change == "added" else "b.jsonl") in str(caught.value)
        if change == "replaced":
            assert before in str(caught.value) and sha256_file(folder / "b.jsonl") in str(caught.value)


def test_a_file_that_was_only_touched_is_hashed_once_and_then_known(
    bench: Any, tmp_path: Path, shelf: tuple[Path, str, str]
) -> None:
    folder, source, _ = shelf
    first = bench.open(tmp_path / "run", source)
    os.utime(folder / "b.jsonl", ns=(5, 5))
    bench.open(tmp_path / "run", source, leads=False)
    assert load_manifest(tmp_path / "run" / "data.json") == first.manifest
    again = bench.open(tmp_path / "run", source)
    assert again.manifest.sha256 == first.manifest.sha256
    assert load_manifest(tmp_path / "run" / "data.json").sources[0].shards[1].modified_ns == 5


def test_text_that_moved_but_is_the_same_is_not_a_change_of_text(bench: Any, tmp_path: Path, corpus: Path) -> None:
    bench.open(tmp_path / "run")
    moved = tmp_path / corpus.name
    moved.write_bytes(corpus.read_bytes())
    source = f'data.sources=[{{name="tiny", paths=["{moved}"]}}]'
    with pytest.raises(ConfigError) as caught:
        bench.open(tmp_path / "run", source)
    assert "data_sha256" not in str(caught.value)
    bench.open(tmp_path / "run", source, allow_change=["data.sources"])


def test_the_tokenizer_is_trained_once_and_used_again(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = bench.open(tmp_path)

    def refuse(*arguments: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr("openelm.train.run.train_tokenizer", refuse)
    assert bench.open(tmp_path).tokenizer.sha256 == first.tokenizer.sha256


def test_an_existing_tokenizer_can_be_named(bench: Any, tmp_path: Path) -> None:
    first = bench.open(tmp_path / "first")
    second = bench.open(tmp_path / "second", f'tokenizer.path="{tmp_path / "first" / "tokenizer"}"')
    assert second.tokenizer.sha256 == first.tokenizer.sha256


def test_another_tokenizer_in_the_folder_is_refused(bench: Any, tmp_path: Path) -> None:
    bench.open(tmp_path / "run")
    bench.open(tmp_path / "other", "tokenizer.vocab_size=290")
    (tmp_path / "run" / "tokenizer").rename(tmp_path / "old")
    (tmp_path / "other" / "tokenizer").rename(tmp_path / "run" / "tokenizer")
    with pytest.raises(ConfigError, match="tokenizer_sha256"):
        bench.open(tmp_path / "run")


def test_run_json_starts_the_same_run_again(bench: Any, undisturbed: Path, tmp_path: Path) -> None:
    config = RunConfig.parse(run_file(undisturbed)["config"])
    bench.train(tmp_path, *(f"{key}={json.dumps(value)}" for key, value in _leaves(config.model_dump(mode="json"))))
    assert bench.fingerprint(tmp_path) == bench.fingerprint(undisturbed)


def _leaves(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            found += _leaves(value, f"{prefix}{key}.")
        elif isinstance(value, int | float | str | bool):
            found.append((f"{prefix}{key}", value))
    return found


def test_run_json_is_the_same_config_after_a_round_trip(bench: Any, undisturbed: Path) -> None:
    assert RunConfig.parse(run_file(undisturbed)["config"]) == bench.config()


def test_run_json_says_what_the_numbers_depend_on(undisturbed: Path) -> None:
    values = run_file(undisturbed)
    assert values["environment"].keys() >= {"openelm", "torch", "python", "device", "precision", "cpu_capability"}
    (source,) = values["data"]["sources"]
    assert (source["name"], source["files"], source["rows"], len(values["data"]["sha256"])) == ("tiny", 1, 50, 64)
    assert values["seed"] == 0
    assert values["parameters"] > 0
    start = read_ledger(undisturbed / "ledger.jsonl")[0]
    assert (start["data_sha256"], start["tokenizer_sha256"]) == (
        values["data"]["sha256"],
        values["tokenizer"]["sha256"],
    )


def test_the_lists_of_files_lie_beside_run_json_which_holds_only_their_hashes_and_sums(
    bench: Any, corpus: Path, tmp_path: Path
) -> None:
    run = bench.open(tmp_path, f'held_out=[{{name="other", paths=["{corpus}"]}}]')
    for key, name, manifest in (("data", "data.json", run.manifest), ("held_out", "held-out.json", run.held_out)):
        assert load_manifest(tmp_path / name) == manifest
        assert run_file(tmp_path)[key] == manifest.summary()
    assert len((tmp_path / "run.json").read_bytes()) < 10_000


@pytest.mark.parametrize("name", ["data.json", "held-out.json"])
@pytest.mark.parametrize("fault", ["missing", "damaged", "of other text"])
def test_a_list_that_is_not_the_runs_is_refused_by_name(
    bench: Any, corpus: Path, tmp_path: Path, name: str, fault: str
) -> None:
    held_out = f'held_out=[{{name="other", paths=["{corpus}"]}}]'
    bench.open(tmp_path / "run", held_out)
    path = tmp_path / "run" / name
    if fault == "missing":
        path.unlink()
    elif fault == "damaged":
        path.write_bytes(path.read_bytes().replace(b'"rows":50', b'"rows":51', 1))
    else:
        (survey,) = read_manifest_file(path)
        write_manifest_file(path, [replace(survey, source=replace(survey.source, text_key="body"))])
    with pytest.raises(CheckpointError) as caught:
        bench.open(tmp_path / "run", held_out)
    assert caught.value.file == path and caught.value.exit_code == 4
    change = "data_sha256" if name == "data.json" else "held_out_sha256"
    assert f"--allow-change {change}" in str(caught.value)
    bench.open(tmp_path / "run", held_out, allow_change=[change])
    bench.open(tmp_path / "run", held_out)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"{}", b"\xff", b'{"config": 3}'])
def test_a_damaged_run_file_is_one_error(bench: Any, tmp_path: Path, data: bytes) -> None:
    bench.open(tmp_path)
    (tmp_path / "run.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"run\.json"):
        bench.open(tmp_path)


@pytest.mark.parametrize("seed", [2**63, 2**64, 10**30])
def test_a_seed_no_generator_takes_is_a_config_error(bench: Any, tmp_path: Path, seed: int) -> None:
    with pytest.raises(ConfigError, match="seed"):
        bench.train(tmp_path, f"train.seed={seed}", "train.steps=1")


def test_rows_longer_than_the_context_are_refused(bench: Any) -> None:
    with pytest.raises(ConfigError, match=r"train\.length 64 .* model\.context 32"):
        bench.config("train.length=64")


def test_the_code_that_decides_the_numbers_is_named_and_other_code_is_refused(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "openelm"
    shutil.copytree(Path(openelm.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(environment_module, "_PACKAGE", package)

    def digest() -> str:
        environment_module.code_sha256.cache_clear()
        return str(environment_module.code_sha256())

    try:
        first = digest()
        bench.open(tmp_path / "run")
        (package / "release" / "report.py").write_text("")
        assert digest() == first  # what only reads runs decides nothing
        with (package / "kernels" / "rms_norm.py").open("a") as file:
            file.write("# other\n")
        assert digest() != first
        with pytest.raises(ConfigError, match=rf"environment.code: '{first}' -> "):
            bench.open(tmp_path / "run")
        bench.open(tmp_path / "run", allow_change=["environment.code"])
    finally:
        environment_module.code_sha256.cache_clear()
