"""Data files behind URLs, opened through fsspec: a `Url` stands where readers expect a `Path`."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias, TypeVar
from urllib.parse import urlsplit

from openelm.data.retry import TRIES, may_pass, retried
from openelm.data.web import Fetch, Take
from openelm.errors import ConfigError, DataError, OpenELMError
from openelm.files.atomic import disk_errors

_CHUNK_BYTES = 4 << 20
_FIX = "check the URL, the network and the credentials, then run the same command again"

T = TypeVar("T")


class UrlStatus(NamedTuple):
    """What a store says of a file, under the names of `os.stat_result`; `version` is its ETag or time of change."""

    st_size: int
    st_mtime_ns: int
    version: str


class Url(str):
    """The address of a data file, with the few members of `Path` that readers use.

    Reads ask for ranges of bytes, up to three times in a row while the connection or the server fails, and must
    come whole. Needs the extra `remote`.
    """

    __slots__ = ()

    @property
    def name(self) -> str:
        """The last part of the path, without a web address's query."""
        path = urlsplit(self).path if self.startswith(("http://", "https://")) else self
        return path.rstrip("/").rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The ending of the name from its last dot."""
        return Path(self.name).suffix

    def stat(self) -> UrlStatus:
        """Ask the store for size and version.

        Raises:
            FileNotFoundError: nothing is there.
            DataError: E_READ naming the URL.
        """
        system, path = _system(self)

        def ask() -> dict[str, Any]:
            system.invalidate_cache()
            return dict(system.info(path))

        info = self._guarded(ask)
        if not isinstance(info.get("size"), int):
            raise self._unreadable("the server does not say how large the file is")
        names = ("ETag", "etag", "Last-Modified", "LastModified", "mtime", "created")
        return UrlStatus(info["size"], 0, next((str(info[name]) for name in names if info.get(name)), ""))

    def open(self, mode: str = "rb") -> BinaryIO:
        """Open for reading bytes at any place.

        Raises:
            FileNotFoundError: nothing is there.
            DataError: E_READ naming the URL, here or from a later read.
        """
        assert mode == "rb", "data files are only read"
        return io.BufferedReader(_Ranges(self, self.stat()), _CHUNK_BYTES)

    def read_whole(self, take: Take) -> None:
        """Give all bytes of the file to a function; it may be told to begin again.

        Of a store other than a web server the caller compares the status before and after, or the hash.

        Raises:
            FileNotFoundError: nothing is there.
            DataError: E_READ naming the URL; E_CHANGED when a web server's file changed on the way.
        """
        status = self.stat()
        self.read_range(status, 0, status.st_size, take)

    def sha256(self) -> str:
        """Hash the file; raises what `read_whole` does."""
        digest = hashlib.sha256()

        def take(place: int, data: bytes) -> None:
            nonlocal digest
            digest = digest if place else hashlib.sha256()
            digest.update(data)

        self.read_whole(take)
        return digest.hexdigest()

    def read_range(self, status: UrlStatus, start: int, stop: int, take: Take) -> None:
        """Give bytes [start, stop) to a function, all of them.

        Args:
            status: of the file that is meant; a web server's answers are held to its size and version.

        Raises:
            FileNotFoundError: nothing is there.
            DataError: E_READ naming the URL; E_CHANGED when a web server has another file by now.
        """
        system, path = _system(self)
        if self.startswith(("http://", "https://")):
            fetch = Fetch(system, self, status.st_size, status.version, start, stop, take)
            return self._translated(fetch.run)
        for at in range(start, stop, _CHUNK_BYTES):
            take(at, self._guarded(functools.partial(_cat, system, path, at, min(stop, at + _CHUNK_BYTES))))

    def _translated(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except (FileNotFoundError, OpenELMError):
            raise
        except Exception as error:  # each store's library has errors of its own
            what = f"{type(error).__name__}: {str(error)[:160]}"
            raise self._unreadable(f"cannot read it in {TRIES} tries, or it is refused ({what})") from None

    def _guarded(self, call: Callable[[], T]) -> T:
        def plainly() -> T:
            try:
                return call()
            except FileNotFoundError as error:  # fsspec says so of web servers that fail or are down, too
                if error.__cause__ is not None and may_pass(error.__cause__):
                    raise error.__cause__ from None
                raise

        return self._translated(lambda: retried(plainly))

    def _unreadable(self, what: str) -> DataError:
        return DataError(what, fix=_FIX, file=self, code="E_READ")


def _cat(system: Any, path: str, start: int, stop: int) -> bytes:
    data: bytes = system.cat_file(path, start=start, end=stop)
    if len(data) != stop - start:
        raise ConnectionError(f"{len(data)} bytes came instead of {stop - start}")
    return data


DataPath: TypeAlias = Path | Url


class _Ranges(io.RawIOBase):
    def __init__(self, url: Url, status: UrlStatus) -> None:
        self._url, self._status, self._at = url, status, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._status.st_size}[whence]
        if start + offset < 0:
            raise OSError(errno.EINVAL, "a place before the start of the file")
        self._at = start + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        start, stop = self._at, min(self._at + len(view), self._status.st_size)
        if stop <= start:
            return 0

        def take(place: int, data: bytes) -> None:
            view[place - start : place - start + len(data)] = data

        self._url.read_range(self._status, start, stop, take)
        self._at = stop
        return stop - start


def is_url(text: str) -> bool:
    """Tell whether a text is a URL such as s3://bucket/key or https://host/file."""
    scheme, separator, _ = text.partition("://")
    return bool(separator) and len(scheme) > 1 and scheme.replace("+", "").isalnum()


