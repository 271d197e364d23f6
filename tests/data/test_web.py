"""Files of web servers: the same bytes whatever a server does short of refusing, never a mixture of two versions."""

from __future__ import annotations

import gzip
import http.server
import json
import random
import socket
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pyarrow
import pyarrow.parquet
import pytest

from openelm.data import remote, retry, web
from openelm.data.manifest import Manifest, SourceConfig, build_manifest
from openelm.data.reading import read_documents
from openelm.errors import DataError


def manifest_of(*paths) -> Manifest:
    return build_manifest([SourceConfig(name="text", paths=tuple(map(str, paths)))])


def read(manifest: Manifest) -> list[str]:
    return [document.text for document in read_documents(manifest)]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch) -> None:
    monkeypatch.setattr(retry.time, "sleep", lambda seconds: None)


class FaultyServer(http.server.BaseHTTPRequestHandler):
    """Serve files in memory, with ranges; `faults` says what goes wrong with the next requests for content."""

    files: ClassVar[dict[str, bytes]] = {}
    changed: ClassVar[dict[str, bytes]] = {}
    faults: ClassVar[list[str]] = []
    requests: ClassVar[list[str]] = []
    sent: ClassVar[list[int]] = []
    ranges, validator = True, "ETag"
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        fault = self.faults.pop(0) if self.faults and body else ""
        if body:
            self.requests.append(fault or self.headers.get("Range", "whole"))
        if fault == "change":
            self.files.update(self.changed)
        if fault == "redirect":
            self.send_response(307)
            self.send_header("Location", self.path)
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif fault.isdigit() or self.path not in self.files:
            self.send_response(int(fault or 404))
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self._send(self.files[self.path], body, fault)

    def _version(self, data: bytes) -> dict[str, str]:
        """Return the header that tells this content from another."""
        number = zlib.crc32(data)
        date = f"Mon, 23 Nov 2026 {number % 24:02d}:{number // 24 % 60:02d}:{number // 1440 % 60:02d} GMT"
        versions = {"ETag": f'"{number}"', "weak ETag": f'W/"{number}"', "Last-Modified": date}
        return {self.validator.removeprefix("weak "): versions[self.validator]} if self.validator in versions else {}

    def _send(self, data: bytes, body: bool, fault: str) -> None:
        asked, part, version = self.headers.get("Range"), data, self._version(data)
        expected = self.headers.get("If-Range")
        if not self.ranges or fault == "ignore" or (expected and expected not in version.values()):
            asked = None
        self.send_response(206 if asked else 200)
        if asked:
            first, last = asked.removeprefix("bytes=").split("-")
            part = data[int(first) : int(last) + 1]
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}")
        for name, value in version.items():
            self.send_header(name, value)
        if fault == "less":  # a whole answer, but of fewer bytes than were asked for
            part = part[: len(part) // 2]
        self.send_header("Content-Length", str(len(part)))
        if fault in ("short", "stall"):
            part = part[: len(part) // 2]
        if body:
            self.sent.append(len(part))  # first: with the head of an empty answer the client has all of it
        self.end_headers()
        if body:
            self._write(part, fault)

    def _write(self, part: bytes, fault: str) -> None:
        step = 1 + len(part) // 4 if fault == "slow" else max(1, len(part))
        for at in range(0, len(part), step):
            self.wfile.write(part[at : at + step])
            if fault == "slow":
                threading.Event().wait(0.001)
        if fault == "stall":
            threading.Event().wait(0.5)
        if fault in ("short", "stall"):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def folder(tmp_path, texts) -> Path:
    data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    (tmp_path / "a.jsonl").write_bytes(data)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(data))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "e.parquet", row_group_size=20)
    return tmp_path


@pytest.fixture
def server(folder, monkeypatch) -> Iterator[str]:
    files = {f"/{path.name}": path.read_bytes() for path in folder.iterdir()}
    changed = {"/a.jsonl": files["/a.jsonl"].replace(b"model", b"MODEL")}
    for name, value in {"files": files, "changed": changed, "faults": [], "requests": [], "sent": []}.items():
        monkeypatch.setattr(FaultyServer, name, value)
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FaultyServer)
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{running.server_address[1]}"
    running.shutdown()
    running.server_close()
    thread.join()


