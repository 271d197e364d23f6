"""The sub-verbs of `openelm data` and their options; imports nothing that reads data, so help is instant."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import TypeAlias

Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # argparse has no public name for it

_MANIFEST = """\
Look at every file of a source once: format, bytes, SHA-256, rows, and where its blocks begin. A recipe then says
data.manifest = "FILE" instead of data.sources, and training starts without reading the files again.

Stop it as you like: finished files are kept in FILE.journal, and the same command goes on. Files that cannot be used
are all named at the end (exit 3)."""
_MANIFEST_EXAMPLES = """\
examples:
  openelm data manifest /data/web --name web --workers 16 --out web.json
  openelm data manifest s3://bucket/pile/ --format jsonl --on-bad-row skip --out pile.json
  openelm data manifest /data/web --name web --part 2/8 --out web-2.json    on the second of eight machines
  openelm data merge web-*.json --out web.json"""
_MERGE = """\
Join the parts that `openelm data manifest --part i/n` made, on one machine or several: the result is, byte for byte,
the manifest of one go. Whole manifests of different names are joined to one with several sources. Parts that overlap,
are missing, or were made with other settings or from other files are refused by name (exit 2)."""
_CHECK = """\
Compare files with their manifest: size and time of change, and the SHA-256 of those that differ. With --whole hash
every file. All files that changed or are gone are named, up to 20 (exit 3)."""


def add_data_verbs(parser: argparse.ArgumentParser) -> None:
    """Describe the sub-verbs of `data`; each sets `data_handler`, which `data.py` calls."""
    verbs = parser.add_subparsers(dest="data_verb", required=True, metavar="VERB")
    for name, summary, describe, handler in _VERBS:
        verb = verbs.add_parser(name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter)
        describe(verb)
        verb.set_defaults(data_handler=handler)


def _describe_manifest(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = _MANIFEST, _MANIFEST_EXAMPLES
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="files, folders, globs, or URLs (s3://…, https://…; extra `remote`)"
    )
    parser.add_argument("--out", required=True, help="manifest file to write")
    parser.add_argument("--name", default="text", help="the source's name in recipes (default: %(default)s)")
    parser.add_argument("--text-key", default="text", help="JSON key or Parquet column of the text (default: text)")
    parser.add_argument(
        "--format", choices=("auto", "txt", "jsonl", "parquet"), default="auto", help="auto goes by the suffix"
    )
    parser.add_argument("--exclude", action="append", default=[], metavar="GLOB", help="leave out; may be repeated")
    parser.add_argument(
        "--document-bytes", type=int, metavar="N", help="cut txt files at the first blank line after N bytes"
    )
    parser.add_argument(
        "--max-document-bytes", type=int, metavar="N", help="a longer row is a bad row (default: 16 MiB)"
    )
    parser.add_argument(
        "--on-bad-row",
        choices=("error", "skip"),
        default="error",
        help="skip: let rows over the size limit pass; training then counts them as dropped (default: %(default)s)",
    )
    parser.add_argument(
        "--block-bytes", type=int, metavar="N", help="text in a block of a large file (default: 16 MiB)"
    )
    parser.add_argument("--part", default="1/1", metavar="i/n", help="only every n-th file, from the i-th on")
    _add_workers(parser)


def _describe_merge(parser: argparse.ArgumentParser) -> None:
    parser.description = _MERGE
    parser.epilog = "example:\n  openelm data merge web-1.json web-2.json --out web.json"
    parser.add_argument("parts", nargs="+", metavar="PART", help="manifests to join")
    parser.add_argument("--out", required=True, help="manifest file to write")


def _describe_check(parser: argparse.ArgumentParser) -> None:
    parser.description = _CHECK
    parser.epilog = "example:\n  openelm data check web.json --whole --workers 8"
    parser.add_argument("manifest", help="manifest file, or one part")
    parser.add_argument("--whole", action="store_true", help="hash every file, also those that look the same")
    _add_workers(parser)


def _add_workers(parser: argparse.ArgumentParser) -> None:
    cores = os.cpu_count() or 1
    parser.add_argument(
        "--workers", type=int, default=cores, metavar="K", help="processes (default: %(default)s, all cores)"
    )
    parser.add_argument(
        "--ray", metavar="ADDRESS", help="work on a Ray cluster instead: its address, auto, or local (extra `ray`)"
    )


# name, summary, options, "module:function" in this folder: a new sub-verb is a line here.
_VERBS: tuple[tuple[str, str, Callable[[argparse.ArgumentParser], None], str], ...] = (
    ("manifest", "list the files of a source with their hashes, rows and blocks", _describe_manifest, "data:manifest"),
    ("merge", "join the parts of a manifest, or several sources", _describe_merge, "data:merge"),
    ("check", "compare files with their manifest", _describe_check, "data:check"),
)
