"""Documents that a list names are dropped, counted, and part of what a run is."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from openelm.data.exclude import CONTAMINATED, DUPLICATE, exclusion_line
from openelm.data.manifest import SourceConfig, build_manifest
from openelm.errors import DataError


@pytest.fixture
def write_list(tmp_path):
    def write(path, rows, name="list.jsonl"):
        (source,) = build_manifest([SourceConfig(name="text", paths=(str(path),))]).sources
        lines = [exclusion_line(source, source.shards[0], row, reason) for row, reason in rows]
        (tmp_path / name).write_bytes(b"".join(lines))
        return str(tmp_path / name)

    return write


def numbers_seen(stream, epochs=1):
    """Numbers of the documents that a one-lane stream gives in its first epochs."""
    seen = []
    while stream.cursors()[1].get("sources", [[0]])[0][0] < epochs:
        row = next(stream).inputs[0].tolist()
        seen.append(row)
    text = bytes(token for row in seen for token in row if token < 256).decode(errors="replace")
    return {int(number) for number in re.findall(r"(?:^|\D)(\d{3}) ", text)}


@pytest.mark.parametrize("packing", ["documents", "apple"])
def test_listed_documents_are_never_seen_and_are_counted_by_reason(open_stream, write_jsonl, write_list, packing):
    path = write_jsonl([f"{number:03d} some words of a document" for number in range(40)])
    excluded = write_list(path, [(7, CONTAMINATED), (8, DUPLICATE), (30, CONTAMINATED)])
    stream = open_stream(path, lanes=1, rows=1, length=64, packing=packing, exclude_documents=excluded)
    seen = numbers_seen(stream)
    assert {7, 8, 30}.isdisjoint(seen) and len(seen) >= 36
    passed = stream.cursors()[1]["sources"][0][0]
    counts = stream.counts()["text"]
    assert set(counts) == {"contaminated", "duplicate"}
    assert 2 * passed <= counts["contaminated"] <= 2 * passed + 2


def test_batches_are_those_of_a_corpus_without_the_listed_documents(open_stream, write_jsonl, write_list):
    """One lane and one block, so that the order is the same but for what is missing."""
    path = write_jsonl([f"{number:03d} words" for number in range(9)])
    everything = open_stream(path, lanes=1, rows=1, length=9)
    rows = [next(everything).inputs[0].tolist() for _ in range(27)]
    ids = [token for row in rows for token in row]
    documents = bytes(token for token in ids if token < 256).decode().split(" words")
    excluded = write_list(path, [(2, CONTAMINATED), (5, CONTAMINATED)])
    rest = open_stream(path, lanes=1, rows=1, length=9, exclude_documents=[excluded])
    found = [token for _ in range(18) for token in next(rest).inputs[0].tolist()]
    kept = bytes(token for token in found if token < 256).decode().split(" words")
    expected = [document for document in documents if document not in ("002", "005")]
    assert kept[:-1] == expected[: len(kept) - 1]


def test_workers_and_resume_see_the_same_exclusions(open_stream, write_jsonl, write_list, texts):
    path = write_jsonl(texts)
    settings = {"exclude_documents": write_list(path, [(row, DUPLICATE) for row in range(0, 60, 3)])}
    outcomes = []
    for workers in (0, 1):
        with open_stream(path, workers=workers, **settings) as stream:
            hashes = [next(stream).sha256 for _ in range(6)]
            cursors = json.loads(json.dumps(stream.cursors()))
        with open_stream(path, workers=workers, cursors=cursors, **settings) as stream:
            outcomes.append(hashes + [next(stream).sha256 for _ in range(6)])
    with open_stream(path, **settings) as stream:
        assert [next(stream).sha256 for _ in range(12)] == outcomes[0] == outcomes[1]


def test_a_run_does_not_go_on_with_another_list(open_stream, write_jsonl, write_list, texts):
    path = write_jsonl(texts)
    one, two = write_list(path, [(1, DUPLICATE)]), write_list(path, [(2, DUPLICATE)], "other.jsonl")
    cursors = open_stream(path, exclude_documents=one).cursors()
    open_stream(path, exclude_documents=one, cursors=cursors)
    for other in (two, [one, two], []):
        with pytest.raises(DataError, match="exclude_documents was"):
            open_stream(path, exclude_documents=other, cursors=cursors)


def test_a_file_that_was_moved_and_renamed_is_still_known(open_stream, write_jsonl, write_list, texts, tmp_path):
    path = write_jsonl(texts)
    excluded = write_list(path, [(3, DUPLICATE)])
    (tmp_path / "elsewhere").mkdir()
    moved = shutil.move(path, tmp_path / "elsewhere" / "renamed.jsonl")
    stream = open_stream(moved, exclude_documents=excluded)
    for _ in range(200):
        next(stream)
    assert stream.counts()["text"]["duplicate"] >= 1


def test_a_list_about_a_file_that_changed_since_is_refused(open_stream, write_jsonl, write_list, texts):
    excluded = write_list(write_jsonl(texts), [(3, DUPLICATE)])
    path = write_jsonl([*texts, "one more"])
    with pytest.raises(DataError, match="other content than when the list was made") as caught:
        open_stream(path, exclude_documents=excluded)
    assert caught.value.code == "E_CHANGED" and caught.value.line == 1


def test_a_list_about_other_files_altogether_is_refused(open_stream, write_jsonl, write_list, texts):
    excluded = write_list(write_jsonl(texts, "a.jsonl"), [(3, DUPLICATE)])
    with pytest.raises(DataError, match="none of the 1 listed documents"):
        open_stream(write_jsonl(texts[1:], "b.jsonl"), exclude_documents=excluded)


@pytest.mark.parametrize(
    "line, code",
    [
        ("{", "E_JSON"),
        ("[]", "E_SCHEMA"),
        ('{"source": "text", "shard": "data.jsonl", "row": 1}', "E_SCHEMA"),
        ('{"source": "a", "shard": "b", "shard_sha256": "c", "row": -1, "reason": "duplicate"}', "E_SCHEMA"),
        ('{"source": "a", "shard": "b", "shard_sha256": "c", "row": true, "reason": "duplicate"}', "E_SCHEMA"),
        ('{"source": "a", "shard": "b", "shard_sha256": "c", "row": 1, "reason": "ugly"}', "E_SCHEMA"),
    ],
)
def test_damaged_lists_are_refused_by_line(open_stream, write_jsonl, texts, tmp_path, line, code):
    (tmp_path / "list.jsonl").write_text(line + "\n")
    with pytest.raises(DataError) as caught:
        open_stream(write_jsonl(texts), exclude_documents=str(tmp_path / "list.jsonl"))
    assert caught.value.code == code and caught.value.line == 1


def test_a_missing_list_is_refused(open_stream, write_jsonl, texts, tmp_path):
    with pytest.raises(DataError, match="no such file") as caught:
        open_stream(write_jsonl(texts), exclude_documents=str(tmp_path / "gone.jsonl"))
    assert (caught.value.code, caught.value.exit_code) == ("E_PATH", 3)
    with pytest.raises(DataError, match="cannot read") as caught:
        open_stream(write_jsonl(texts), exclude_documents=str(tmp_path))
    assert caught.value.code == "E_READ"
