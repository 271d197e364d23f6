"""Forged lists of data files: each is caught at level 0 by the name of the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from openelm.data.manifest_file import load_manifest
from openelm.files.hashes import canonical_json, sha256_bytes

from .conftest import assert_caught


def forge_list(path: Path, edit: Callable[[Any], None]) -> None:
    """Edit a list of files and make its own hash fit again."""
    content = json.loads(path.read_bytes())
    edit(content)
    del content["sha256"]
    content["sha256"] = sha256_bytes(canonical_json(content))
    path.write_bytes(canonical_json(content) + b"\n")


def of_other_text(content: Any) -> None:
    content["sources"][0]["source"]["shards"][0]["sha256"] = "ab" * 32


@pytest.mark.parametrize("name", ["data.json", "held-out.json"])
def test_a_list_of_files_that_is_changed_damaged_missing_or_a_link(workshop: Any, forged: Path, name: str) -> None:
    path = forged / name
    data = path.read_bytes()
    forge_list(path, lambda content: None)
    assert path.read_bytes() == data
    forge_list(path, of_other_text)
    assert_caught(workshop, forged, 0, name, "stand for data")
    path.write_bytes(data.replace(b'"weight":1.0', b'"weight":2.0', 1))
    assert_caught(workshop, forged, 0, name, "damaged")
    path.unlink()
    assert_caught(workshop, forged, 0, name, "cannot read")
    (forged.parent / name).write_bytes(data)
    path.symlink_to(forged.parent / name)
    assert_caught(workshop, forged, 0, name, "link")


def test_other_text_in_the_list_and_in_the_description_of_the_run(workshop: Any, forged: Path) -> None:
    forge_list(forged / "data.json", of_other_text)
    description = json.loads((forged / "run.json").read_bytes())
    description["data"]["sha256"] = load_manifest(forged / "data.json").sha256
    (forged / "run.json").write_text(json.dumps(description))
    assert_caught(workshop, forged, 0, "data_sha256 of the start at step 0")


def test_a_summary_that_is_not_that_of_the_list(workshop: Any, forged: Path) -> None:
    description = json.loads((forged / "run.json").read_bytes())
    description["data"]["sources"][0]["rows"] += 1
    (forged / "run.json").write_text(json.dumps(description))
    assert_caught(workshop, forged, 0, "run.json", "data is not the summary of data.json")


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("sources",), 3), (("sources", 0), None), (("sources", 0, "part"), "1"), (("sources", 0, "source"), []),
        (("sources", 0, "source", "shards"), [{}]), (("sources", 0, "source", "weight"), "much"),
        (("sources", 0, "source", "unheard-of"), 1), (("sources", 0, "source", "shards", 0, "rows"), "50"),
        (("sources", 0, "source", "shards", 0, "path"), 5), (("sources", 0, "source", "shards", 0, "path"), "a\0b"),
        (("sources", 0, "source", "weight"), 0.0), (("sources", 0, "source", "shards", 0, "rows"), 10**6),
        (("sources", 0, "source", "shards", 0, "blocks"), [[1, "x"]]),
        (("sources", 0, "source", "shards", 0, "blocks"), {"a": [[0, 1, 0, 0, 10**30]]}),
    ],
)  # fmt: skip
def test_a_hostile_list_is_a_failed_verification_and_never_a_crash(
    workshop: Any, forged: Path, place: tuple[Any, ...], value: Any
) -> None:
    def edit(content: Any) -> None:
        for key in place[:-1]:
            content = content[key]
        content[place[-1]] = value

    forge_list(forged / "data.json", edit)
    assert_caught(workshop, forged, 0, "data.json", "not a data manifest")


@pytest.mark.parametrize("weight", ["NaN", "1e999", "-1.0"])
def test_a_weight_that_is_no_share_is_refused(workshop: Any, forged: Path, weight: str) -> None:
    path = forged / "data.json"
    data = path.read_bytes().replace(b'"weight":1.0', b'"weight":' + weight.encode(), 1)
    start = data.index(b',"sha256":"')
    rest = data[start + len(b',"sha256":""') + 64 :]
    digest = sha256_bytes(data[:start] + rest[:-1]).encode()
    path.write_bytes(data[:start] + b',"sha256":"' + digest + b'"' + rest)
    assert_caught(workshop, forged, 0, "data.json", "not a data manifest", "weight")


def test_a_source_without_files_is_refused(workshop: Any, forged: Path) -> None:
    def edit(content: Any) -> None:
        content["sources"][0]["source"]["shards"] = []

    forge_list(forged / "data.json", edit)
    assert_caught(workshop, forged, 0, "data.json", "is empty")
