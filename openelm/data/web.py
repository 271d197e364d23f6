"""Bytes from web servers: what came is not fetched again after a fault, and bytes of two versions are never joined."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from openelm.data.retry import wait_to_retry
from openelm.errors import DataError

Take = Callable[[int, bytes], None]
"""Called with (place in the file, bytes), in order; a place before the last one means: begin again from there."""

_STALL_SECONDS = 60.0
_RANGE = re.compile(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18}|\*)")


class Fetch:
    """Fetch bytes [start, stop) of a file at a web address.

    Args:
        system: fsspec's file system for it, whose session and settings are used.
        size, version: what the server said of the file before: its ETag or time of change, or "".

    `run` raises DataError: E_CHANGED when the file is another one by now, E_READ when the server gives no ranges
    and not the whole file was asked for. Other errors are those of the last try.
    """

    def __init__(self, system: Any, url: str, size: int, version: str, start: int, stop: int, take: Take) -> None:
        self._system, self._url, self._size, self._version = system, url, size, version
        self._start, self._stop, self._take = start, stop, take
        self._place = start
        # A weak ETag, or none, does not say that two answers are of the same bytes.
        self._can_go_on = bool(version) and not version.startswith("W/")

    def run(self) -> None:
        """Ask until all has come; up to three tries in a row that bring nothing that can be kept."""
        from fsspec.asyn import sync

        failures = 0
        while self._place < self._stop:
            before = self._place
            try:
                sync(self._system.loop, self._ask)  # type: ignore[no-untyped-call]
            except Exception as error:
                failures = 0 if self._can_go_on and self._place > before else failures + 1
                if not wait_to_retry(error, failures):
                    raise

    async def _ask(self) -> None:
        first = self._place if self._can_go_on else self._start
        session = await self._system.set_session()
        async with session.get(self._system.encode_url(self._url), **self._options(first)) as answer:
            self._place = self._first_byte(answer, first)
            async for data in answer.content.iter_any():
                if self._place + len(data) > self._stop:
                    raise self._changed("it is longer now")
                self._take(self._place, data)
                self._place += len(data)
        if self._place < self._stop:
            raise ConnectionError(f"the answer ended at byte {self._place} of {self._stop}")

    def _options(self, first: int) -> dict[str, Any]:
        import aiohttp

        options = dict(self._system.kwargs)
        headers = {**options.pop("headers", {}), "Accept-Encoding": "identity"}
        if first > 0 or self._stop < self._size:
            headers["Range"] = f"bytes={first}-{self._stop - 1}"
            if self._can_go_on:
                headers["If-Range"] = self._version
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_STALL_SECONDS, sock_read=_STALL_SECONDS)
        return {**options, "headers": headers, "timeout": timeout}

    def _first_byte(self, answer: Any, first: int) -> int:
        """Check an answer's head; returns the place in the file where its body begins."""
        if answer.status in (404, 410):
            raise FileNotFoundError(self._url)
        if answer.status == 416:
            raise self._changed("it is shorter now")
        answer.raise_for_status()
        if found := _other_version(self._version, answer.headers):
            raise self._changed(f"its version was {self._version} and is {found}")
        if answer.status == 206:
            given = _RANGE.fullmatch(answer.headers.get("Content-Range", ""))
            if given is None or int(given[1]) != first:
                raise ConnectionError("the server gave another range of bytes than was asked for")
            if given[2] not in ("*", str(self._size)):
                raise self._changed(f"it had {self._size} bytes and has {given[2]}")
            return first
        if self._start > 0 or self._stop < self._size:
            what = "the server ignores the range of bytes that was asked for"
            fix = "copy the files to a disk, or to a server or store that gives ranges"
            raise DataError(what, fix=fix, file=self._url, code="E_READ")
        self._can_go_on = self._can_go_on and first == 0  # it was asked to go on, and begins again
        return 0

    def _changed(self, how: str) -> DataError:
        fix = "put the old file back, or start a new run with a new manifest"
        return DataError(f"the file changed while it was read: {how}", fix=fix, file=self._url, code="E_CHANGED")


def _other_version(version: str, headers: Mapping[str, str]) -> str | None:
    """Return the version that an answer names, if it is another one than expected."""
    is_tag = version.startswith(('"', "W/"))
    found = [headers[name] for name in ("ETag", "Last-Modified")[: 1 if is_tag else 2] if name in headers]
    return found[0] if version and found and version not in found else None