FAULTS = ("500", "503", "429", "short", "less", "slow", "redirect")


def drawn(seed: int, *more: str) -> list[str]:
    """Draw faults, no more than two in a row: the third try is the last."""
    draw, kinds = random.Random(seed), (*FAULTS, "", *more)
    return [fault for _ in range(40) for fault in (draw.choice(kinds), draw.choice(kinds), "")]


def test_fifty_runs_of_random_faults_give_the_bytes_of_the_disk(folder, server, monkeypatch):
    local = manifest_of(folder / "b.jsonl.gz", folder / "e.parquet")
    texts = read(local)
    monkeypatch.setattr(remote, "_CHUNK_BYTES", 3000)
    for seed in range(50):
        monkeypatch.setattr(FaultyServer, "faults", drawn(seed, "ignore"))
        far = manifest_of(f"{server}/b.jsonl.gz", f"{server}/e.parquet")
        assert far.sha256 == local.sha256
        if seed % 25 == 0:
            monkeypatch.setattr(FaultyServer, "faults", drawn(seed + 1000))
            assert read(far) == texts
    assert {*FAULTS, "ignore"} <= set(FaultyServer.requests)


@pytest.mark.parametrize("validator", ["ETag", "weak ETag", "Last-Modified"])
def test_fifty_runs_in_which_the_file_changes_give_one_version_or_say_so(folder, server, monkeypatch, validator):
    monkeypatch.setattr(FaultyServer, "validator", validator)
    original = FaultyServer.files["/a.jsonl"]
    old = manifest_of(folder / "a.jsonl").sha256
    (folder / "a.jsonl").write_bytes(FaultyServer.changed["/a.jsonl"])
    new = manifest_of(folder / "a.jsonl").sha256
    found = []
    for seed in range(50):
        FaultyServer.files["/a.jsonl"] = original
        faults = drawn(seed, "ignore", "short", "short")
        faults[random.Random(seed).randrange(4)] = "change"
        monkeypatch.setattr(FaultyServer, "faults", faults)
        try:
            found.append(manifest_of(f"{server}/a.jsonl").sha256)
        except DataError as error:
            assert error.file == f"{server}/a.jsonl"
            found.append(error.code)
    assert set(found) <= {old, new, "E_CHANGED"} and found.count("E_CHANGED") > 5 and found.count(old) > 5


def test_a_file_that_changes_between_two_reads_of_a_block_is_refused(folder, server, monkeypatch):
    manifest, texts = manifest_of(f"{server}/a.jsonl"), read(manifest_of(folder / "a.jsonl"))
    original = FaultyServer.files["/a.jsonl"]
    monkeypatch.setattr(remote, "_CHUNK_BYTES", 100)
    for place in range(0, 40, 7):
        FaultyServer.files["/a.jsonl"] = original
        monkeypatch.setattr(FaultyServer, "faults", ["slow"] * place + ["change"])
        seen = []
        with pytest.raises(DataError) as caught:
            for document in read_documents(manifest):
                seen.append(document.text)
        assert caught.value.code == "E_CHANGED" and seen == texts[: len(seen)]


@pytest.mark.parametrize("validator", ["ETag", "none"])
@pytest.mark.parametrize("size", [0.5, 2])
def test_a_file_that_gets_shorter_or_longer_while_it_is_read_is_refused(server, monkeypatch, validator, size):
    monkeypatch.setattr(FaultyServer, "validator", validator)
    manifest, data = manifest_of(f"{server}/a.jsonl"), FaultyServer.files["/a.jsonl"]
    monkeypatch.setattr(FaultyServer, "changed", {"/a.jsonl": (data * 2)[: int(len(data) * size)]})
    monkeypatch.setattr(remote, "_CHUNK_BYTES", 100)
    monkeypatch.setattr(FaultyServer, "faults", ["slow", "slow", "change"])
    with pytest.raises(DataError, match="changed") as caught:
        read(manifest)
    assert caught.value.code == "E_CHANGED" and caught.value.file == f"{server}/a.jsonl"
    FaultyServer.files["/a.jsonl"] = data
    for faults in (["short", "change"], ["short", "change", "slow"]):
        monkeypatch.setattr(FaultyServer, "faults", faults)
        with pytest.raises(DataError) as caught:
            manifest_of(f"{server}/a.jsonl")
        # without any version a shorter answer looks like a broken one, however often it is asked for
        assert caught.value.code == "E_CHANGED" or (validator, size, caught.value.code) == ("none", 0.5, "E_READ")
        FaultyServer.files["/a.jsonl"] = data


