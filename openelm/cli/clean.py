"""`openelm data decontaminate` and `openelm data dedup`: lists of documents that a run should leave out."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import resource
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import TaskProgressColumn

from openelm.cli.screen import Screen, WorkBar
from openelm.config import read_toml
from openelm.data.document import Drops
from openelm.data.duplicates import MinHash, all_shards, documents_of, exact_duplicates, near_duplicates
from openelm.data.exclude import CONTAMINATED, DUPLICATE, exclusion_line
from openelm.data.manifest import Manifest, SourceConfig, build_manifest
from openelm.data.overlap import NgramIndex
from openelm.data.stream import DataConfig
from openelm.errors import CheckpointError, ConfigError, printable
from openelm.files.atomic import disk_errors, make_folder, replacing
from openelm.files.published import publish_folder

_MANIFEST_START = b'{"kind":"openelm data manifest"'


def decontaminate(arguments: argparse.Namespace) -> int:
    """List the documents that share word n-grams with evaluation texts; prints how much of those was met."""
    _check_number(arguments.words, "--words")
    if not 0 <= arguments.min_share <= 1:
        raise ConfigError(f"--min-share {arguments.min_share} is not a part of 1", fix="give a number from 0 to 1")
    folder, console = Path(arguments.out), Screen()
    if folder.exists():
        raise CheckpointError("the folder exists already", file=folder, fix="choose another name or remove it")
    against = [Path(path) for path in arguments.against]
    _refuse_manifests(against)
    index = NgramIndex(against, arguments.words)
    manifest = _manifest(arguments, console)
    listed: Counter[str] = Counter()
    drops: Drops = {}
    with publish_folder(folder) as temporary, _progress(manifest, console) as progress:
        with (temporary / "exclude.jsonl").open("wb") as file:
            for source, shard in all_shards(manifest):
                for row, document in enumerate(documents_of(source, shard, progress, drops)):
                    overlap = index.overlap(document.text) if document else None
                    if overlap and overlap.matches and overlap.share >= arguments.min_share:
                        found = {"matches": overlap.matches, "share": round(overlap.share, 6)}
                        file.write(exclusion_line(source, shard, row, CONTAMINATED, **found))
                        listed[source.name] += 1
        files = index.files()
        report = {
            "words": arguments.words,
            "min_share": arguments.min_share,
            "documents": _documents(manifest, drops),
            "passed_over": drops,
            "listed": dict(listed),
            "against": [asdict(file) for file in files],
        }
        (temporary / "report.json").write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    for entry in files:
        met = entry.met / max(1, entry.ngrams)
        short = f"; {entry.too_short:,} texts have fewer words and were not looked for" if entry.too_short else ""
        runs = f"{entry.met:,} of {entry.ngrams:,} {arguments.words}-word runs found ({met:.2%})"
        console.print(f"{printable(entry.path)}: {runs}{short}")
    _print_result(console, listed, manifest, drops, folder / "exclude.jsonl")
    return 0


def dedup(arguments: argparse.Namespace) -> int:
    """List the documents that repeat an earlier one."""
    for name, most in (("words", None), ("bands", 500), ("hashes", 100)):  # published: up to 450 bands of 20 hashes
        _check_number(getattr(arguments, name), f"--{name}", most)
    path, console = Path(arguments.out), Screen()
    if path.is_dir():
        raise ConfigError("--out is a folder", file=path, fix="give the list a name, such as duplicates.jsonl")
    drops: Drops = {}
    manifest = _manifest(arguments, console)
    make_folder(path.parent)
    with (
        _enough_files(),
        disk_errors(path),
        tempfile.TemporaryDirectory(prefix=".dedup-", dir=path.parent) as scratch,
        _progress(manifest, console) as progress,
    ):
        if arguments.method == "exact":
            found = exact_duplicates(manifest, Path(scratch), progress, drops)
        else:
            settings = MinHash(arguments.words, arguments.bands, arguments.hashes)
            found = near_duplicates(manifest, Path(scratch), progress, drops, settings)
    shards = all_shards(manifest)
    with replacing(path) as file:
        for duplicate in found:
            kept_source, kept_shard = shards[duplicate.kept_shard]
            kept = {"source": kept_source.name, "shard": kept_shard.name, "row": duplicate.kept_row}
            file.write(exclusion_line(*shards[duplicate.shard], duplicate.row, DUPLICATE, kept=kept))
    listed = Counter(shards[duplicate.shard][0].name for duplicate in found)
    _print_result(console, listed, manifest, drops, path)
    return 0


def _check_number(value: int, name: str, most: int | None = None) -> None:
    if value < 1 or (most is not None and value > most):
        raise ConfigError(f"{name} is {value}", fix="give at least 1" + (f" and at most {most}" if most else ""))


@contextlib.contextmanager
def _enough_files() -> Iterator[None]:
    """Turn the system's refusal to open one more file, once for each band or data file, into a line that says so."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        fix = "raise the limit (ulimit -n 4096), give fewer --bands, or fewer and larger data files"
        raise ConfigError(f"this needs more than {limit} open files", fix=fix) from None


