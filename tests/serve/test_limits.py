"""What connections may cost: deadlines, bytes, readers that do not read, clients that leave, and a thousand at once."""

from __future__ import annotations

import contextlib
import json
import random
import resource
import select
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from openelm.serve.limits import Connections, Limits

LONG = {"model": "tiny", "prompt": "Once", "max_tokens": 1900, "logit_bias": {"257": -100}}
MIB = 1 << 20


@pytest.fixture(scope="module", autouse=True)
def many_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192) if hard != resource.RLIM_INFINITY else 8192, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def head(server: Any, path: str = "/v1/completions", **headers: object) -> bytes:
    lines = {"Host": "localhost", "Content-Type": "application/json", **headers}
    return f"POST {path} HTTP/1.1\r\n".encode() + b"".join(f"{n}: {v}\r\n".encode() for n, v in lines.items()) + b"\r\n"


def posted(body: Any) -> bytes:
    data = json.dumps(body).encode()
    return head(None, **{"Content-Length": len(data)}) + data


def still_open(connections: list[socket.socket]) -> int:
    """Count connections the server has not closed."""
    count = 0
    for connection in connections:
        connection.setblocking(False)
        try:
            while data := connection.recv(65536):
                pass
            count += bool(data)
        except BlockingIOError:
            count += 1
        except OSError:
            pass
    return count


@contextlib.contextmanager
def connected(server: Any, count: int, *, small: bool = False) -> Iterator[list[socket.socket]]:
    """Connect; with a small buffer, what is not read soon waits on the server's side."""
    connections = [socket.socket() for _ in range(count)]
    try:
        for connection in connections:
            connection.settimeout(10)
            if small:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(server.address)
        yield connections
    finally:
        for connection in connections:
            connection.close()


def pour(server: Any, first: bytes, block: bytes, total_bytes: int) -> tuple[bytes, int]:
    """Send a body without end; returns what came back and the most memory the server took meanwhile."""
    before, most = server.rss_bytes(), 0
    with socket.create_connection(server.address, timeout=10) as connection:
        sent = connection.send(first)
        with contextlib.suppress(OSError):
            while sent < total_bytes:
                sent += connection.send(block)
                if random.random() < 0.02:
                    most = max(most, server.rss_bytes() - before)
        answer = b""
        with contextlib.suppress(OSError):
            answer = connection.recv(65536)
    return answer, max(most, server.rss_bytes() - before)


@pytest.mark.parametrize("kind", ["declared", "chunked"])
def test_a_body_of_500_mb_costs_nothing(base: Any, kind: str) -> None:
    base.ask({"model": "tiny", "prompt": "warm", "max_tokens": 1})
    if kind == "declared":
        answer, taken = pour(base, head(base, **{"Content-Length": 500_000_000}), b"x" * 65536, 500_000_000)
    else:
        block = b"10000\r\n" + b"x" * 65536 + b"\r\n"
        answer, taken = pour(base, head(base, **{"Transfer-Encoding": "chunked"}), block, 500_000_000)
    assert answer == b"" or answer.split()[1] == b"413"  # the answer is lost where the client sends on after the end
    assert taken < 10 * MIB
    assert base.request("GET", "/health")[0] == 200


def test_a_body_too_large_is_answered_before_it_is_sent(base: Any) -> None:
    with connected(base, 1) as (connection,):
        connection.sendall(head(base, **{"Content-Length": MIB + 1}))
        answer = connection.recv(65536)
    assert answer.split()[1] == b"413" and b"body_too_large" in answer


def test_a_body_shorter_than_it_says_is_not_served_and_a_longer_one_is_cut(base: Any) -> None:
    body = json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 1}).encode()
    with connected(base, 1) as (connection,):
        connection.sendall(head(base, **{"Content-Length": len(body) + 5}) + body)
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(65536) == b""
    with connected(base, 1) as (connection,):
        connection.sendall(head(base, **{"Content-Length": len(body)}) + body + b"GET /secret")
        assert connection.recv(65536).split()[1] == b"200"


@pytest.fixture(scope="module")
def strict(start: Any, folder: Path) -> Any:
    """Deadlines of a second or two, so that tests need not wait for ten."""
    limits = {"arrive_seconds": 1.5, "stalled_seconds": 2.0, "silent_grace_seconds": 0.5, "silent_connections": 8}
    return start(folder, limits=limits)


def slow(connections: list[socket.socket], byte: bytes, every_seconds: float, seconds: float) -> None:
    """Send a byte on each connection now and then."""
    for _ in range(int(seconds / every_seconds)):
        time.sleep(every_seconds)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.send(byte)


