"""Where connections come in: a burst of them waits here, and a question for the server's health goes before it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import cast

from openelm.serve.limits import Connections

FIRST = b"GET /health "
"""What begins so goes in before all that waits. It is checked and answered like everything else."""
_FEW = 8  # let in at a turn of the event loop: more make the turn longer, fewer make more turns
_MOST_BYTES = 4 << 20  # may wait; what comes then goes in at once, where other limits hold


class Door:
    """Makes the protocol of each connection, and lets their first bytes in, a few at each turn of the event loop.

    The loop answers in the order in which it is asked, so that whoever comes last in a burst would wait for all of it.

    Args:
        inside: makes the protocol that is the server; it knows of a connection from its begin.
        connections: told who waits, as the server's own slowness is not held against them.
    """

    def __init__(self, inside: Callable[[], asyncio.Protocol], connections: Connections) -> None:
        self._inside, self._connections = inside, connections
        self._waiting: deque[tuple[_Arrival, float]] = deque()
        self._waiting_bytes = 0
        self._loop = asyncio.get_running_loop()

    def __call__(self) -> asyncio.Protocol:
        return _Arrival(self, self._inside())

    def arrived(self, arrival: _Arrival, data: bytes) -> None:
        """Keep what came of a connection, or let it in."""
        waits = bool(arrival.came)
        arrival.came += data
        if waits:  # what the transport had read before it was told to stop
            self._waiting_bytes += len(data)
        elif data.startswith(FIRST) or self._waiting_bytes + len(data) > _MOST_BYTES:
            arrival.enter()
        else:
            if not self._waiting:
                self._loop.call_soon(self._let_in)
            self._waiting_bytes += len(data)
            arrival.wait()
            self._waiting.append((arrival, self._loop.time()))
            self._connections.kept_waiting(arrival.inside)

    def _let_in(self) -> None:
        now = self._loop.time()
        try:
            for _ in range(min(_FEW, len(self._waiting))):
                arrival, since = self._waiting.popleft()
                self._waiting_bytes -= len(arrival.came)
                self._connections.let_in(arrival.inside, now - since)
                arrival.enter()
        finally:  # whatever one of them raises, the others go in
            if self._waiting:
                self._loop.call_soon(self._let_in)


class _Arrival(asyncio.Protocol):
    """Stands for the server until a connection's first bytes are let in."""

    def __init__(self, door: Door, inside: asyncio.Protocol) -> None:
        self._door, self.inside = door, inside
        self.came = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.inside.connection_made(transport)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self.inside.connection_lost(error)

    def data_received(self, data: bytes) -> None:
        self._door.arrived(self, data)

    def eof_received(self) -> bool | None:
        return self.inside.eof_received()

    def pause_writing(self) -> None:
        self.inside.pause_writing()

    def resume_writing(self) -> None:
        self.inside.resume_writing()

    def wait(self) -> None:
        """Take no more from the client for now."""
        if self._transport is not None:
            self._transport.pause_reading()

    def enter(self) -> None:
        """Give the connection over, unless its client has left."""
        if self._transport is not None:
            self._transport.set_protocol(self.inside)
            self._transport.resume_reading()
            self.inside.data_received(self.came)