def test_no_byte_that_came_is_asked_for_again(folder, server, monkeypatch):
    faults = ["503", "short", "less", "redirect", "short", "500", "500", "less", "429"]
    monkeypatch.setattr(FaultyServer, "faults", faults)
    assert manifest_of(f"{server}/a.jsonl").sha256 == manifest_of(folder / "a.jsonl").sha256
    assert sum(FaultyServer.sent) == (folder / "a.jsonl").stat().st_size and not FaultyServer.faults


@pytest.mark.parametrize("validator", ["none", "weak ETag"])
def test_without_a_strong_version_a_broken_answer_is_asked_for_whole(folder, server, monkeypatch, validator):
    monkeypatch.setattr(FaultyServer, "validator", validator)
    monkeypatch.setattr(FaultyServer, "faults", ["short", "short"])
    assert manifest_of(f"{server}/a.jsonl").sha256 == manifest_of(folder / "a.jsonl").sha256
    assert FaultyServer.requests == ["short", "short", "whole"]
    monkeypatch.setattr(FaultyServer, "faults", ["short"] * 3)
    with pytest.raises(DataError, match="in 3 tries"):
        manifest_of(f"{server}/a.jsonl")


def test_a_server_that_falls_silent_is_asked_again(folder, server, monkeypatch):
    monkeypatch.setattr(web, "_STALL_SECONDS", 0.1)
    monkeypatch.setattr(FaultyServer, "faults", ["stall", "stall"])
    assert manifest_of(f"{server}/a.jsonl").sha256 == manifest_of(folder / "a.jsonl").sha256
    assert sum(FaultyServer.sent) == (folder / "a.jsonl").stat().st_size


@pytest.mark.parametrize(("fault", "requests"), [("503", 3), ("403", 1), ("401", 1)])
def test_a_fault_that_stays_ends_after_three_tries_and_a_refusal_at_once(server, monkeypatch, fault, requests):
    manifest = manifest_of(f"{server}/a.jsonl")
    monkeypatch.setattr(FaultyServer, "faults", [fault] * 100)
    with pytest.raises(DataError) as caught:
        read(manifest)
    assert caught.value.code == "E_READ" and caught.value.file == f"{server}/a.jsonl"
    assert FaultyServer.requests.count(fault) == requests


@pytest.mark.parametrize("fault", ["short", "less"])
def test_answers_that_get_ever_shorter_end_after_three_without_a_byte(server, monkeypatch, fault):
    manifest = manifest_of(f"{server}/a.jsonl")
    monkeypatch.setattr(FaultyServer, "faults", [fault] * 100)
    with pytest.raises(DataError, match="in 3 tries") as caught:
        read(manifest)
    assert caught.value.code == "E_READ" and FaultyServer.sent[-4:].count(0) == 3


def test_a_server_without_ranges_gives_whole_files_and_is_refused_for_parts(folder, server, monkeypatch):
    monkeypatch.setattr(FaultyServer, "ranges", False)
    monkeypatch.setattr(FaultyServer, "faults", ["short", "500"])
    monkeypatch.setattr(remote, "_CHUNK_BYTES", 1000)
    manifest = manifest_of(f"{server}/a.jsonl")
    assert manifest.sha256 == manifest_of(folder / "a.jsonl").sha256
    manifest.check_unchanged(whole=True)
    with pytest.raises(DataError, match=r"ignores the range .*; copy the files to a disk") as caught:
        read(manifest)
    assert caught.value.code == "E_READ"


def test_a_server_that_is_gone_is_named(server):
    with pytest.raises(DataError, match="cannot read the file") as caught:
        manifest_of(f"{server}/none.jsonl")
    assert caught.value.code == "E_CHANGED"
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(DataError, match="cannot read it") as caught:
            manifest_of(f"http://127.0.0.1:{unused.getsockname()[1]}/a.jsonl")
    assert caught.value.code == "E_READ"
