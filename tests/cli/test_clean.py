"""`openelm data decontaminate` and `dedup`: from files to a list that a run leaves out."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from openelm.cli import main

Failed = Callable[..., str]
QUESTION = "which of the seven old rivers runs past the quiet house where the king keeps his red letters"


@pytest.fixture
def corpus(texts: list[str], tmp_path: Path) -> Path:
    """Two shards of prose; row 5 of `a` holds a question, rows 3 and 8 of `b` repeat row 2 of `a`."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    first, second = texts[:12], texts[12:24]
    first[5] = f"{first[5]}\n{QUESTION.upper()}?\n{first[5]}"
    second[3], second[8] = first[2], first[2].upper()
    for name, part in (("a", first), ("b", second)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in part))
    return folder


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"question": QUESTION, "choices": ["yes", "no"]}) + "\n")
    return path


@pytest.fixture
def clean_recipe(corpus: Path, recipe: Path, tmp_path: Path) -> Path:
    values = recipe.read_text()
    source = f'[[data.sources]]\nname = "prose"\ntext_key = "body"\npaths = [{json.dumps(str(corpus))}]\n'
    start, end = values.index("[[data.sources]]"), values.index("[train]")
    path = tmp_path / "clean.toml"
    path.write_text(values[:start] + source + "\n" + values[end:])
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_question_in_the_training_text_is_found_and_a_run_leaves_its_document_out(
    clean_recipe: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "list"
    assert main(["data", "decontaminate", str(clean_recipe), "--against", str(questions), "--out", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "1 of 24 documents" in out and "6 of 6 13-word runs found (100.00%); 2 texts have fewer words" in out
    (line,) = lines(folder / "exclude.jsonl")
    assert (line["source"], line["shard"], line["row"], line["reason"]) == ("prose", "a.jsonl", 5, "contaminated")
    assert line["matches"] == len(QUESTION.split()) - 12 and 0 < line["share"] < 0.2
    report = json.loads((folder / "report.json").read_text())
    assert report["documents"] == 24 and report["listed"] == {"prose": 1} and report["against"][0]["met"] == 6
    run = tmp_path / "run"
    excluded = f"data.exclude_documents={folder / 'exclude.jsonl'}"
    assert main(["train", str(clean_recipe), "--out", str(run), "train.rows=32", "checkpoints.every=9", excluded]) == 0
    finish = lines(run / "ledger.jsonl")[-1]
    assert finish["event"] == "finish" and finish["dropped"]["prose"]["contaminated"] >= 1


def test_min_share_and_words_decide_what_is_listed(corpus: Path, questions: Path, tmp_path: Path) -> None:
    def listed(name: str, *options: str) -> int:
        base = ["data", "decontaminate", str(corpus), "--text-key", "body", "--against", str(questions)]
        assert main([*base, "--out", str(tmp_path / name), *options]) == 0
        return len(lines(tmp_path / name / "exclude.jsonl"))

    assert listed("any") == 1
    assert listed("half", "--min-share", "0.5") == 0
    assert listed("short", "--words", "1") > 20  # the prose shares single words with the question


def test_exact_duplicates_are_listed_with_what_is_kept(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "lists" / "duplicates.jsonl"
    assert main(["data", "dedup", "exact", str(corpus), "--text-key", "body", "--out", str(path)]) == 0
    found = lines(path)
    assert [(line["shard"], line["row"], line["reason"]) for line in found] == [
        ("b.jsonl", 3, "duplicate"),
        ("b.jsonl", 8, "duplicate"),
    ]
    assert all(line["kept"] == {"source": "text", "shard": "a.jsonl", "row": 2} for line in found)
    assert "2 of 24 documents (8.33%)" in capsys.readouterr().out
    assert [entry.name for entry in path.parent.iterdir()] == ["duplicates.jsonl"], "nothing else is left behind"


def test_near_duplicates_are_listed_the_same_way(corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "near.jsonl"
    assert main(["data", "dedup", "minhash", str(corpus), "--text-key", "body", "--out", str(path)]) == 0
    assert [(line["shard"], line["row"], line["kept"]["row"]) for line in lines(path)] == [
        ("b.jsonl", 3, 2),
        ("b.jsonl", 8, 2),
    ]


def test_rows_that_cannot_be_read_are_counted_by_source_and_reason(
    corpus: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = corpus / "a.jsonl"
    rows = path.read_text().splitlines()
    rows[0], rows[1], rows[7], rows[9] = "{bad", '{"text": "x"}', "{bad", ""
    path.write_text("\n".join(rows) + "\n")
    options = [str(corpus), "--text-key", "body", "--out"]
    said = "text: 4 of 24 rows were passed over: 2 E_JSON, 1 E_SCHEMA, 1 empty"
    assert main(["data", "decontaminate", *options, str(tmp_path / "list"), "--against", str(questions)]) == 0
    out = capsys.readouterr().out
    assert said in out and "1 of 20 documents" in out
    report = json.loads((tmp_path / "list" / "report.json").read_text())
    assert report["documents"] == 20
    assert report["passed_over"] == {"text": {"E_JSON": 2, "E_SCHEMA": 1, "empty": 1}}
    for method in ("exact", "minhash"):
        assert main(["data", "dedup", method, *options, str(tmp_path / f"{method}.jsonl")]) == 0
        out = capsys.readouterr().out
        assert said in out and "2 of 20 documents" in out


@pytest.mark.parametrize("verb", [["dedup", "exact"], ["dedup", "minhash"], ["decontaminate"]])
def test_text_of_which_nothing_can_be_read_is_not_called_clean(
    corpus: Path, questions: Path, tmp_path: Path, failed: Failed, verb: list[str]
) -> None:
    more = ("--against", questions) if verb == ["decontaminate"] else ()
    line = failed(3, "data", *verb, corpus, "--out", tmp_path / "out", *more)
    assert "E_EMPTY" in line and "keys present: 'body'" in line and "--text-key" in line and "a.jsonl line=1" in line
    assert not (tmp_path / "out").exists()


def test_a_data_manifest_given_as_text_is_named_as_one(
    corpus: Path, questions: Path, tmp_path: Path, failed: Failed
) -> None:
    manifest, out = tmp_path / "all.json", tmp_path / "out"
    assert main(["data", "manifest", str(corpus), "--text-key", "body", "--out", str(manifest), "--workers", "1"]) == 0
    for line in (
        failed(2, "data", "dedup", "exact", manifest, "--out", out),
        failed(2, "data", "decontaminate", corpus, manifest, "--against", questions, "--out", out),
    ):
        assert "all.json" in line and "a data manifest, not text" in line and "data.manifest" in line
    line = failed(2, "data", "decontaminate", corpus, "--against", manifest, "--out", out)
    assert "a data manifest, not text" in line


def test_a_recipe_that_names_a_manifest_is_cleaned(corpus: Path, clean_recipe: Path, tmp_path: Path) -> None:
    manifest, recipe = tmp_path / "all.json", tmp_path / "manifest.toml"
    assert main(["data", "manifest", str(corpus), "--text-key", "body", "--out", str(manifest), "--workers", "1"]) == 0
    recipe.write_text(f"[data]\nmanifest = {json.dumps(str(manifest))}\n")
    assert main(["data", "dedup", "exact", str(recipe), "--out", str(tmp_path / "list.jsonl")]) == 0
    assert len(lines(tmp_path / "list.jsonl")) == 2


def test_without_the_extra_minhash_says_how_to_get_it(
    corpus: Path, tmp_path: Path, failed: Failed, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("datatrove", *(name for name in sys.modules if name.startswith("datatrove."))):
        monkeypatch.setitem(sys.modules, name, None)
    line = failed(2, "data", "dedup", "minhash", corpus, "--text-key", "body", "--out", tmp_path / "x.jsonl")
    assert "openelm-framework[dedup]" in line


def test_wrong_uses_are_one_line(
    corpus: Path, clean_recipe: Path, questions: Path, tmp_path: Path, failed: Failed
) -> None:
    out = tmp_path / "out"
    rest = ("--against", questions, "--out", out)
    assert "--words is 0" in failed(2, "data", "decontaminate", corpus, *rest, "--words", "0")
    assert "--min-share 2" in failed(2, "data", "decontaminate", corpus, *rest, "--min-share", "2")
    assert "--bands is 100000" in failed(2, "data", "dedup", "minhash", corpus, "--out", out, "--bands", "100000")
    assert "at most 100" in failed(2, "data", "dedup", "minhash", corpus, "--out", out, "--hashes", "101")
    assert "stands alone" in failed(2, "data", "decontaminate", clean_recipe, corpus, *rest)
    assert "exists already" in failed(4, "data", "decontaminate", corpus, "--against", questions, "--out", corpus)
    assert "no such file" in failed(3, "data", "dedup", "exact", tmp_path / "gone", "--out", out)


@pytest.mark.parametrize("place", [".", "corpus", "corpus/"])
def test_a_list_that_would_replace_a_folder_is_refused_before_the_work(
    corpus: Path, tmp_path: Path, failed: Failed, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (corpus / "b.jsonl").write_text("never read")
    line = failed(2, "data", "dedup", "exact", corpus / "b.jsonl", "--out", place)
    assert "--out" in line and "a folder" in line and "duplicates.jsonl" in line


def test_too_many_open_files_say_which_limit_to_raise(corpus: Path, tmp_path: Path) -> None:
    command = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300)); from openelm.cli import main; "
    words = ["data", "dedup", "minhash", str(corpus), "--text-key", "body", "--out", str(tmp_path / "list.jsonl")]

    def dedup(*more: str) -> subprocess.CompletedProcess[str]:
        code = f"{command} raise SystemExit(main({[*words, *more]!r}))"
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    done = dedup("--bands", "400", "--hashes", "1")
    assert done.returncode == 2, done.stderr
    assert "more than 300 open files" in done.stderr and "ulimit -n" in done.stderr and "--bands" in done.stderr
    assert not (tmp_path / "list.jsonl").exists() and list(tmp_path.glob(".dedup*")) == []
    words[2] = "exact"
    assert dedup().returncode == 0


def test_names_and_paths_cannot_move_the_cursor_or_add_lines(
    corpus: Path, questions: Path, tmp_path: Path, failed: Failed, capsys: pytest.CaptureFixture[str]
) -> None:
    wild = "\x1b[31mred\nforged\r"
    line = failed(2, "data", "manifest", corpus, "--text-key", "body", "--name", wild, "--out", tmp_path / "a.json")
    assert "--name" in line and "control characters" in line and not (tmp_path / "a.json").exists()
    plain, out = ["--text-key", "body"], str(tmp_path / f"{wild}[bold]")
    commands = [
        ["data", "manifest", str(corpus), *plain, "--out", f"{out}.json", "--workers", "1"],
        ["data", "merge", f"{out}.json", "--out", f"{out}-merged.json"],
        ["data", "dedup", "exact", str(corpus), *plain, "--out", f"{out}.jsonl"],
        ["data", "decontaminate", str(corpus), *plain, "--against", str(questions), "--out", out],
    ]
    for command in commands:
        assert main(command) == 0
        shown = capsys.readouterr().out
        assert r"\x1b[31mred\nforged\r[bold]" in shown, command
        assert "\x1b" not in shown and "\r" not in shown and "\nforged" not in shown


def test_the_screen_escapes_what_a_caller_forgot(capsys: pytest.CaptureFixture[str]) -> None:
    from openelm.cli.screen import Screen

    Screen().print("\x1b]0;title\x07 [bold]one[/] :smile:\ntwo\x9b")
    assert capsys.readouterr().out == "\\x1b]0;title\\x07 [bold]one[/] :smile:\ntwo\\x9b\n"
