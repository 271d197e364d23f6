"""What a verification found: what was checked, what was not and why, and the first difference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from openelm.errors import DataError, OpenELMError, VerificationError, printable

VERIFIED, FAILED = "verified", "failed"
OTHER_NUMERICS = "other numerics"

Progress = Callable[[str, int, int], None]
"""Called with what is being done, and how many of how many steps are."""


@dataclass(frozen=True)
class Note:
    """One thing that was checked and with what result, or one that was not and why."""

    level: int
    what: str
    detail: str


@dataclass
class Findings:
    """Grows while a verification goes on."""

    level: int
    """The level that is being checked; in the end the one that was reached."""
    seed: int
    checked: list[Note] = field(default_factory=list)
    not_checked: list[Note] = field(default_factory=list)
    difference: VerificationError | None = None
    weaker_because: list[str] = field(default_factory=list)
    """Why nothing found is less than a proof, if so."""
    numerics: dict[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        if self.difference is not None:
            return FAILED
        return f"consistent (weaker: {', '.join(self.weaker_because)})" if self.weaker_because else VERIFIED

    def skip(self, what: str, why: str) -> None:
        """Note that something was not checked."""
        note = Note(self.level, printable(what), printable(why))
        if note not in self.not_checked:
            self.not_checked.append(note)

    def weaken(self, reason: str) -> None:
        """Note why the verdict is weaker than `verified`."""
        if reason not in self.weaker_because:
            self.weaker_because.append(reason)

    def run(self, what: str, check: Callable[[], str]) -> None:
        """Do one check, which returns what it looked at.

        Raises:
            VerificationError: what it found; also for what the publication's own files made other code refuse.
            DataError: the verifier's copy of the data cannot be read.
        """
        try:
            detail = check()
        except OpenELMError as error:
            if isinstance(error, DataError) and self.level > 0:
                raise  # the verifier's own copy of the data
            self.difference = _as_difference(error, what)
            raise self.difference from None
        except OSError as error:
            unreadable = f"{what}: a file cannot be read: {error.strerror}"
            self.difference = VerificationError(unreadable, file=error.filename)
            raise self.difference from None
        self.checked.append(Note(self.level, what, printable(detail)))

    def to_json(self) -> dict[str, Any]:
        """Return plain data: exactly what `openelm verify --json` prints."""
        first = self.difference
        return {
            "verdict": self.verdict,
            "level": self.level,
            "checked": [asdict(note) for note in self.checked],
            "not_checked": [asdict(note) for note in self.not_checked],
            "first_difference": first
            and {"what": printable(first.what), "file": str(first.file) if first.file else None, "line": first.line},
            "seed": self.seed,
            "numerics": {
                "comparison": "tolerances" if OTHER_NUMERICS in self.weaker_because else "bitwise",
                **self.numerics,
            },
        }


def _as_difference(error: OpenELMError, what: str) -> VerificationError:
    if isinstance(error, VerificationError):
        return error
    return VerificationError(
        f"{what}: {error.what}", fix=error.fix, file=error.file, line=error.line, offset=error.offset
    )
