from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from openelm.data.manifest import SourceConfig, build_manifest
from openelm.data.manifest_file import survey_sources
from openelm.data.reading import read_documents
from openelm.errors import ConfigError, DataError


def source(*paths, **settings) -> SourceConfig:
    return SourceConfig(**{"name": "text", "paths": tuple(map(str, paths)), **settings})


def names(*paths, **settings) -> list[str]:
    return [shard.name for shard in build_manifest([source(*paths, **settings)]).sources[0].shards]


@pytest.fixture
def folder(tmp_path) -> Path:
    root = tmp_path / "data"
    for name in ("b.txt", "a.txt", "sub/c.md", "sub/deep/d.text", ".hidden.txt", ".git/x.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"text of {name}\n\nmore of {name}\n")
    return root


def test_folders_files_and_globs_expand_in_sorted_order(folder):
    assert names(folder) == ["a.txt", "b.txt", "sub/c.md", "sub/deep/d.text"]
    assert names(folder / "b.txt", folder / "a.txt") == ["b.txt", "a.txt"]
    assert names(folder / "*.txt") == ["a.txt", "b.txt"]
    assert names(folder / "**" / "[cd].*") == ["sub/c.md", "sub/deep/d.text"]
    assert names(folder / "b.txt", folder) == ["b.txt", "a.txt", "sub/c.md", "sub/deep/d.text"]
    assert names(folder, exclude=("b.*", "sub/deep/*")) == ["a.txt", "sub/c.md"]


def test_a_file_name_with_glob_characters_is_a_file(tmp_path):
    (tmp_path / "a[1].txt").write_text("x")
    assert names(tmp_path / "a[1].txt") == ["a[1].txt"]


@pytest.mark.parametrize(
    "path, settings, code, words",
    [
        ("missing.txt", {}, "E_PATH", "no such file"),
        ("*.nothing", {}, "E_PATH", "no file matches"),
        ("", {"exclude": ("*",)}, "E_PATH", "all 4 files are excluded"),
        ("x.bin", {}, "E_FORMAT", "allowed: .txt"),
        ("empty.txt", {}, "E_EMPTY", "is empty"),
        ("fifo.txt", {}, "E_PATH", "not a regular file"),
    ],
)
def test_a_path_that_gives_no_text_is_named(folder, path, settings, code, words):
    if path == "x.bin":
        (folder / path).write_bytes(b"x")
    if path == "empty.txt":
        (folder / path).touch()
    if path == "fifo.txt":
        os.mkfifo(folder / path)
    with pytest.raises(DataError, match=words) as caught:
        build_manifest([source(folder / path, **settings)])
    assert caught.value.code == code and str(folder / path).rstrip("/") in str(caught.value)


def test_an_unknown_suffix_is_read_when_the_format_is_given(folder):
    (folder / "x.bin").write_text("text")
    assert names(folder / "x.bin", format="txt") == ["x.bin"]


def test_sources_need_different_names(folder):
    with pytest.raises(ConfigError, match="different names"):
        build_manifest([source(folder), source(folder / "a.txt")])


def test_the_hash_does_not_depend_on_the_folder(folder, tmp_path):
    elsewhere = tmp_path / "else" / "where"
    shutil.copytree(folder, elsewhere)
    first, second = build_manifest([source(folder)]), build_manifest([source(elsewhere)])
    assert first.sha256 == second.sha256 and str(tmp_path) in first.sources[0].shards[0].path


@pytest.mark.parametrize("settings", [{"document_bytes": 3}, {"name": "x"}, {"weight": 2.0}, {"exclude": ("a.*",)}])
def test_the_hash_depends_on_what_decides_the_documents(folder, settings):
    assert build_manifest([source(folder)]).sha256 != build_manifest([source(folder, **settings)]).sha256


def test_the_hash_depends_on_every_byte(folder):
    before = build_manifest([source(folder)]).sha256
    (folder / "a.txt").write_text((folder / "a.txt").read_text().replace("more", "less"))
    assert build_manifest([source(folder)]).sha256 != before


def test_the_hash_is_that_of_canonical_json_without_places_and_times(folder):
    settings = {"name": 'a "shards":[] b', "text_key": '"shards":[]', "weight": 2.5}
    manifest = build_manifest([source(folder, document_bytes=3), source(folder / "a.txt", **settings)])
    value: dict[str, object] = {"sources": []}
    for plain in map(asdict, manifest.sources):
        for shard in plain["shards"]:
            for name in ("path", "modified_ns", "version"):
                del shard[name]
            shard["blocks"] = [list(block) for block in shard["blocks"]]
        value["sources"].append(plain)
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    assert manifest.sha256 == hashlib.sha256(text.encode()).hexdigest()


def test_a_summary_counts_what_the_sources_hold(folder):
    manifest = build_manifest([source(folder, document_bytes=3, weight=2.0)])
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file() and "/." not in str(path)]
    expected = {"name": "text", "files": 4, "rows": 8, "bytes": sum(sizes), "weight": 2.0}
    assert manifest.summary() == {"sha256": manifest.sha256, "sources": [expected]}


