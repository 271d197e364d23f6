"""Log-likelihoods and texts that were computed once: a file that a killed evaluation goes on from.

An answer is filed under the hash of the model, the prompt's ids and its own, a text under that of the model, the
prompt's ids and what ends it. What a changed model, tokenizer, task or data set asks has another hash, so that nothing
old is ever taken for it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from openelm.errors import ConfigError
from openelm.evaluate.trees import Answer
from openelm.files.atomic import disk_errors
from openelm.files.hashes import canonical_json, sha256_bytes
from openelm.files.locks import lock_file

Key = str


class Answers:
    """Answers of one model; use it as a context manager.

    Args:
        path: the file, which is made when it is not there and held until the end; None keeps nothing.
        model_sha256: of everything that decides the model's answers.

    Raises:
        ConfigError: another process holds the file.
        DiskError: it cannot be written.
    """

    def __init__(self, path: Path | None, model_sha256: str) -> None:
        self._model, self._known, self._texts = model_sha256, dict[Key, Answer](), dict[Key, str]()
        self._path, self._file = path, None
        if path is None:
            return
        with disk_errors(path):
            self._file = path.open("a+b")
        if not lock_file(self._file):
            self._file.close()
            raise ConfigError(
                "another process is at work on this", file=path, fix="wait for it, stop it, or choose another --out"
            )
        self._file.seek(0)
        data = self._file.read()
        whole = data[: data.rfind(b"\n") + 1]  # a line without an end was being written
        with disk_errors(path):
            self._file.truncate(len(whole))
        for line in whole.splitlines():
            match _entry(line):
                case (key, Answer() as answer):
                    self._known[key] = answer
                case (key, str(text)):
                    self._texts[key] = text

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def key(self, prompt: tuple[int, ...], answer: tuple[int, ...]) -> Key:
        """Name an answer to a prompt."""
        return sha256_bytes(canonical_json([self._model, prompt, answer]))

    def text_key(self, prompt: tuple[int, ...], until: tuple[str, ...], most_tokens: int) -> Key:
        """Name what is written after a prompt, up to any of some texts or a number of tokens."""
        return sha256_bytes(canonical_json([self._model, prompt, until, most_tokens]))

    def find(self, key: Key) -> Answer | None:
        """Return what is known."""
        return self._known.get(key)

    def find_text(self, key: Key) -> str | None:
        """Return what was written."""
        return self._texts.get(key)

    def add(self, found: Iterable[tuple[Key, Answer]]) -> None:
        """Keep answers, on the disk too where there is a file."""
        found = list(found)
        self._known.update(found)
        self._append([[key, answer.nats, answer.is_greedy] for key, answer in found])

    def add_text(self, key: Key, text: str) -> None:
        """Keep a finished text, on the disk too where there is a file."""
        self._texts[key] = text
        self._append([[key, text]])

    def _append(self, entries: list[list[str | float | bool]]) -> None:
        if self._file is None or self._path is None:
            return
        with disk_errors(self._path):
            self._file.write(b"".join(canonical_json(entry) + b"\n" for entry in entries))
            self._file.flush()


def _entry(line: bytes) -> tuple[Key, Answer | str] | None:
    """Read a line; None for one that a crash of the machine left damaged."""
    try:
        match json.loads(line):
            case [str(key), float(nats), bool(is_greedy)]:
                return key, Answer(nats, is_greedy)
            case [str(key), str(text)]:
                return key, text
    except ValueError:
        pass
    return None
