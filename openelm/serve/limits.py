"""What a connection may cost: deadlines, bytes, and how many may be open without asking anything."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from aiohttp import web

from openelm.serve.refusal import Refusal, busy


@dataclass(frozen=True)
class Limits:
    """The numbers; tests set smaller ones.

    Attributes:
        body_bytes: of one request.
        bodies_bytes: of all requests that are being read, together.
        arrive_seconds: from the connection, or the last answer, to the last byte of a request.
        stalled_seconds: without a byte taken by a reader whose answer waits.
        silent_connections: from one address, without a whole request; the longest silent are closed first.
        silent_grace_seconds: so long a connection is not counted as silent.
        drain_seconds: for answers that are being made when the server is told to stop.
    """

    body_bytes: int = 1 << 20
    bodies_bytes: int = 64 << 20
    arrive_seconds: float = 10.0
    stalled_seconds: float = 30.0
    silent_connections: int = 64
    silent_grace_seconds: float = 2.0
    drain_seconds: float = 8.0


class Bodies:
    """Reads requests' bodies within the limits of one and of all together."""

    def __init__(self, limits: Limits) -> None:
        self._limits, self._held_bytes = limits, 0

    async def read(self, request: web.Request) -> bytes:
        """Return the whole body.

        Raises:
            Refusal: 413 for too many bytes, before they are read where the length is declared; 408 for too slow
                ones; 429 where all bodies together are too many.
        """
        if (request.content_length or 0) > self._limits.body_bytes:
            raise self._too_large()
        body = bytearray()
        try:
            async with asyncio.timeout(self._limits.arrive_seconds):
                async for chunk in request.content.iter_any():
                    self._held_bytes += len(chunk)
                    body += chunk
                    if len(body) > self._limits.body_bytes:
                        raise self._too_large()
                    if self._held_bytes > self._limits.bodies_bytes:
                        raise busy()
        except TimeoutError:
            raise Refusal(
                408, f"the body took longer than {self._limits.arrive_seconds:g} s", headers={"Connection": "close"}
            ) from None
        finally:
            self._held_bytes -= len(body)
        return bytes(body)

    def _too_large(self) -> Refusal:
        return Refusal(
            413,
            f"the body is larger than {self._limits.body_bytes} bytes",
            code="body_too_large",
            headers={"Connection": "close"},
        )


class Connection(Protocol):
    """What the server's protocol objects offer."""

    @property
    def transport(self) -> asyncio.Transport | None: ...

    @property
    def peername(self) -> object: ...


@dataclass
class _Seen:
    """What the last look at a connection saw; times are the event loop's."""

    transport: asyncio.Transport  # kept, as the protocol forgets its own while it waits for the last bytes to go
    silent_since: float
    moving_at: float
    waiting_bytes: int = 0


class Connections:
    """Looks at every open connection once a second, and ends those that only cost.

    aiohttp ends a connection whose first line and headers do not come in time. It does not count connections, does not
    watch one that stands within a body, and waits for ever for a reader that does not read. Time in which the server
    itself did nothing, as its machine was busy or asleep, is not held against anybody.
    """

    def __init__(self, limits: Limits, opened: Callable[[], Iterable[Connection]]) -> None:
        self._limits, self._opened = limits, opened
        self._seen: dict[object, _Seen] = {}
        self._asking: set[object] = set()
        self._every_seconds = min(1.0, limits.silent_grace_seconds / 2)
        self._looked_at: float | None = None

    def asked(self, connection: Connection) -> None:
        """Note that a whole request has come, which is being answered."""
        self._asking.add(connection)

    def kept_waiting(self, connection: object) -> None:
        """Note that bytes have come which the server does not look at yet."""
        self._asking.add(connection)

    def let_in(self, connection: object, waited_seconds: float) -> None:
        """Note that these bytes are looked at now; they may be a whole request or not."""
        self._asking.discard(connection)
        if (seen := self._seen.get(connection)) is not None:
            seen.silent_since += waited_seconds

    def answered(self, connection: Connection) -> None:
        """Note that the answer is made; if a whole request had come, the connection is silent from now on."""
        if connection in self._asking:
            self._asking.discard(connection)
            self._seen.pop(connection, None)

    async def watch(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            self.look(asyncio.get_running_loop().time())
            await asyncio.sleep(self._every_seconds)

    def look(self, now: float) -> None:
        """End what is over a limit."""
        late = max(0.0, now - self._looked_at - 2 * self._every_seconds) if self._looked_at is not None else 0.0
        self._looked_at = now
        seen, self._seen = self._seen, {}
        silent: dict[object, list[tuple[float, asyncio.Transport]]] = defaultdict(list)
        for connection in self._opened():
            before = seen.get(connection)
            if before is None and connection.transport is not None:
                before = _Seen(connection.transport, silent_since=now, moving_at=now)
            if before is None:
                continue
            self._seen[connection] = before
            before.silent_since, before.moving_at = before.silent_since + late, before.moving_at + late
            waiting_bytes = before.transport.get_write_buffer_size()
            if waiting_bytes == 0 or waiting_bytes < before.waiting_bytes:
                before.moving_at = now
            before.waiting_bytes = waiting_bytes
            if now - before.moving_at > self._limits.stalled_seconds:
                _reset(before.transport)
            elif connection not in self._asking and waiting_bytes == 0:
                silent[_address(connection)].append((now - before.silent_since, before.transport))
        for found in silent.values():
            self._end_silent(sorted(found, key=lambda one: -one[0]))

    def _end_silent(self, longest_first: list[tuple[float, asyncio.Transport]]) -> None:
        too_many = len(longest_first) - self._limits.silent_connections
        for index, (seconds, transport) in enumerate(longest_first):
            crowding = index < too_many and seconds > self._limits.silent_grace_seconds
            if crowding or seconds > self._limits.arrive_seconds:
                transport.abort()


def _reset(transport: asyncio.Transport) -> None:
    """End a connection together with the bytes that the kernel would try to send for many minutes more."""
    if (connected := transport.get_extra_info("socket")) is not None:
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


def _address(connection: Connection) -> object:
    return connection.peername[0] if isinstance(connection.peername, tuple) else None
