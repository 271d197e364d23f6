from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from openelm.data import stream as stream_module
from openelm.data.manifest import SourceConfig, build_manifest
from openelm.data.worker import Job
from openelm.errors import DataError


def take(stream, steps):
    with stream:
        hashes = [next(stream).sha256 for _ in range(steps)]
        return hashes, json.dumps(stream.cursors())


def children() -> set[int]:
    return {int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


@pytest.mark.parametrize("rows, lanes, ahead, counts", [(8, 4, 1, (1, 4)), (2, 8, 8, (2,))])
def test_batches_are_the_same_for_every_number_of_workers(open_stream, write_jsonl, texts, rows, lanes, ahead, counts):
    path = write_jsonl(texts)
    expected = take(open_stream(path, rows=rows, lanes=lanes), 40)
    before = children()
    for workers in counts:
        stream = open_stream(path, rows=rows, lanes=lanes, workers=workers, read_ahead_batches=ahead)
        assert len(children() - before) == workers
        assert take(stream, 40) == expected
        assert children() == before


def test_resume_with_another_number_of_workers_goes_on_exactly(open_stream, write_jsonl, texts):
    path = write_jsonl(texts)
    expected, _ = take(open_stream(path), 20)
    cursors, found = None, []
    for workers, steps in ((2, 3), (0, 5), (1, 4), (4, 8)):
        with open_stream(path, workers=workers, cursors=cursors) as stream:
            found += [next(stream).sha256 for _ in range(steps)]
            cursors = json.loads(json.dumps(stream.cursors()))
    assert found == expected


@pytest.mark.parametrize("when", ["at work", "before its first answer"])
def test_a_killed_worker_is_an_error_within_seconds(open_stream, write_jsonl, texts, when):
    before = children()
    stream = open_stream(write_jsonl(texts), workers=2, read_ahead_batches=2)
    if when == "at work":
        next(stream)
    os.kill(max(children() - before), signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(DataError, match="killed by signal 9") as caught:
        for _ in range(10):
            next(stream)
    assert caught.value.code == "E_WORKER" and caught.value.exit_code == 3
    assert time.monotonic() - started < 30  # a bound against hanging, not a speed
    assert children() == before


def test_an_error_in_a_worker_comes_at_the_same_step_with_the_same_words(open_stream, tmp_path, texts):
    path = tmp_path / "data.jsonl"
    lines = [json.dumps({"text": text}) for text in texts] + ["{not json"]
    path.write_text("\n".join(lines))
    outcomes = []
    for workers in (0, 1, 2):
        hashes = []
        with (
            open_stream(path, workers=workers, read_ahead_batches=8) as stream,
            pytest.raises(DataError) as caught,
        ):
            for batch in stream:
                hashes.append(batch.sha256)
        outcomes.append((hashes, str(caught.value), caught.value.line))
    assert outcomes[0] == outcomes[1] == outcomes[2]
    assert outcomes[0][2] == 62 and str(path) in outcomes[0][1]


def test_another_tokenizer_under_the_same_path_is_refused(
    open_stream, write_jsonl, texts, tokenizer, tokenizer_path, monkeypatch
):
    monkeypatch.setattr(tokenizer, "sha256", "0" * 64)
    with (
        open_stream(write_jsonl(texts), workers=1) as stream,
        pytest.raises(DataError, match="tokenizer changed"),
    ):
        next(stream)


def test_a_bug_in_a_worker_arrives_with_its_traceback(open_stream, write_jsonl, texts, monkeypatch):
    monkeypatch.setattr(stream_module, "Job", lambda *values: Job(*values[:6], "length", *values[7:]))
    with open_stream(write_jsonl(texts), workers=1) as stream, pytest.raises(RuntimeError, match="in next_part"):
        next(stream)


_PARENT = """
import sys
from pathlib import Path
from openelm.data.manifest import SourceConfig, build_manifest
from openelm.data.stream import BatchStream, DataConfig
from openelm.text.tokenizer import load_tokenizer

sources = (SourceConfig(name="text", paths=(sys.argv[1],)),)
config = DataConfig(sources=sources, lanes=2, min_characters=0, min_tokens=0, workers=2)
path = Path(sys.argv[2])
stream = BatchStream(config, build_manifest(sources), load_tokenizer(path), path, seed=0, rows=2, length=16)
next(stream)
maps = [Path(f"/proc/{p._process.pid}/maps").read_text() for p in stream._sources]
print(any("libtorch" in text for text in maps), *(p._process.pid for p in stream._sources), flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("end", ["killed", "exits"])
def test_workers_end_with_their_parent_and_never_load_torch(write_jsonl, texts, tokenizer_path, end):
    command = [sys.executable, "-c", _PARENT, str(write_jsonl(texts)), str(tokenizer_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        torch_is_loaded, *workers = parent.stdout.readline().split()
        assert torch_is_loaded == "False" and len(workers) == 2
        parent.kill() if end == "killed" else parent.stdin.close()
        parent.wait()
    deadline = time.monotonic() + 20
    while any(_alive(worker) for worker in workers):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.01)


def _alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_ctrl_c_reaches_the_trainer_only(open_stream, write_jsonl, texts):
    before = children()
    with open_stream(write_jsonl(texts), workers=2, read_ahead_batches=1) as stream:
        next(stream)
        for worker in children() - before:
            os.kill(worker, signal.SIGINT)
            os.kill(worker, signal.SIGTERM)
        for _ in range(10):
            next(stream)


def test_the_file_of_a_running_stream_may_not_change(open_stream, write_jsonl, texts):
    path = write_jsonl(texts)
    manifest = build_manifest([SourceConfig(name="text", paths=(str(path),))])
    path.write_text(path.read_text().replace("model", "modal"))
    with pytest.raises(DataError, match=manifest.sources[0].shards[0].sha256) as caught:
        open_stream(path, manifest=manifest)
    assert caught.value.code == "E_CHANGED"
