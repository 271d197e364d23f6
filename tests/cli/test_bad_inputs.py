"""Files and folders that cannot be used: one line that names them, an exit code by kind, never a traceback."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from openelm.cli.main import main

Failed = Callable[..., str]


def source(path: Path) -> str:
    return f"data.sources=[{{name='own', paths=[{json.dumps(str(path))}]}}]"


def lines(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


@pytest.fixture
def bad_text(tmp_path: Path, texts: list[str], request: pytest.FixtureRequest) -> Path:
    whole = gzip.compress(lines(texts))
    name, data = {
        "missing": ("missing.txt", None),
        "empty": ("empty.txt", b""),
        "empty jsonl": ("empty.jsonl", b""),
        "empty gzip": ("empty.jsonl.gz", gzip.compress(b"")),
        "blank": ("blank.txt", b" \n\n \n"),
        "truncated": ("cut.jsonl.gz", whole[: len(whole) // 2]),
        "no gzip": ("no.jsonl.gz", b"not gzip at all"),
        "binary": ("binary.txt", bytes(range(256)) * 50),
        "not UTF-8": ("latin.txt", "é".encode("latin-1") * 500),
        "not JSON": ("bad.jsonl", lines(texts[:3]) + b"{'text': 3}\n"),
        "no text": ("keys.jsonl", b'{"content": "x"}\n'),
        "not parquet": ("bad.parquet", b"PAR1 not parquet"),
        "cut parquet": ("cut.parquet", b"PAR1"),
        "no format": ("file.docx", b"x" * 500),
        "too short": ("short.txt", b"Hello.\n"),
    }[request.param]
    path = tmp_path / name
    if data is not None:
        path.write_bytes(data)
    return path


KINDS = [
    "missing", "empty", "empty jsonl", "empty gzip", "blank", "truncated", "no gzip", "binary", "not UTF-8",
    "not JSON", "no text", "not parquet", "cut parquet", "no format", "too short",
]  # fmt: skip


@pytest.mark.parametrize("bad_text", KINDS, indirect=True)
def test_training_on_bad_text_is_exit_3_and_names_the_file(
    recipe: Path, tmp_path: Path, failed: Failed, bad_text: Path, request: pytest.FixtureRequest
) -> None:
    line = failed(3, "train", recipe, "--out", tmp_path / "run", source(bad_text))
    if "too short" not in request.node.name and "blank" not in request.node.name:
        assert bad_text.name in line


@pytest.mark.parametrize("bad_text", KINDS, indirect=True)
def test_a_demo_on_bad_text_is_exit_3(tmp_path: Path, failed: Failed, bad_text: Path, tiny: tuple[str, ...]) -> None:
    failed(3, "demo", "--text", bad_text, "--out", tmp_path / "run", *tiny)


@pytest.mark.parametrize("bad_text", KINDS[:-1], indirect=True)
def test_an_evaluation_on_bad_text_is_exit_3(trained: Path, failed: Failed, bad_text: Path) -> None:
    failed(3, "eval", trained / "model", "--suite", f"bpb:{bad_text}")


@pytest.mark.parametrize("bad_text", KINDS[:-1], indirect=True)
def test_bad_held_out_text_is_exit_3(recipe: Path, tmp_path: Path, failed: Failed, bad_text: Path) -> None:
    held_out = source(bad_text).replace("data.sources", "held_out")
    failed(3, "train", recipe, "--out", tmp_path / "run", held_out)


def test_text_of_which_every_document_is_filtered_out_is_exit_3(recipe: Path, tmp_path: Path, failed: Failed) -> None:
    failed(3, "train", recipe, "--out", tmp_path / "run", "data.min_tokens=100000")


def test_a_demo_on_one_short_document_says_that_two_are_needed(
    tmp_path: Path, failed: Failed, tiny: tuple[str, ...]
) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "one.txt").write_text("Only one line.\n")
    line = failed(3, "demo", "--text", tmp_path / "texts", "--out", tmp_path / "run", *tiny)
    assert "1 document" in line and "more text" in line


@pytest.mark.parametrize(
    "verb",
    [
        ["generate", "MODEL", "--prompt", "x"],
        ["chat", "MODEL"],
        ["eval", "MODEL", "--suite", "bpb:MODEL"],
        ["average", "MODEL"],
        ["report", "MODEL"],
    ],
)
@pytest.mark.parametrize("kind", ["missing", "empty", "file"])
def test_a_folder_that_is_not_one_is_exit_4(tmp_path: Path, failed: Failed, verb: list[str], kind: str) -> None:
    folder = tmp_path / "folder"
    if kind == "empty":
        folder.mkdir()
    elif kind == "file":
        folder.write_text("x")
    assert str(folder) in failed(4, *(word.replace("MODEL", str(folder)) for word in verb))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (name, damage)
        for name in ("model.safetensors", "config.json", "tokenizer.model", "manifest.json")
        for damage in ("cut", "flip", "gone")
        if (name, damage) != ("manifest.json", "gone")
    ],
)
def test_a_damaged_model_is_exit_4_and_names_the_file(
    trained: Path, tmp_path: Path, failed: Failed, name: str, damage: str
) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(trained / "model", folder)
    file = folder / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(data[: len(data) // 2] if damage == "cut" else data)
    assert str(folder) in failed(4, "generate", folder, "--prompt", "x")


def test_a_model_folder_without_a_manifest_is_read_as_other_peoples_are(trained: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(trained / "model", tmp_path / "model")
    (tmp_path / "model" / "manifest.json").unlink()
    assert main(["generate", str(tmp_path / "model"), "--prompt", "x", "--max-tokens", "1"]) == 0


def test_two_starts_of_one_run_are_refused(recipe: Path, tmp_path: Path, failed: Failed) -> None:
    from openelm.files.locks import folder_lock

    with folder_lock(tmp_path):
        line = failed(4, "train", recipe, "--out", tmp_path)
    assert "using this folder" in line


def in_proc(place: str) -> Any:
    """A place where nobody may make anything, root neither."""
    missing = not Path("/proc/self").exists()
    return pytest.param(place, marks=pytest.mark.skipif(missing, reason="this system has no /proc"))


@pytest.mark.parametrize(
    "place", ["file/run", "file", in_proc("/proc/openelm/run"), in_proc("/proc/openelm"), "x" * 300]
)
def test_a_folder_that_cannot_be_made_is_exit_5(recipe: Path, tmp_path: Path, failed: Failed, place: str) -> None:
    (tmp_path / "file").write_text("in the way")
    failed(5, "train", recipe, "--out", tmp_path / place)


@pytest.mark.parametrize("place", ["file/page.html", "none/page.html", in_proc("/proc/page.html")])
def test_a_report_that_cannot_be_written_is_exit_5(trained: Path, tmp_path: Path, failed: Failed, place: str) -> None:
    (tmp_path / "file").write_text("in the way")
    failed(5, "report", trained, "--out", tmp_path / place)


def test_an_average_into_a_file_in_the_way_is_exit_5(trained: Path, tmp_path: Path, failed: Failed) -> None:
    (tmp_path / "file").write_text("in the way")
    failed(5, "average", trained, "--last", "1", "--out", tmp_path / "file" / "model")


def test_an_average_never_replaces_a_folder_that_is_no_model(trained: Path, tmp_path: Path, failed: Failed) -> None:
    """`--out ~/thesis` must not remove the thesis."""
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    failed(4, "average", trained, "--last", "1", "--out", tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "years of work"


def test_too_few_checkpoints_to_average_is_exit_2(trained: Path, tmp_path: Path, failed: Failed) -> None:
    assert "the run has 3" in failed(2, "average", trained, "--last", "9", "--out", tmp_path / "model")


@pytest.mark.parametrize("nested", ["[", '{"a":'])
def test_a_run_file_of_endless_brackets_is_exit_4(tmp_path: Path, failed: Failed, nested: str) -> None:
    path = tmp_path / "nest.json"
    path.write_text(nested * 100_000)
    assert "nest.json" in failed(4, "train", path, "--out", tmp_path / "run")
    assert "nest.json" in failed(4, "plan", path)


@pytest.mark.parametrize(
    "environment",
    [
        {"WORLD_SIZE": "abc"},
        {"WORLD_SIZE": ""},
        {"WORLD_SIZE": "0", "RANK": "0", "LOCAL_RANK": "0"},
        {"WORLD_SIZE": "-2", "RANK": "0", "LOCAL_RANK": "0"},
        {"WORLD_SIZE": "2"},
        {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"},
        {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"},
        {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"},
        {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "70000"},
        {"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
        {"WORLD_SIZE": "2", "RANK": "one", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
    ],
    ids=str,
)
def test_an_environment_that_torchrun_would_not_make_says_to_start_with_it(
    recipe: Path, tmp_path: Path, failed: Failed, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("os._exit", lambda code: None)  # how one of several processes ends
    line = failed(2, "train", recipe, "--out", tmp_path / "run")
    assert "torchrun --nproc-per-node 2" in line


@pytest.mark.parametrize("suite", ["bpb", "bpb:", "hellaswag", ""])
def test_an_unknown_suite_lists_the_suites(trained: Path, failed: Failed, suite: str) -> None:
    assert "bpb:PATH" in failed(2, "eval", trained / "model", "--suite", suite)


def test_a_changed_setting_on_resume_is_exit_2(recipe: Path, trained: Path, failed: Failed) -> None:
    line = failed(2, "train", recipe, "--out", trained, "train.rows=4")
    assert "train.rows: 2 -> 4" in line and "--allow-change train.rows" in line
