"""Survey many files: in parallel, going on after a kill, a part at a time; and check them against a manifest."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from openelm.data.document import ReadOptions
from openelm.data.journal import Journal
from openelm.data.manifest import Manifest, Shard, SourceConfig, State, file_states, scan_shard
from openelm.data.manifest_file import Survey, check_has_text, listing_sha256, write_manifest_file
from openelm.data.paths import expand_paths
from openelm.data.pool import run_tasks, run_tasks_on_ray
from openelm.data.remote import DataPath, is_url
from openelm.errors import ConfigError, DataError

BLOCK_BYTES = 16 << 20  # larger than a run's own scan: at a terabyte it is the number of blocks that costs
MOST_BAD_FILES = 20


@dataclass(frozen=True, slots=True)
class Progress:
    """How far work on files has come; `resumed_bytes` of `done_bytes` were done by an earlier start."""

    done_files: int
    files: int
    done_bytes: int
    bytes: int
    resumed_bytes: int = 0


Observe = Callable[[Progress], None]
Tasks = Callable[[str, Sequence[tuple[Any, ...]]], Iterator[tuple[int, Any]]]


def runner(workers: int, ray: str | None = None) -> Tasks:
    """Choose where work on files is done: in so many processes here, or on the Ray cluster at an address."""
    if ray is not None:
        return lambda function, tasks: run_tasks_on_ray(function, tasks, address=ray)
    return lambda function, tasks: run_tasks(function, tasks, workers=workers)


def survey(
    config: SourceConfig,
    out: Path,
    *,
    run: Tasks,
    part: int = 1,
    parts: int = 1,
    on_bad_row: Literal["error", "skip"] = "error",
    block_bytes: int = BLOCK_BYTES,
    observe: Observe = lambda progress: None,
) -> Survey:
    """Find, hash and scan the files of a source, or every `parts`-th of them, and write the manifest to `out`.

    Finished files are kept in a journal beside `out`; the same call goes on with the others.

    Raises:
        ConfigError: `out` exists, another process is at work on it, or its journal has other settings.
        DataError: names all files that cannot be used, up to 20; E_EMPTY when no file holds text.
        DiskError: `out` cannot be written.
    """
    if out.exists():
        raise ConfigError("the file exists already", file=out, fix="remove it, or choose another --out")
    if any(
        not is_url(path) and Path(os.path.abspath(path)) in Path(os.path.abspath(out)).parents for path in config.paths
    ):
        fix = "write it beside the folder, so that it is not taken for data"
        raise ConfigError("--out lies in a folder that is to be listed", file=out, fix=fix)
    files = expand_paths(config.paths, config.exclude)
    states = file_states([path for _, path in files])
    listing = listing_sha256([(name, state[0]) for (name, _), state in zip(files, states, strict=True)])
    source = replace(config.source(), weight=1.0)
    found = Survey(source, config.format, on_bad_row, block_bytes, len(files), listing, part, parts)
    mine = [(name, path, state) for (name, path), state in zip(files, states, strict=True)][part - 1 :: parts]
    settings = {**found.settings, "part": part, "parts": parts}
    with Journal(out.with_name(f"{out.name}.journal"), settings) as journal:
        shards = _scan_all(mine, journal, found, run, observe)
        found = found.with_shards(shards)
        check_has_text(found, ", ".join(config.paths))
        write_manifest_file(out, [found])
        journal.remove()
    return found


def _scan_all(
    files: Sequence[tuple[str, DataPath, State]], journal: Journal, found: Survey, run: Tasks, observe: Observe
) -> list[Shard]:
    shards: dict[str, Shard] = {}
    for _, path, state in files:
        if shard := journal.find(str(path), state):
            shards[str(path)] = shard
    left = [(name, path, state) for name, path, state in files if str(path) not in shards]
    total, resumed = sum(state[0] for _, _, state in files), sum(shard.bytes for shard in shards.values())
    done = resumed
    observe(Progress(len(shards), len(files), done, total, resumed))
    bad: list[DataError] = []
    options, strict = found.source.options, found.on_bad_row == "error"
    tasks = [(name, path, found.format, options, strict, found.block_bytes) for name, path, _ in left]
    for index, result in run("openelm.data.survey:scan_task", tasks):
        done += left[index][2][0]
        if isinstance(result, DataError):
            bad.append(result)
            if len(bad) == MOST_BAD_FILES:
                break
        elif isinstance(result, Shard):
            journal.add(result)
            shards[result.path] = result
        else:
            raise result
        observe(Progress(len(shards) + len(bad), len(files), done, total, resumed))
    raise_bad(bad, len(files))
    return [shards[str(path)] for _, path, _ in files]


def scan_task(name: str, path: DataPath, kind: str, options: ReadOptions, strict: bool, block_bytes: int) -> Shard:
    """Hash and scan one file, in whichever process."""
    return scan_shard(name, path, kind, options, strict=strict, block_bytes=block_bytes)


def check_files(manifest: Manifest, *, whole: bool, run: Tasks, observe: Observe = lambda progress: None) -> None:
    """Compare every file with a manifest.

    Args:
        whole: hash each file; otherwise only those whose size or time of change differs.

    Raises:
        DataError: names all files that differ or are gone, up to 20.
    """
    shards = [shard for source in manifest.sources for shard in source.shards]
    total, done, bad = sum(shard.bytes for shard in shards), 0, []
    for count, (index, result) in enumerate(
        run("openelm.data.survey:check_task", [(shard, whole) for shard in shards])
    ):
        if isinstance(result, DataError):
            bad.append(result)
            if len(bad) == MOST_BAD_FILES:
                break
        elif result is not None:
            raise result
        done += shards[index].bytes
        observe(Progress(count + 1, len(shards), done, total))
    raise_bad(bad, len(shards))


def check_task(shard: Shard, whole: bool) -> None:
    """Compare one file with its entry, in whichever process."""
    shard.check_unchanged(whole=whole)


def raise_bad(bad: Sequence[DataError], files: int) -> None:
    """Raise nothing, the only error, or one that names all files.

    Raises:
        DataError: with the code that all share, or E_DATA.
    """
    if not bad:
        return
    if len(bad) == 1:
        raise bad[0]
    listed = sorted(f"{error.file}: {error.what} [{error.code}]" for error in bad)
    more = ", and perhaps more" if len(bad) == MOST_BAD_FILES else ""
    codes = {error.code for error in bad}
    raise DataError(
        f"{len(bad)} of {files:,} files cannot be used{more}: {'; '.join(listed)}",
        fix="mend, replace or leave out these files, then run the same command again; what was done is kept",
        code=codes.pop() if len(codes) == 1 else None,
    )
