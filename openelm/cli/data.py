"""`openelm data manifest`, `merge` and `check`: what a data set holds, and whether it still does."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich import progress as rich_progress

from openelm.cli.screen import SECONDS_BETWEEN_LINES, Screen
from openelm.data.manifest import Manifest, SourceConfig
from openelm.data.manifest_file import Survey, merge_surveys, read_manifest_file, write_manifest_file
from openelm.data.survey import BLOCK_BYTES, Progress, check_files, runner, survey
from openelm.errors import ConfigError, printable


def manifest(arguments: argparse.Namespace) -> int:
    """Survey a source, or a part of it, into a manifest file."""
    screen, out = Screen(), Path(arguments.out)
    part, parts = _part(arguments.part)
    block_bytes = BLOCK_BYTES if arguments.block_bytes is None else arguments.block_bytes
    if block_bytes < 1:
        raise ConfigError(f"--block-bytes must be at least 1 (given: {block_bytes})")
    config = _source_config(arguments)
    with WorkDisplay(screen) as show:
        found = survey(
            config,
            out,
            run=runner(_workers(arguments), arguments.ray),
            part=part,
            parts=parts,
            on_bad_row=arguments.on_bad_row,
            block_bytes=block_bytes,
            observe=show,
        )
    _report(screen, out, [found])
    if parts > 1:
        screen.print("next     openelm data merge, with all parts")
    else:
        screen.print(f'next     in a recipe: data.manifest = "{printable(str(out))}"')
    return 0


def merge(arguments: argparse.Namespace) -> int:
    """Join parts, or sources, to one manifest file."""
    screen, out = Screen(), Path(arguments.out)
    if out.exists():
        raise ConfigError("the file exists already", file=out, fix="remove it, or choose another --out")
    paths = [Path(part) for part in arguments.parts]
    if doubled := sorted({str(path) for path in paths if paths.count(path) > 1}):
        raise ConfigError(f"given twice: {', '.join(doubled)}", fix="give each part once")
    joined = merge_surveys({path: read_manifest_file(path) for path in paths})
    write_manifest_file(out, joined)
    _report(screen, out, joined)
    return 0


def check(arguments: argparse.Namespace) -> int:
    """Compare the files with their manifest."""
    screen = Screen()
    surveys = read_manifest_file(Path(arguments.manifest))
    listed = Manifest(tuple(found.source for found in surveys))
    with WorkDisplay(screen) as show:
        check_files(listed, whole=arguments.whole, run=runner(_workers(arguments), arguments.ray), observe=show)
    files = sum(len(found.source.shards) for found in surveys)
    how = "SHA-256 of every file" if arguments.whole else "size and time of change, SHA-256 where they differ"
    screen.print(f"{files:,} files are as the manifest says ({how})")
    return 0


def _part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    part, parts = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= part <= parts:
        raise ConfigError(f"--part must be i/n with 1 <= i <= n (given: {text!r})", fix="for example --part 2/8")
    return part, parts


def _workers(arguments: argparse.Namespace) -> int:
    if arguments.workers < 1:
        raise ConfigError(f"--workers must be at least 1 (given: {arguments.workers})")
    return int(arguments.workers)


def _source_config(arguments: argparse.Namespace) -> SourceConfig:
    if not arguments.name.isprintable():
        raise ConfigError(f"--name {arguments.name!r} holds control characters", fix="use letters, digits and marks")
    values: dict[str, Any] = {
        "name": arguments.name,
        "paths": tuple(arguments.paths),
        "exclude": tuple(arguments.exclude),
        "format": arguments.format,
        "text_key": arguments.text_key,
        "document_bytes": arguments.document_bytes,
    }
    if arguments.max_document_bytes is not None:
        values["max_document_bytes"] = arguments.max_document_bytes
    return SourceConfig.parse(values)


def _report(screen: Screen, out: Path, surveys: Sequence[Survey]) -> None:
    for found in surveys:
        shards = found.source.shards
        part = f", part {found.part} of {found.parts}" if found.parts > 1 else ""
        screen.print(
            f"{printable(found.source.name)}{part}: "
            f"{len(shards):,} files, {sum(shard.bytes for shard in shards):,} bytes, "
            f"{found.source.rows:,} rows, {sum(len(shard.blocks) for shard in shards):,} blocks"
        )
    screen.print(f"wrote    {printable(str(out))}")


class WorkDisplay:
    """Show how far work on files is: a bar with the time left on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, screen: Screen) -> None:
        self._screen, self._last, self._start = screen, time.monotonic(), time.monotonic()
        self._bar: rich_progress.Progress | None = None
        self._task = rich_progress.TaskID(0)

    def __enter__(self) -> Self:
        return self

    def __call__(self, progress: Progress) -> None:
        """Take the news of one more file."""
        if self._screen.is_terminal:
            self._draw(progress)
            return
        now = time.monotonic()
        if progress.resumed_bytes and progress.resumed_bytes == progress.done_bytes:
            self._screen.print(f"going on: {progress.done_files:,} of {progress.files:,} files are done")
        elif now - self._last >= SECONDS_BETWEEN_LINES:
            self._last = now
            self._screen.print(
                f"{progress.done_files:,} of {progress.files:,} files, "
                f"{progress.done_bytes / max(1, progress.bytes):.1%} of the bytes, {self._left(progress, now)}"
            )

    def _left(self, progress: Progress, now: float) -> str:
        done = progress.done_bytes - progress.resumed_bytes
        if not done:
            return "time left not known yet"
        seconds = int((now - self._start) * (progress.bytes - progress.done_bytes) / done)
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d} left"

    def _draw(self, progress: Progress) -> None:
        if self._bar is None:
            self._bar = rich_progress.Progress(
                rich_progress.BarColumn(),
                rich_progress.DownloadColumn(binary_units=True),
                rich_progress.TransferSpeedColumn(),
                rich_progress.TextColumn("{task.fields[files]} files, {task.fields[left]}"),
                console=self._screen,
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=progress.bytes, completed=progress.done_bytes, files="", left="")
        files = f"{progress.done_files:,} of {progress.files:,}"
        left = self._left(progress, time.monotonic())
        self._bar.update(self._task, completed=progress.done_bytes, files=files, left=left)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
