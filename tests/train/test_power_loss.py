"""What a rename publishes is on disk before it: no order of writes loses a checkpoint when the power goes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from openelm.files.atomic import write_atomic
from openelm.files.published import publish_folder


class Disk:
    """Records in which order files are synchronised and renamed, by inode."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.synced: list[int] = []
        self.renames: list[tuple[Path, set[int], int, int]] = []
        """(target, inodes that get a name, inode of the folder, how many were synchronised before)."""
        sync, rename, replace = os.fsync, os.rename, os.replace

        def record_sync(descriptor: int) -> None:
            sync(descriptor)
            self.synced.append(os.fstat(descriptor).st_ino)

        def recorded(move: Any) -> Any:
            def record(source: Path, target: Path) -> None:
                inside = source.iterdir() if source.is_dir() else ()
                inodes = {path.stat().st_ino for path in (source, *inside)}
                self.renames.append((target, inodes, target.parent.stat().st_ino, len(self.synced)))
                move(source, target)

            return record

        monkeypatch.setattr(os, "fsync", record_sync)
        monkeypatch.setattr(os, "rename", recorded(rename))
        monkeypatch.setattr(os, "replace", recorded(replace))

    def check(self) -> Iterator[Path]:
        """Yield each path that was published, having checked what came before its rename and after."""
        for target, inodes, folder, place in self.renames:
            if target.name.startswith((".", "damaged-")):
                continue
            assert inodes <= set(self.synced[:place]), f"{target} was renamed before all of it was on disk"
            assert folder in self.synced[place:], f"the name {target} was not made to last"
            yield target


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def test_a_folder_and_all_its_files_are_on_disk_before_they_get_their_name(disk: Disk, tmp_path: Path) -> None:
    for content in (b"first", b"second"):
        with publish_folder(tmp_path / "folder", replace=True) as temporary:
            (temporary / "a.bin").write_bytes(content)
            (temporary / "b.bin").write_bytes(content)
    assert list(disk.check()).count(tmp_path / "folder") == 2


def test_a_file_is_on_disk_before_it_replaces_another(disk: Disk, tmp_path: Path) -> None:
    write_atomic(tmp_path / "file", b"content")
    assert list(disk.check()) == [tmp_path / "file"]


@pytest.mark.parametrize("background", ["true", "false"])
def test_checkpoints_of_a_run_are(bench: Any, disk: Disk, tmp_path: Path, background: str) -> None:
    bench.train(tmp_path, f"checkpoints.background={background}")
    published = {path.name for path in disk.check()}
    assert published >= {"step-00000003", "step-00000006", "step-00000009", "step-00000012", "tokenizer", "run.json"}