@pytest.mark.parametrize("sent", ["nothing", "half a head", "half a body", "an answered request"])
def test_a_silent_connection_is_closed_at_the_deadline_however_it_trickles(strict: Any, sent: str) -> None:
    first = {
        "nothing": b"",
        "half a head": b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX-Slow: ",
        "half a body": head(strict, **{"Content-Length": 100}) + b"{",
        "an answered request": b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
    }[sent]
    with connected(strict, 5) as connections:
        for connection in connections:
            connection.sendall(first)
        time.sleep(1.0)
        assert still_open(connections) == 5
        slow(connections, b"" if sent in ("nothing", "an answered request") else b" ", 0.25, 2.0)
        assert still_open(connections) == 0


def test_of_many_silent_connections_of_one_address_the_longest_silent_go_first(strict: Any) -> None:
    with connected(strict, 20) as old:
        time.sleep(0.3)
        with connected(strict, 4) as young:
            time.sleep(0.8)
            assert still_open(young) == 4
            assert still_open(old) == 4  # eight together


class Fake:
    """A connection as `Connections` sees one."""

    def __init__(self, address: str = "1.2.3.4") -> None:
        self.peername, self.transport, self.waiting_bytes, self.aborted = (address, 1), self, 0, False

    def get_extra_info(self, _: str) -> None:
        return None

    def get_write_buffer_size(self) -> int:
        return self.waiting_bytes

    def abort(self) -> None:
        self.aborted = True


def test_connections_are_judged_by_what_they_do() -> None:
    asking, stalled, slow_reader, silent = (Fake() for _ in range(4))
    elsewhere, crowd = Fake("5.6.7.8"), [Fake("9.9.9.9") for _ in range(70)]
    every: Any = [asking, stalled, slow_reader, silent, elsewhere, *crowd]
    connections = Connections(Limits(), lambda: every)
    for one in (asking, stalled, slow_reader):
        connections.asked(one)  # type: ignore[arg-type]
    stalled.waiting_bytes = 5000
    for second in range(40):
        slow_reader.waiting_bytes = 9000 - second
        connections.look(float(second))
        if second == 5:
            assert sum(one.aborted for one in crowd) == 6
            assert not elsewhere.aborted and not silent.aborted
        if second == 12:
            assert silent.aborted and elsewhere.aborted
        assert stalled.aborted == (second > 30)
    assert not asking.aborted and not slow_reader.aborted


def test_a_reader_that_does_not_read_is_ended_and_its_slot_is_free(strict: Any) -> None:
    body = {**LONG, "stream": True, "n": 8, "logprobs": 20}
    with connected(strict, 1, small=True) as (connection,):
        connection.sendall(posted(body))
        strict.wait_until(lambda: strict.metric("active_slots") > 0, 5)
        strict.wait_until(lambda: strict.metric("active_slots") + strict.metric("waiting_choices") == 0, 30)
        strict.wait_until(lambda: gone(connection), 20)


def gone(connection: socket.socket) -> bool:
    """Tell whether the other side has reset the connection, without reading from it."""
    poller = select.poll()
    poller.register(connection, 0)
    return any(event & (select.POLLHUP | select.POLLERR) for _, event in poller.poll(0))


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot_at_once(base: Any, stream: bool) -> None:
    with connected(base, 3) as connections:
        for connection in connections:
            connection.sendall(posted({**LONG, "stream": stream}))
        base.wait_until(lambda: base.metric("active_slots") == 3, 10)
    assert base.wait_until(lambda: base.metric("active_slots") == 0, 1) < 1


def test_a_client_that_leaves_the_queue_is_not_served(base: Any) -> None:
    with connected(base, 12) as connections:
        for connection in connections:
            connection.sendall(posted(LONG))
        base.wait_until(lambda: base.metric("waiting_choices") == 8, 10)
        for connection in connections[:]:
            connection.close()
        base.wait_until(lambda: base.metric("active_slots") + base.metric("waiting_choices") == 0, 1)


