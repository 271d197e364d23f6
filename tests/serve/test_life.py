"""A server's end, and an engine that fails."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

LONG = {"model": "tiny", "prompt": "Once", "max_tokens": 1900, "logit_bias": {"257": -100}}


def posted(body: Any) -> bytes:
    data = json.dumps(body).encode()
    top = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{top}Connection: close\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data


def received(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(65536), b""))


def ended(server: Any, within_seconds: float) -> None:
    began = time.monotonic()
    assert server.process.wait(timeout=within_seconds + 5) == 0, server.log.read_text()
    assert time.monotonic() - began < within_seconds
    assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_server_ends_at_once(start: Any, folder: Path, number: int) -> None:
    server = start(folder)
    with socket.create_connection(server.address):
        server.process.send_signal(number)
        ended(server, 3)


def test_answers_in_the_making_are_finished(start: Any, folder: Path) -> None:
    server = start(folder)
    with (
        socket.create_connection(server.address, timeout=20) as whole,
        socket.create_connection(server.address) as part,
    ):
        whole.sendall(posted({**LONG, "max_tokens": 500}))
        part.sendall(posted({**LONG, "max_tokens": 500, "stream": True}))
        server.wait_until(lambda: server.metric("active_slots") == 2, 5)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        with pytest.raises(OSError):
            socket.create_connection(server.address, timeout=2).close()
        answer, stream = received(whole), received(part)
    assert answer.startswith(b"HTTP/1.1 200")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["usage"]["completion_tokens"] == 500
    assert b'"finish_reason": "length"' in stream and b"data: [DONE]" in stream
    ended(server, 10)


@pytest.mark.faults
@pytest.mark.parametrize("turn", [pytest.param(0, marks=pytest.mark.quick), *range(1, 50)])
def test_what_cannot_be_finished_in_time_ends_with_an_error(start: Any, folder: Path, turn: int) -> None:
    server = start(folder, limits={"drain_seconds": 0.3}, served={"slots": 1})
    kinds = [{"stream": True}, {"stream": True}, {"stream": False}, {"stream": False}]
    connections = [socket.create_connection(server.address, timeout=20) for _ in kinds]
    for connection, kind in zip(connections, kinds, strict=True):
        connection.sendall(posted({**LONG, **kind, "n": 8}))
    server.wait_until(lambda: server.metric("active_slots") == 1, 5)
    time.sleep(0.05 * (turn % 5))
    server.process.send_signal(signal.SIGTERM)
    answers = [received(connection) for connection in connections]
    for connection in connections:
        connection.close()
    ended(server, 10)
    for answer in answers:
        top, _, body = answer.partition(b"\r\n\r\n")
        assert top.split()[1] in (b"200", b"503")
        if top.split()[1] == b"503":
            assert json.loads(body)["error"]["code"] == "shutting_down"
        else:
            events = [line[6:] for line in body.splitlines() if line.startswith(b"data: ")]
            assert events[-1] == b"[DONE]"
            assert json.loads(events[-2])["error"]["code"] == "shutting_down"
            assert all(json.loads(event) for event in events[:-1])


def test_the_command_prints_its_address_and_ends_with_code_0(folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(
        [sys.executable, "-m", "openelm", "serve", str(folder), "--port", "0", "--name", "tiny", "--context", "64"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        assert process.stdout
        address = process.stdout.readline().split()[0]
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(posted({**LONG, "max_tokens": 200}))
            answer = json.loads(received(connection).partition(b"\r\n\r\n")[2])
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=20)
    finally:
        process.kill()
    assert answer["usage"]["total_tokens"] == 65  # the last token is not read back
    assert process.returncode == 0
    assert "Ctrl-C ends it" in said and "Traceback" not in said


def test_a_taken_port_is_an_error_of_the_user(base: Any, folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "openelm", "serve", str(folder), "--port", str(base.address[1])],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == 2 and "cannot listen" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("wrong", [("--slots", "0"), ("--context", "0"), ("--context", "4096"), ("--queue", "-1")])
def test_numbers_that_cannot_be_are_errors_of_the_user(folder: Path, wrong: tuple[str, str]) -> None:
    from openelm.cli import main

    assert main(["serve", str(folder), "--port", "0", *wrong]) == 2
