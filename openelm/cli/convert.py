"""`openelm convert`: a model from one layout to another."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.progress import DownloadColumn

from openelm.cli.screen import Screen, WorkBar


def convert(arguments: argparse.Namespace) -> int:
    """Open a model, change what was asked for, write it, and say what was done."""
    from openelm.convert.convert import Options, open_source, prepared, write
    from openelm.model.device import reuse_freed_memory
    from openelm.text.tokenizer import load_tokenizer

    reuse_freed_memory()  # one tensor after the other in the same pages
    console, out = Screen(), Path(arguments.out)
    options = Options(
        to=arguments.to,
        dtype=arguments.dtype,
        quantize=arguments.quantize,
        rows=arguments.rows,
        chat_tuned={"instruct": True, "base": False, None: None}[arguments.kind],
        self_contained=arguments.self_contained,
        shard_bytes=round(arguments.shard_gb * 1e9),
        replace=arguments.replace,
    )
    tokenizer = None if arguments.tokenizer is None else load_tokenizer(Path(arguments.tokenizer))
    with open_source(Path(arguments.source)) as opened:
        source = prepared(opened, options, tokenizer)
        for note in source.notes:
            console.print(f"note: {note}", style="dim")
        what, total, done = f"{source.layout} to {options.to}", sum(t.bytes for t in source.weights.values()), 0
        with WorkBar(console, DownloadColumn(), "{what}: {done:,} of {total:,} bytes") as bar:

            def advance(count: int) -> None:
                nonlocal done
                done += count
                bar(what, done, total)

            write(source, out, options, advance)
    console.print(f"{out}: {source.config.parameters:,} parameters, {options.to}")
    return 0
