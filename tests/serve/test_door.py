"""A burst waits at the door in order, questions for the server's health go first, and nobody is blamed for waiting."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import pairwise
from typing import Any

from openelm.serve.door import Door
from openelm.serve.limits import Connections, Limits


class Inside(asyncio.Protocol):
    """Notes what it is told, with all others together."""

    def __init__(self, told: list[tuple[str, bytes]]) -> None:
        self.told = told

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.told.append(("made", b""))

    def data_received(self, data: bytes) -> None:
        self.told.append(("data", data))

    def connection_lost(self, error: Exception | None) -> None:
        self.told.append(("lost", b""))


@contextlib.contextmanager
def connected(address: Any, count: int) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(socket.create_connection(address)) for _ in range(count)]


def at_the_door(body: Callable[[Any, list[tuple[str, bytes]], Door], Any]) -> None:
    """Run a body with an address whose door leads to `Inside`, what that was told, and the door."""

    async def inside() -> None:
        told: list[tuple[str, bytes]] = []
        door = Door(lambda: Inside(told), Connections(Limits(), lambda: ()))
        server = await asyncio.get_running_loop().create_server(door, "127.0.0.1", 0, backlog=512)
        async with server:
            await body(server.sockets[0].getsockname(), told, door)

    asyncio.run(inside())


def data(told: list[tuple[str, bytes]]) -> list[bytes]:
    return [what for kind, what in told if kind == "data"]


@contextlib.asynccontextmanager
async def opened() -> AsyncIterator[asyncio.Transport]:
    """Make a connection of which the door is told by hand."""
    here, there = socket.socketpair()
    with there:
        transport, _ = await asyncio.get_running_loop().create_connection(asyncio.Protocol, sock=here)
        try:
            yield transport
        finally:
            transport.abort()
            await asyncio.sleep(0.01)


async def until(claim: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not claim():
            await asyncio.sleep(0)


def test_health_goes_before_those_that_came_earlier() -> None:
    async def body(address: Any, told: list[tuple[str, bytes]], _: Door) -> None:
        with connected(address, 200) as crowd, connected(address, 1) as (health,):
            for number, connection in enumerate(crowd):
                connection.sendall(b"POST %d" % number)
            health.sendall(b"GET /health HTTP/1.1\r\n")
            await until(lambda: len(data(told)) == 201)
        came = data(told)
        assert came.index(b"GET /health HTTP/1.1\r\n") < 20  # of 201; those let in while it was accepted
        assert len({*came}) == 201

    at_the_door(body)


def test_others_are_let_in_a_few_at_a_turn_in_the_order_they_came() -> None:
    async def body(address: Any, told: list[tuple[str, bytes]], _: Door) -> None:
        with connected(address, 50) as crowd:
            await until(lambda: len(told) == 50)
            for number, connection in enumerate(crowd):
                connection.sendall(b"%d" % number)
            sizes = [0]
            async with asyncio.timeout(10):
                while sizes[-1] < 50:
                    await asyncio.sleep(0)
                    sizes.append(len(data(told)))
        assert max(after - before for before, after in pairwise(sizes)) <= 8
        assert data(told) == [b"%d" % number for number in range(50)]

    at_the_door(body)


def test_what_comes_in_pieces_is_whole_and_what_comes_later_goes_straight_in() -> None:
    async def body(_: Any, told: list[tuple[str, bytes]], door: Door) -> None:
        async with opened() as transport:
            arrival = door()
            arrival.connection_made(transport)
            arrival.data_received(b"one ")
            arrival.data_received(b"two")
            assert data(told) == []
            assert not transport.is_reading()  # who waits cannot pour
            await until(lambda: data(told) == [b"one two"])
            assert isinstance(transport.get_protocol(), Inside)
            assert transport.is_reading()

    at_the_door(body)


def test_one_that_raises_keeps_nobody_outside() -> None:
    async def body(_: Any, told: list[tuple[str, bytes]], door: Door) -> None:
        async with opened() as transport:
            arrivals = [door() for _ in range(4)]
            for arrival in arrivals:
                arrival.connection_made(transport)
                arrival.data_received(b"bytes")
            asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
            arrivals[1].enter = lambda: 1 / 0  # type: ignore[attr-defined]
            await until(lambda: len(data(told)) == 3)

    at_the_door(body)


def test_many_bytes_do_not_wait() -> None:
    async def body(_: Any, told: list[tuple[str, bytes]], door: Door) -> None:
        async with opened() as transport:
            for turn in range(2):
                for _ in range(40):
                    arrival = door()
                    arrival.connection_made(transport)
                    arrival.data_received(b"x" * (1 << 18))
                assert len(data(told)) == 40 * turn + 24  # 4 MiB wait
                await until(lambda turn=turn: len(data(told)) == 40 * (turn + 1))  # type: ignore[misc]

    at_the_door(body)


def test_a_client_that_leaves_while_it_waits_is_not_let_in() -> None:
    async def body(_: Any, told: list[tuple[str, bytes]], door: Door) -> None:
        async with opened() as transport:
            staying, leaving = door(), door()
            for arrival in (staying, leaving):
                arrival.connection_made(transport)
                arrival.data_received(b"bytes")
            leaving.connection_lost(None)
            await until(lambda: len(data(told)) == 1)
            await asyncio.sleep(0.01)
            assert [kind for kind, _ in told] == ["made", "made", "lost", "data"]

    at_the_door(body)


class Silent:
    """A connection as `Connections` sees one."""

    def __init__(self) -> None:
        self.peername, self.transport, self.aborted = ("1.2.3.4", 1), self, False

    def get_write_buffer_size(self) -> int:
        return 0

    def abort(self) -> None:
        self.aborted = True


def test_waiting_at_the_door_is_not_silence() -> None:
    waiting, silent = [Silent() for _ in range(100)], [Silent() for _ in range(64)]
    every: Any = [*waiting, *silent]
    connections = Connections(Limits(), lambda: every)
    connections.look(0.0)
    for one in waiting:
        connections.kept_waiting(one)
    for second in range(1, 6):
        connections.look(float(second))
    assert not any(one.aborted for one in every)
    for one in waiting:
        connections.let_in(one, 5.0)
    connections.look(6.0)
    assert not any(one.aborted for one in waiting)
    connections.look(8.0)  # three seconds of their own now
    assert sum(one.aborted for one in waiting) + sum(one.aborted for one in silent) == 100
    assert all(one.aborted for one in silent)  # these are the longest silent


def test_a_server_that_was_stopped_does_not_blame_those_who_asked_meanwhile(start: Any, folder: Any) -> None:
    server = start(folder, limits={"silent_connections": 8, "silent_grace_seconds": 0.5})
    asked = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with connected(server.address, 60) as crowd:
        time.sleep(0.3)  # so that each was seen
        server.process.send_signal(signal.SIGSTOP)
        for connection in crowd:
            connection.sendall(asked)
        time.sleep(1.5)
        server.process.send_signal(signal.SIGCONT)
        answers = []
        for connection in crowd:
            connection.settimeout(10)
            with contextlib.suppress(OSError):
                answers.append(connection.recv(12))
        assert answers == [b"HTTP/1.1 200"] * 60
