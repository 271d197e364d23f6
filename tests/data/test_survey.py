"""Surveys: the same manifest in one go, in parts, in processes, and after a kill; checks that name every bad file."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from openelm.data import survey as survey_module
from openelm.data.document import ReadOptions
from openelm.data.journal import Journal
from openelm.data.manifest import SourceConfig, build_manifest
from openelm.data.manifest_file import load_manifest, merge_surveys, read_manifest_file, write_manifest_file
from openelm.data.pool import run_tasks
from openelm.data.reading import read_documents
from openelm.data.survey import check_files, runner, survey
from openelm.errors import ConfigError, DataError

HERE = runner(0)


def config(folder, **settings) -> SourceConfig:
    return SourceConfig(**{"name": "text", "paths": (str(folder),), **settings})


@pytest.fixture
def folder(tmp_path, texts) -> Path:
    """Eleven files of five formats."""
    root = tmp_path / "data"
    root.mkdir()
    for at in range(11):
        some = texts[at::11]
        data = "".join(json.dumps({"text": text}) + "\n" for text in some).encode()
        if at % 5 == 0:
            (root / f"{at:02d}.jsonl").write_bytes(data)
        elif at % 5 == 1:
            (root / f"{at:02d}.jsonl.gz").write_bytes(gzip.compress(data))
        elif at % 5 == 2:
            (root / f"{at:02d}.jsonl.zst").write_bytes(zstandard.compress(data))
        elif at % 5 == 3:
            pyarrow.parquet.write_table(pyarrow.table({"text": some}), root / f"{at:02d}.parquet")
        else:
            (root / f"{at:02d}.txt").write_text("\n\n".join(some))
    return root


@pytest.fixture
def whole(folder, tmp_path) -> Path:
    out = tmp_path / "whole.json"
    survey(config(folder), out, run=HERE)
    return out


def test_a_survey_holds_what_a_scan_at_the_start_of_a_run_holds(folder, whole):
    assert load_manifest(whole) == build_manifest([config(folder)])


def test_processes_give_the_same_bytes(folder, whole, tmp_path):
    out = tmp_path / "processes.json"
    survey(config(folder), out, run=runner(3))
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("parts", [1, 2, 3, 13])
def test_parts_merged_in_any_order_are_the_manifest_made_in_one_go(folder, whole, tmp_path, parts):
    paths = [tmp_path / f"part-{part}.json" for part in range(1, parts + 1)]
    for part, path in enumerate(paths, 1):
        survey(config(folder), path, run=HERE, part=part, parts=parts)
    random.Random(parts).shuffle(paths)
    merged = tmp_path / "merged.json"
    write_manifest_file(merged, merge_surveys({path: read_manifest_file(path) for path in paths}))
    assert merged.read_bytes() == whole.read_bytes()


def test_whole_manifests_of_two_sources_are_joined(folder, whole, tmp_path):
    other = tmp_path / "other.json"
    survey(config(folder, name="other", exclude=("0*",)), other, run=HERE)
    both = tmp_path / "both.json"
    write_manifest_file(both, merge_surveys({path: read_manifest_file(path) for path in (whole, other)}))
    sources = (config(folder), config(folder, name="other", exclude=("0*",), weight=3.0))
    assert load_manifest(both, {"other": 3.0}).sha256 == build_manifest(sources).sha256
    with pytest.raises(ConfigError, match="allowed: text, other"):
        load_manifest(both, {"others": 3.0})


def test_parts_that_do_not_fit_are_refused_by_name(folder, tmp_path):
    def part(name: str, part: int, parts: int, **settings) -> Path:
        path = tmp_path / f"{name}.json"
        source = config(folder, text_key=settings.pop("text_key", "text"), exclude=settings.pop("exclude", ()))
        survey(source, path, run=HERE, part=part, parts=parts, **settings)
        return path

    first = part("first", 1, 2)
    for others, words in [
        ((), "part 2/2 is missing"),
        ((part("again", 1, 2),), "overlap: both are part 1 of 2"),
        ((part("third", 2, 3),), "one of 3"),
        ((part("skipping", 2, 2, on_bad_row="skip"),), "differ in on_bad_row: 'error' in .*first.json, 'skip' in"),
        ((part("blocks", 2, 2, block_bytes=64),), "differ in block_bytes"),
        ((part("fewer", 2, 2, exclude=("00*",)),), r"\(11 files\) and .*fewer.json \(10 files\)"),
    ]:
        with pytest.raises(ConfigError, match=words) as caught:
            merge_surveys({path: read_manifest_file(path) for path in (first, *others)})
        assert "first.json" in str(caught.value)
    with pytest.raises(ConfigError, match="part 1 of 2"):
        load_manifest(first)


def test_a_flipped_bit_anywhere_in_a_manifest_file_is_named(whole):
    data, draw = whole.read_bytes(), random.Random(0)
    for place in [*range(40), *draw.sample(range(len(data)), 100)]:
        whole.write_bytes(data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :])
        with pytest.raises(DataError) as caught:
            load_manifest(whole)
        assert caught.value.code in ("E_CORRUPT", "E_FORMAT") and caught.value.file == whole, place


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"3", b"\xff", b"[" * 99_999])
def test_another_file_is_no_manifest(tmp_path, data):
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(DataError) as caught:
        load_manifest(tmp_path / "a.json")
    assert caught.value.code in ("E_CORRUPT", "E_FORMAT")


def test_a_manifest_and_its_files_move_together(folder, whole, tmp_path, texts):
    count = len(list(read_documents(load_manifest(whole))))
    (tmp_path / "moved").mkdir()
    folder.rename(tmp_path / "moved" / "data")
    whole.rename(tmp_path / "moved" / "whole.json")
    assert len(list(read_documents(load_manifest(tmp_path / "moved" / "whole.json")))) == count > 50


def test_every_bad_file_is_named_and_the_good_ones_are_kept(folder, whole, tmp_path):
    (folder / "01.jsonl.gz").write_bytes(b"no gzip")
    (folder / "03.parquet").write_bytes(b"PAR1 cut")
    out = tmp_path / "out.json"
    with pytest.raises(DataError) as caught:
        survey(config(folder), out, run=HERE)
    assert caught.value.exit_code == 3 and not out.exists()
    assert all(name in str(caught.value) for name in ("2 of 11", "01.jsonl.gz", "E_CORRUPT", "03.parquet", "E_TRUNC"))
    for name in ("01.jsonl.gz", "03.parquet"):
        (folder / name).unlink()
    seen: list[int] = []
    survey(config(folder), out, run=HERE, observe=lambda progress: seen.append(progress.done_files))
    assert seen == [9] and load_manifest(out) == build_manifest([config(folder)])


def test_a_file_that_changed_since_it_was_journaled_is_looked_at_again(folder, tmp_path, monkeypatch):
    out = tmp_path / "out.json"
    monkeypatch.setattr(survey_module, "write_manifest_file", lambda path, surveys: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        survey(config(folder), out, run=HERE)
    monkeypatch.undo()
    (folder / "00.jsonl").write_text('{"text": "new"}\n')
    seen: list[int] = []
    survey(config(folder), out, run=HERE, observe=lambda progress: seen.append(progress.done_files))
    assert seen == [10, 11] and load_manifest(out) == build_manifest([config(folder)])
    assert not list(tmp_path.glob("*.journal"))


@pytest.mark.parametrize("tail", [b'{"half', b"\0\0\0\0\n", b'{"name": "x"}\n', b"[]\n"])
def test_a_torn_journal_is_cut_where_it_tore(folder, tmp_path, tail):
    shard = build_manifest([config(folder)]).sources[0].shards[0]
    path, state = tmp_path / "journal", (shard.bytes, shard.modified_ns, shard.version)
    with Journal(path, {}) as journal:
        journal.add(shard)
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    with Journal(path, {}) as journal:
        assert journal.find(shard.path, state) == shard
    assert path.read_bytes() == whole


def test_a_journal_of_other_settings_or_in_use_is_refused(tmp_path):
    with Journal(tmp_path / "journal", {"a": 1}), pytest.raises(ConfigError, match="another process"):
        Journal(tmp_path / "journal", {"a": 1})
    with pytest.raises(ConfigError, match="other settings"):
        Journal(tmp_path / "journal", {"a": 2})


def test_a_manifest_is_not_written_over_nor_into_the_listed_folder(folder, whole):
    with pytest.raises(ConfigError, match="exists"):
        survey(config(folder), whole, run=HERE)
    with pytest.raises(ConfigError, match="beside"):
        survey(config(folder), folder / "manifest.json", run=HERE)


@pytest.mark.parametrize("whole_files", [False, True])
def test_a_check_names_all_bad_files(folder, whole, whole_files):
    manifest = load_manifest(whole)
    check_files(manifest, whole=whole_files, run=HERE)
    (folder / "00.jsonl").write_text('{"text": "new"}\n')
    (folder / "04.txt").unlink()
    status = (folder / "09.txt").stat()
    (folder / "09.txt").write_bytes((folder / "09.txt").read_bytes()[::-1])
    os.utime(folder / "09.txt", ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(DataError) as caught:
        check_files(manifest, whole=whole_files, run=runner(2))
    found = {name for name in [*os.listdir(folder), "04.txt"] if name in str(caught.value)}
    assert found == {"00.jsonl", "04.txt"} | ({"09.txt"} if whole_files else set())
    assert caught.value.exit_code == 3


def test_a_check_stops_at_twenty_bad_files(tmp_path):
    (tmp_path / "data").mkdir()
    for at in range(30):
        (tmp_path / "data" / f"{at:02d}.txt").write_text("text")
    manifest = build_manifest([config(tmp_path / "data")])
    for at in range(30):
        (tmp_path / "data" / f"{at:02d}.txt").unlink()
    with pytest.raises(DataError, match="20 of 30 files cannot be used, and perhaps more"):
        check_files(manifest, whole=False, run=HERE)


def test_a_worker_that_is_killed_is_named(tmp_path, monkeypatch):
    started, start = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **b: started.append(start(*a, **b)) or started[-1])
    os.mkfifo(tmp_path / "never.jsonl")  # reading it waits for a writer that never comes
    task = ("never", tmp_path / "never.jsonl", "jsonl", ReadOptions("text"), True, 1)

    def kill() -> None:
        while not started:
            time.sleep(0.01)
        started[0].kill()

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(DataError, match="killed by signal 9") as caught:
        list(run_tasks("openelm.data.survey:scan_task", [task], workers=1))
    killer.join()
    assert caught.value.code == "E_WORKER"


COMMAND = [
    sys.executable,
    "-c",
    f"import sys; sys.path[:] = {sys.path!r}; from openelm.cli import main; main()",
    "data",
]


def test_a_survey_that_is_killed_goes_on_and_gives_the_same_bytes(tmp_path):
    """SIGKILL as soon as the journal holds some, but not all files; twice; no worker outlives its caller."""
    root, out, whole = tmp_path / "data", tmp_path / "out.json", tmp_path / "whole.json"
    root.mkdir()
    for at in range(40):
        (root / f"{at:02d}.jsonl").write_text('{"text": "some text"}\n' * 1000)
    survey(config(root), whole, run=HERE)
    command = [*COMMAND, "manifest", str(root), "--out", str(out), "--workers", "2"]
    journal, kept = tmp_path / "out.json.journal", []
    for least in (5, 15):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while process.poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") < least):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL and not out.exists()
        kept.append(journal.read_bytes().count(b"\n"))
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and f"going on: {kept[1] - 1} of 40 files are done" in done.stdout
    assert kept[0] < kept[1] < 41 and out.read_bytes() == whole.read_bytes() and not journal.exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # ray's own
def test_a_ray_cluster_gives_the_same_bytes_and_names_bad_files(folder, whole, tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="needs the extra `ray`")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    out = tmp_path / "ray.json"
    survey(config(folder), out, run=runner(1, ray="local"))
    assert out.read_bytes() == whole.read_bytes()
    (folder / "01.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match=r"01\.jsonl\.gz") as caught:
        check_files(load_manifest(whole), whole=False, run=runner(1, ray="local"))
    assert caught.value.code == "E_CHANGED"
