"""The errors a user can meet: what was given, what is allowed, what to do, and the exit code for scripts."""

from __future__ import annotations

from pathlib import Path


def printable(text: str) -> str:
    """Escape control characters so that untrusted names and text cannot move the cursor or forge log lines."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class OpenELMError(Exception):
    """One line for the user: `error[E_CODE] file=… line=… offset=… : what; what to do`.

    Args:
        what: what happened, with the value that was given and the values that are allowed.
        fix: what the user can do about it.
        file, line, offset: where it happened (1-based line, byte offset).
        code: a more precise code than the class's own, such as `E_TRUNC`.
    """

    code = "E_INTERNAL"
    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        fix: str = "",
        file: str | Path | None = None,
        line: int | None = None,
        offset: int | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(what)
        self.what, self.fix, self.file, self.line, self.offset = what, fix, file, line, offset
        self.code = code or type(self).code

    def __str__(self) -> str:
        where = {"file": self.file, "line": self.line, "offset": self.offset}
        parts = [
            f"error[{self.code}]",
            *(f"{name}={value}" for name, value in where.items() if value is not None),
        ]
        return printable(f"{' '.join(parts)}: {self.what}" + (f"; {self.fix}" if self.fix else ""))

    def __reduce__(
        self,
    ) -> tuple[object, ...]:  # keyword arguments survive the way back from a worker process
        state = {
            "fix": self.fix,
            "file": self.file,
            "line": self.line,
            "offset": self.offset,
            "code": self.code,
        }
        return _rebuild, (type(self), self.what, state)


def _rebuild(kind: type[OpenELMError], what: str, state: dict[str, object]) -> OpenELMError:
    return kind(what, **state)  # type: ignore[arg-type]


class ConfigError(OpenELMError):
    """The command line, a recipe or a model's config asks for something that is not allowed."""

    code, exit_code = "E_CONFIG", 2


class DataError(OpenELMError):
    """A text file, a row or a tokenizer cannot be used as it is."""

    code, exit_code = "E_DATA", 3
    row_sha256: str | None = None
    """Of the bytes of the row that is bad, where a reader has them."""


class CheckpointError(OpenELMError):
    """A checkpoint, model or run folder is damaged, incomplete, in use or does not fit."""

    code, exit_code = "E_CKPT", 4


class DiskError(OpenELMError):
    """The disk is full, over quota or read-only."""

    code, exit_code = "E_DISK", 5


class NumericError(OpenELMError):
    """A loss, gradient or score is not a finite number."""

    code, exit_code = "E_NUMERIC", 6


class VerificationError(OpenELMError):
    """Two things that must be equal differ."""

    code, exit_code = "E_VERIFY", 7


class Stopped(OpenELMError):
    """A signal asked the run to stop; its state is saved and the same command goes on from there."""

    code, exit_code = "E_STOPPED", 75


class ProcessError(Stopped):
    """Another process of the run died or does not answer; the same command goes on from the last checkpoint."""

    code = "E_PROCESS"