@pytest.mark.faults
@pytest.mark.parametrize("count", [pytest.param(60, marks=pytest.mark.quick), 500])
def test_after_many_random_disconnects_no_slot_is_taken(base: Any, count: int) -> None:
    random_ = random.Random(count)
    opened: list[socket.socket] = []
    for number in range(count):
        connection = socket.create_connection(base.address, timeout=10)
        connection.sendall(posted({**LONG, "stream": number % 2 == 0, "n": random_.choice([1, 1, 3])}))
        opened.append(connection)
        if random_.random() < 0.8:
            time.sleep(random_.random() * 0.02)
            opened.pop(random_.randrange(len(opened))).close()
    for connection in opened:
        connection.close()
    base.wait_until(lambda: base.metric("active_slots") + base.metric("waiting_choices") == 0, 1)
    assert base.ask({**LONG, "max_tokens": 3})[0] == 200


def crowd(server: Any, count: int) -> tuple[Counter[str], float, int]:
    """Ask with so many connections at once; returns the answers, the slowest /health meanwhile, memory taken."""
    before = most = server.rss_bytes()
    slowest = 0.0
    command = [sys.executable, str(Path(__file__).with_name("crowd.py")), *map(str, server.address), str(count)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as asking:
        assert asking.stdin and asking.stdout
        asking.stdin.write(posted({"model": "tiny", "prompt": "Once", "max_tokens": 20}))
        asking.stdin.close()
        while asking.poll() is None:
            began = time.monotonic()
            assert server.request("GET", "/health")[0] == 200
            slowest = max(slowest, time.monotonic() - began)
            most = max(most, server.rss_bytes())
            time.sleep(0.02)
        return Counter(json.loads(asking.stdout.read())), slowest, most - before


@pytest.mark.faults
@pytest.mark.quick
def test_a_thousand_connections_are_all_answered(base: Any) -> None:
    base.ask({"model": "tiny", "prompt": "warm", "max_tokens": 2})
    found = [crowd(base, 1000) for _ in range(3)]
    print(found)
    for answers, _, taken in found:
        assert set(answers) <= {"200", "429"} and answers.total() == 1000
        assert answers["200"] >= 4
        assert taken < 100 * MIB
    # /health goes before the burst; a blocked event loop would take seconds.
    assert min(slowest for _, slowest, _ in found) < 1


def test_the_queue_is_bounded_and_says_when_to_come_again(start: Any, folder: Path) -> None:
    small = start(folder, served={"slots": 1, "waiting": 2})
    with connected(small, 3) as connections:
        for connection in connections:
            connection.sendall(posted(LONG))
        small.wait_until(lambda: small.metric("active_slots") + small.metric("waiting_choices") == 3, 10)
        status, headers, body = small.request(
            "POST", "/v1/completions", {"Content-Type": "application/json"}, json.dumps(LONG).encode()
        )
        assert status == 429 and headers["retry-after"] == "1"
        assert json.loads(body)["error"]["code"] == "queue_full"
    small.wait_until(lambda: small.metric("active_slots") + small.metric("waiting_choices") == 0, 1)
    assert small.ask({**LONG, "n": 4})[0] == 429  # more than ever fit
    assert small.ask({**LONG, "n": 3, "max_tokens": 2})[0] == 200


@pytest.mark.faults
@pytest.mark.parametrize("first", [b"POST /v1/completions HTTP/1.1\r\nHost: loc", None], ids=["heads", "bodies"])
def test_a_thousand_half_requests_are_gone_after_15_seconds(base: Any, first: bytes | None) -> None:
    first = first or head(base, **{"Content-Length": 1000}) + b"{"
    with connected(base, 1000) as connections:
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.sendall(first)
        time.sleep(4)
        assert still_open(connections) <= 64
        assert base.ask({"model": "tiny", "prompt": "a", "max_tokens": 2})[0] == 200
        slow(connections, b"1", 4, 8)
        time.sleep(3)
        assert still_open(connections) == 0


@pytest.mark.faults
def test_a_hundred_stalled_readers_do_not_slow_others_down(base: Any) -> None:
    def seconds() -> float:
        began = time.monotonic()
        for _ in range(20):
            assert base.ask({"model": "tiny", "prompt": "a", "max_tokens": 20})[0] == 200
        return time.monotonic() - began

    seconds()
    before = seconds()
    with contextlib.ExitStack() as stack:
        stalled = []
        for _ in range(2):  # no more at once than the queue holds
            connections = stack.enter_context(connected(base, 50, small=True))
            for connection in connections:
                connection.sendall(posted({**LONG, "stream": True, "logprobs": 20, "max_tokens": 400}))
            base.wait_until(lambda: base.metric("active_slots") > 0, 5)
            base.wait_until(lambda: base.metric("active_slots") + base.metric("waiting_choices") == 0, 100)
            stalled += connections
        assert seconds() < 2 * before
        base.wait_until(lambda: all(map(gone, stalled)), 60)