def _manifest(arguments: argparse.Namespace, console: Console) -> Manifest:
    """Find the files of a recipe's sources, or of the paths as one source."""
    recipes = [Path(what) for what in arguments.what if what.endswith(".toml")]
    if recipes and len(arguments.what) > 1:
        raise ConfigError("a recipe stands alone", fix="give one .toml recipe, or files, folders and globs")
    console.print("looking at the files …")
    if recipes:
        data = read_toml(recipes[0]).get("data", {})
        data = {**data, "exclude_documents": [], "on_bad_row": "skip"} if isinstance(data, dict) else data
        return DataConfig.parse(data, file=recipes[0]).open_manifest()
    _refuse_manifests(map(Path, arguments.what))
    source = SourceConfig(name="text", paths=tuple(arguments.what), text_key=arguments.text_key)
    return build_manifest([source], on_bad_row="skip")


def _refuse_manifests(paths: Iterable[Path]) -> None:
    """Refuse what `openelm data manifest` wrote: its one line would be read as a row without text."""
    for path in paths:
        with contextlib.suppress(OSError), path.open("rb") as file:
            if file.read(len(_MANIFEST_START)) == _MANIFEST_START:
                fix = f'give its files, or a recipe with data.manifest = "{path}"'
                raise ConfigError("this is a data manifest, not text", fix=fix, file=path)


def _documents(manifest: Manifest, drops: Drops) -> int:
    """Count the rows that could be read."""
    return sum(source.rows - sum(drops.get(source.name, {}).values()) for source in manifest.sources)


def _print_result(console: Console, listed: Counter[str], manifest: Manifest, drops: Drops, path: Path) -> None:
    total, documents = listed.total(), _documents(manifest, drops)
    for source in manifest.sources:
        if reasons := drops.get(source.name):
            counts = ", ".join(f"{number:,} {reason}" for reason, number in sorted(reasons.items()))
            passed = f"{sum(reasons.values()):,} of {source.rows:,} rows were passed over: {counts}"
            console.print(f"{printable(source.name)}: {passed}")
    for name, number in listed.items():
        console.print(f"{printable(name)}: {number:,} listed")
    place = printable(str(path))
    console.print(f"{total:,} of {documents:,} documents ({total / max(1, documents):.2%}) are in {place}")
    if total:
        console.print(f'next     data.exclude_documents = "{place}" in a recipe')


@contextlib.contextmanager
def _progress(manifest: Manifest, console: Console) -> Iterator[Callable[[int], None]]:
    """Show how much was read; yields what takes the bytes of each document."""
    blocks = (block for source in manifest.sources for shard in source.shards for block in shard.blocks)
    total, done = sum(block.bytes for block in blocks), 0
    with WorkBar(console, TaskProgressColumn(), "read {done:,} of about {total:,} bytes") as bar:

        def advance(count: int) -> None:
            nonlocal done
            done += count
            bar("reading", done, total)

        yield advance
