"""The rules of a ledger: which line may follow which; an honest run keeps them whatever happened to it."""

from __future__ import annotations

from openelm.errors import VerificationError
from openelm.release.publication import KINDS, Line, Publication, Rewind, Saved, Start

_AFTER: dict[str | None, frozenset[str]] = {
    None: frozenset({"start"}),
    **dict.fromkeys(("finish", "stop", "nonfinite", "damage"), frozenset({"rewind", "damage"})),
    **dict.fromkeys(("skip", "spike"), frozenset({"step", "rewind", "damage"})),
    "bad_rows": frozenset({"step", "skip", "spike", "nonfinite", "rewind", "damage"}),
    "rewind": frozenset({"rewind", "damage", "start", "resume"}),
}
"""The known kinds that may follow a line of a kind; for kinds that are not listed: anything but a start."""


def check_history(publication: Publication) -> list[str]:
    """Walk the ledger from its first line to its last; returns what is unusual but no fault.

    Steps count up by one, a step is only taken back by a `rewind`, a rewind goes back to a step with a checkpoint
    or to 0, and the run goes on from there with a `resume` or `start`.

    Raises:
        VerificationError: names the first line that breaks a rule.
    """
    walk = _Walk(publication)
    for number, line in enumerate(publication.lines, start=1):
        walk.take(number, line)
    return walk.end()


class _Walk:
    def __init__(self, publication: Publication) -> None:
        self._publication = publication
        self._background = publication.background
        self._step = self._furthest = 0
        self._previous: Line | None = None
        self._saved: dict[int, str] = {}  # step -> manifest of the checkpoint, void ones left out
        self._unknown: set[str] = set()
        self._number = 0

    def take(self, number: int, line: Line) -> None:
        self._number = number
        if line.event not in KINDS:
            self._unknown.add(line.event)
            return
        self._check_order(line)
        match line.event:
            case "step":
                self._expect(line.step == self._step + 1, f"step {line.step} follows step {self._step}")
                self._step = line.step
            case "skip" | "spike" | "nonfinite" | "bad_rows":
                self._expect(line.step == self._step + 1, f"{line.event} at step {line.step} after step {self._step}")
            case "rewind":
                self._rewind(line)
            case "checkpoint":
                self._checkpoint(line)
            case "start" | "resume":
                self._start(line)
            case "damage":
                pass
            case _:
                self._expect(line.step == self._step, f"{line.event} at step {line.step} after step {self._step}")
        self._furthest = max(self._furthest, line.step)
        self._previous = line

    def _expect(self, holds: bool, what: str) -> None:
        if not holds:
            raise VerificationError(
                f"{what}: lines are missing or were added", file=self._publication.ledger, line=self._number
            )

    def _check_order(self, line: Line) -> None:
        before = self._previous.event if self._previous else None
        allowed = _AFTER.get(before, KINDS.keys() - {"start", "resume"})
        self._expect(line.event in allowed, f"{line.event} after {before or 'nothing'}")
        if before in ("skip", "spike") and line.event == "step":
            assert self._previous is not None
            self._expect(line.step == self._previous.step, f"step {line.step} after {before} at another step")

    def _rewind(self, line: Line) -> None:
        assert isinstance(line, Rewind)
        self._expect(
            line.step == self._furthest, f"rewind from step {line.step}, but step {self._furthest} was reached"
        )
        # A run that was killed between a checkpoint and its line has the checkpoint of its last step unrecorded; one
        # that saves in the background, of any step since the last recorded one.
        late = self._background and line.to > max(self._saved, default=0)
        known = line.to in self._saved or line.to in (0, self._step) or late
        self._expect(known and line.to <= self._step, f"rewind to step {line.to}, which has no checkpoint")
        self._step = line.to
        self._saved = {step: digest for step, digest in self._saved.items() if step <= line.to}

    def _start(self, line: Line) -> None:
        assert isinstance(line, Start)
        self._expect(line.step == self._step, f"{line.event} at step {line.step}, not at step {self._step}")
        if line.event == "start":
            self._expect(line.step == 0, "start at a later step than 0")
            return
        digest = line.manifest_sha256
        self._expect(line.step > 0 and digest is not None, "resume without a checkpoint")
        assert digest is not None
        known = self._saved.setdefault(line.step, digest)
        self._expect(known == digest, f"resume from another checkpoint than the one of step {line.step}")

    def _checkpoint(self, line: Line) -> None:
        assert isinstance(line, Saved)
        on_time = line.step <= self._step if self._background else line.step == self._step
        self._expect(on_time and line.step > 0, f"checkpoint of step {line.step} after step {self._step}")
        folder = f"checkpoints/step-{line.step:08d}"
        self._expect(line.folder == folder, f"the checkpoint of step {line.step} is not in {folder}")
        self._saved[line.step] = line.manifest_sha256

    def end(self) -> list[str]:
        last, steps = (
            self._publication.lines[-1] if self._publication.lines else None,
            self._publication.config.train.steps,
        )
        self._expect(last is not None, "the ledger is empty")
        notes = [f"events of kind {kind!r}: not known here" for kind in sorted(self._unknown)]
        if self._previous is not None and self._previous.event == "finish":
            self._expect(self._step == steps, f"finish at step {self._step} of {steps}")
        else:
            notes.append(f"the end of the run: it is at step {self._step} of {steps}")
        return notes
