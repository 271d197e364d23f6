"""Expand the paths and URLs of a source into files: the same list, in the same order, on every machine."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path

from openelm.data.readers import SUFFIXES
from openelm.data.remote import DataPath, is_url, list_url
from openelm.errors import DataError

PACKAGE_PREFIX = "package:"


def expand_paths(paths: Sequence[str], exclude: Sequence[str]) -> list[tuple[str, DataPath]]:
    """List (relative name, absolute path) of the files that paths, folders, globs and URLs stand for.

    Entries keep their order; within an entry files are sorted by relative name. A folder is walked to its
    depth, without hidden files. `package:NAME/file` is a file that the Python package NAME ships. `exclude`
    globs are matched against the file name and the relative name.

    Raises:
        DataError: E_PATH for a path that is missing, matches nothing or is not a regular file.
    """
    found: dict[DataPath, str] = {}
    for text in paths:
        before = len(found)
        matches: list[tuple[str, DataPath]] = sorted(list_url(text) if is_url(text) else _expand(text))
        kept = [match for match in matches if not _is_excluded(match[0], exclude)]
        for name, path in kept:
            found.setdefault(path, name)
        if not kept:
            why = f"all {len(matches)} files are excluded" if matches else "no file matches"
            raise _path_error(f"{why}; allowed suffixes: {' '.join(SUFFIXES)}", text)
        if len(found) == before:
            raise _path_error("every file of this path is already listed by another path of the source", text)
    return [(name, path) for path, name in found.items()]


def _is_excluded(name: str, exclude: Sequence[str]) -> bool:
    last = name.rpartition("/")[2]
    return any(fnmatchcase(last, pattern) or fnmatchcase(name, pattern) for pattern in exclude)


def _expand(text: str) -> Iterator[tuple[str, Path]]:
    text = _package_file(text) if text.startswith(PACKAGE_PREFIX) else text
    path = Path(os.path.abspath(os.path.expanduser(text)))
    if path.exists():
        yield from _files(path, path if path.is_dir() else path.parent)
    elif glob.has_magic(text):
        fixed = Path(path.anchor).joinpath(*_until_magic(path.parts[1:]))
        for match in glob.glob(str(path), recursive=True):
            yield from _files(Path(match), fixed)
    else:
        raise _path_error("no such file or folder", text)


def _package_file(text: str) -> str:
    """Find a file that an installed Python package ships, without importing the package."""
    package, _, inside = text.removeprefix(PACKAGE_PREFIX).partition("/")
    spec = find_spec(package) if package.isidentifier() else None
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not folders:
        fix = "install it (`make install` gets the demo's text), or name files of your own"
        raise DataError(f"no Python package is called {package!r}", fix=fix, file=text, code="E_PATH")
    return str(Path(folders[0]) / inside)


def _until_magic(parts: Sequence[str]) -> list[str]:
    magic = [glob.has_magic(part) for part in parts]
    return list(parts[: magic.index(True)])


def _files(path: Path, root: Path) -> Iterator[tuple[str, Path]]:
    if not path.is_dir():
        if not path.is_file():
            raise _path_error("not a regular file", str(path))
        yield path.relative_to(root).as_posix(), path
        return
    for folder, folders, names in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith("."):
                yield from _files(Path(folder, name), root)


def _path_error(what: str, path: str) -> DataError:
    fix = "check the path; it may be a file, a folder or a glob"
    return DataError(what, fix=fix, file=path, code="E_PATH")
