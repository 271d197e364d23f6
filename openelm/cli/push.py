"""`openelm push`: a model folder on the Hugging Face hub."""

from __future__ import annotations

import argparse
from pathlib import Path

from openelm.cli.screen import Screen


def push(arguments: argparse.Namespace) -> int:
    """Check a folder, say what will be uploaded, upload it, and say where it is."""
    from openelm.convert.push import check_name, publication
    from openelm.convert.push import push as upload
    from openelm.evaluate.tables import aligned

    check_name(arguments.repo)
    folder, console = Path(arguments.model), Screen()
    what = publication(folder, None if arguments.card is None else Path(arguments.card))
    sizes = what.sizes
    rows = [*sizes.items(), ("together", sum(sizes.values()))]
    console.print(aligned(("file", "bytes"), rows))
    for note in _notes(what.vouched, what.left_out, "modeling_openelm.py" in sizes):
        console.print(f"note: {note}", style="dim")
    done = upload(
        what,
        arguments.repo,
        private=arguments.private,
        revision=arguments.revision,
        message=arguments.message,
    )
    for name in done.removed:
        console.print(f"removed {name}, of the model that was there before")
    console.print(f"{done.url}, commit {done.commit}")
    return 0


def _notes(vouched: bool, left_out: tuple[str, ...], self_contained: bool) -> list[str]:
    notes = [] if vouched else ["there is no manifest.json, so nobody can tell whether a byte of the weights is wrong"]
    if left_out:
        notes.append(f"no part of the model, left out: {', '.join(left_out)}")
    if not self_contained:
        notes.append("people need openelm to load it; openelm convert … --to hf --self-contained makes transformers do")
    return notes