def test_a_changed_file_is_refused_with_both_hashes(folder):
    manifest = build_manifest([source(folder / "a.txt")])
    (shard,) = manifest.sources[0].shards
    (folder / "a.txt").write_text("other text\n")
    other = build_manifest([source(folder / "a.txt")]).sources[0].shards[0]
    with pytest.raises(DataError) as caught:
        list(read_documents(manifest))
    assert caught.value.code == "E_CHANGED" and shard.sha256 in str(caught.value) and other.sha256 in str(caught.value)


def test_a_file_with_the_same_bytes_and_another_time_is_the_same(folder):
    manifest = build_manifest([source(folder / "a.txt")])
    os.utime(folder / "a.txt", (1, 1))
    assert len(list(read_documents(manifest))) == 1


def test_a_whole_check_finds_a_change_that_kept_size_and_time(folder):
    manifest = build_manifest([source(folder / "a.txt")])
    status = (folder / "a.txt").stat()
    (folder / "a.txt").write_bytes((folder / "a.txt").read_bytes().replace(b"more", b"less"))
    os.utime(folder / "a.txt", ns=(status.st_atime_ns, status.st_mtime_ns))
    manifest.check_unchanged()
    with pytest.raises(DataError, match="changed"):
        manifest.check_unchanged(whole=True)


def test_a_file_that_is_gone_is_an_error(folder):
    manifest = build_manifest([source(folder / "a.txt")])
    (folder / "a.txt").unlink()
    with pytest.raises(DataError) as caught:
        list(read_documents(manifest))
    assert caught.value.code == "E_CHANGED"


def change_unseen(path: Path) -> None:
    """Give a file other bytes, but the same size and time of change."""
    status = path.stat()
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_files_that_look_as_they_did_are_not_read_again_and_the_others_are(folder):
    known = build_manifest([source(folder)])
    change_unseen(folder / "a.txt")
    change_unseen(folder / "sub" / "c.md")
    os.utime(folder / "sub" / "c.md", (1, 1))
    (folder / "b.txt").unlink()
    (folder / "new.txt").write_text("new")
    found = build_manifest([source(folder)], known={"text": known.sources[0].shards})
    shards = {shard.name: shard for shard in found.sources[0].shards}
    before = {shard.name: shard for shard in known.sources[0].shards}
    assert shards.keys() == {"a.txt", "new.txt", "sub/c.md", "sub/deep/d.text"}
    assert all(shards[name] == before[name] for name in ("a.txt", "sub/deep/d.text"))
    for name in ("new.txt", "sub/c.md"):
        assert shards[name].sha256 == hashlib.sha256((folder / name).read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("settings", "on_bad_row", "taken"),
    [
        ({}, "error", True), ({"weight": 2.0}, "error", True), ({"exclude": ("b.*",)}, "error", True),
        ({"format": "txt"}, "error", False), ({"document_bytes": 3}, "error", False),
        ({"text_key": "t"}, "error", False),
        ({"max_document_bytes": 99}, "error", False), ({}, "skip", False), ({"name": "other"}, "error", False),
    ],
)  # fmt: skip
def test_entries_are_taken_only_where_the_settings_that_decide_them_are_the_same(folder, settings, on_bad_row, taken):
    known = survey_sources([source(folder)])
    change_unseen(folder / "a.txt")
    (found,) = survey_sources([source(folder, **settings)], on_bad_row=on_bad_row, known=known)
    (fresh,) = survey_sources([source(folder, **settings)], on_bad_row=on_bad_row)
    assert found.source.shards[1:] == fresh.source.shards[1:]
    assert found.source.shards[0] == (known[0] if taken else fresh).source.shards[0]
    assert replace(found.source, shards=()) == replace(fresh.source, shards=())


def test_two_files_of_one_name_are_told_apart(tmp_path):
    for at in "xy":
        (tmp_path / at).mkdir()
        (tmp_path / at / "a.txt").write_text(at)
        os.utime(tmp_path / at / "a.txt", (1, 1))
    both = source(tmp_path / "x" / "a.txt", tmp_path / "y" / "a.txt")
    manifest = build_manifest([both])
    assert build_manifest([both], known={"text": manifest.sources[0].shards}) == manifest


@pytest.mark.parametrize("whole", [False, True])
def test_of_many_changed_files_the_first_in_the_list_is_named(tmp_path, whole):
    for at in range(100):
        (tmp_path / f"{at:02d}.txt").write_text("text")
    manifest = build_manifest([source(tmp_path)])
    for at in (97, 31, 64):
        (tmp_path / f"{at}.txt").write_text("other")
    (tmp_path / "98.txt").unlink()
    with pytest.raises(DataError) as caught:
        manifest.check_unchanged(whole=whole)
    assert caught.value.file == tmp_path / "31.txt"
