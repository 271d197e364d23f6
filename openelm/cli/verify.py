"""`openelm verify`: check a run that somebody published."""

from __future__ import annotations

import argparse
import json
import secrets
from pathlib import Path

from rich.console import Console
from rich.progress import MofNCompleteColumn

from openelm.cli.screen import Screen, WorkBar
from openelm.errors import CheckpointError, ConfigError
from openelm.evaluate.tables import aligned
from openelm.model.device import reuse_freed_memory
from openelm.release.findings import Findings, Note
from openelm.release.verify import LEVELS, verify_run


def verify(arguments: argparse.Namespace) -> int:
    """Verify a run folder and print what was checked, what was not, and the verdict."""
    folder = Path(arguments.run)
    if not folder.is_dir():
        raise CheckpointError("there is no such folder", file=folder, fix="give a run folder")
    if arguments.segments < 0:
        raise ConfigError(f"--segments is {arguments.segments}", fix="use 0 or more")
    seed = secrets.randbits(63) if arguments.seed is None else arguments.seed
    data = [_replacement(text) for text in arguments.data]
    console = Screen(stderr=arguments.json)
    reuse_freed_memory()
    with WorkBar(console, MofNCompleteColumn(), "{what}  step {done:,} of {total:,}") as bar:
        findings = verify_run(
            folder, level=arguments.level, segments=arguments.segments, seed=seed, data=data, progress=bar
        )
    if arguments.json:
        print(json.dumps(findings.to_json()))
    else:
        _show(findings, console)
    if findings.difference is not None:
        raise findings.difference
    return 0


def _replacement(text: str) -> tuple[str, str]:
    old, equals, new = text.partition("=")
    if not (old and equals and new):
        raise ConfigError(f"--data {text!r} is not of the form OLD=NEW", fix="for example --data /their/text=/my/text")
    return old, new


def _show(findings: Findings, console: Console) -> None:
    for title, notes in (("checked", findings.checked), ("not checked", findings.not_checked)):
        console.print(aligned((title, "level", ""), [_row(note) for note in notes]), markup=False, soft_wrap=True)
    for difference in findings.numerics.get("differences", ()):
        console.print(f"other numerics: {difference}", markup=False, soft_wrap=True)
    if findings.level == 3:
        console.print(f"random segments were drawn with --seed {findings.seed}", markup=False)
    verdict = f"{findings.verdict}, level {findings.level} ({LEVELS[findings.level]})"
    style = "bold red" if findings.difference else "bold yellow" if findings.weaker_because else "bold green"
    console.print(verdict, style=style, markup=False, soft_wrap=True)


def _row(note: Note) -> tuple[str, str, str]:
    return note.what, str(note.level), note.detail