def data_path(text: str) -> DataPath:
    """Return the path or URL that a text stands for."""
    return Url(text) if is_url(text) else Path(text)


def list_url(text: str) -> list[tuple[str, Url]]:
    """List (relative name, URL) of the files that a URL stands for: a file, a folder of a store, or a glob.

    Raises:
        DataError: E_PATH when nothing is there; E_READ when the store cannot be read.
    """
    url = Url(text)
    system, path = _system(url)
    whole_web = text.startswith(("http://", "https://"))

    def ask() -> list[str]:
        system.invalidate_cache()
        if whole_web or system.isfile(path):
            return [path]
        return list(system.glob(path) if "*" in path else system.find(path))

    try:
        found = url._guarded(ask)
    except FileNotFoundError:
        found = []
    if not found:
        fix = "check the URL; it may be a file, a folder or a glob"
        raise DataError("no such file or folder", fix=fix, file=text, code="E_PATH")
    if found == [path]:
        return [(url.name, url)]
    root = (path.partition("*")[0].rpartition("/")[0] if "*" in path else path).rstrip("/") + "/"
    names = [(file.removeprefix(root), Url(system.unstrip_protocol(file))) for file in found]
    return [(name, file) for name, file in names if not any(part.startswith(".") for part in name.split("/"))]


@contextlib.contextmanager
def local_copy(url: Url) -> Iterator[Path]:
    """Yield a temporary file with a URL's content, so that hashing and scanning read it over the network once.

    Raises:
        FileNotFoundError: nothing is there.
        DataError: E_READ naming the URL; E_CHANGED when a web server's file changed on the way.
        DiskError: the folder for temporary files is full.
    """
    with tempfile.TemporaryDirectory(prefix="openelm-") as folder:
        path = Path(folder) / url.name
        with disk_errors(path):
            target = path.open("wb", buffering=0)

        def take(place: int, data: bytes) -> None:
            with disk_errors(path):
                target.truncate(place)
                target.seek(place)
                while data:
                    data = data[target.write(data) :]

        with target:
            url.read_whole(take)
        yield path


def _system(url: Url) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise _missing_extra(url) from None
    try:
        system, path = url_to_fs(str(url))  # type: ignore[no-untyped-call]
    except ImportError:
        raise _missing_extra(url) from None
    except (ValueError, OSError) as error:
        fix = "allowed: s3://, https://, http:// and the other protocols of fsspec"
        raise ConfigError(f"cannot use this URL ({str(error)[:120]})", file=url, fix=fix) from None
    return system, str(path)


def _missing_extra(url: Url) -> ConfigError:
    fix = "install them: pip install 'openelm-framework[remote]'"
    return ConfigError("reading URLs needs the packages of the extra `remote`", file=url, fix=fix)
