"""The actions of `openelm data` and their options; imports nothing that reads data, so help is instant."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

_MANIFEST = """\
Look at every file of a source once: format, bytes, SHA-256, rows, and where its blocks begin. A recipe then says
data.manifest = "FILE" instead of data.sources, and training starts without reading the files again.

Stop it as you like: finished files are kept in FILE.journal, and the same command goes on. Files that cannot be used
are all named at the end (exit 3)."""
_MANIFEST_EXAMPLES = """\
example:
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
_DECONTAMINATE = """\
List the training documents that share runs of words with evaluation texts, and say how much of those was met. A recipe
leaves them out with data.exclude_documents."""
_DEDUP = """\
List the training documents that say again what an earlier one says. A recipe leaves them out with
data.exclude_documents."""


def add_data_actions(parser: argparse.ArgumentParser) -> None:
    """Describe the actions of `data`; `main.py` names their handlers."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, summary, describe in _ACTIONS:
        describe(actions.add_parser(name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter))


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


def _describe_decontaminate(parser: argparse.ArgumentParser) -> None:
    parser.description = _DECONTAMINATE
    parser.epilog = (
        "example:\n  openelm data decontaminate my-recipe.toml --against benchmarks/*.jsonl --out lists/benchmarks"
    )
    _add_text(parser)
    parser.add_argument(
        "--against",
        nargs="+",
        required=True,
        metavar="FILE",
        help="evaluation texts: .txt (one text), .jsonl(.gz/.zst) or .parquet (each string of each row is a text)",
    )
    parser.add_argument("--out", required=True, help="new folder for exclude.jsonl and report.json")
    parser.add_argument(
        "--words", type=int, default=13, metavar="N", help="words in a row that count as a match (default: %(default)s)"
    )
    parser.add_argument(
        "--min-share",
        type=float,
        default=0.0,
        metavar="F",
        help="list only documents with at least this part of their words in matches (default: %(default)s, any match)",
    )


def _describe_dedup(parser: argparse.ArgumentParser) -> None:
    parser.description = _DEDUP
    parser.epilog = "example:\n  openelm data dedup exact data/web data/books --out lists/duplicates.jsonl"
    parser.add_argument(
        "method",
        choices=("exact", "minhash"),
        help="exact: equal but for case, ASCII punctuation and spaces; minhash: nearly equal (the extra `dedup`)",
    )
    _add_text(parser)
    parser.add_argument("--out", required=True, metavar="FILE", help="the list to write, a .jsonl file")
    parser.add_argument(
        "--words", type=int, default=5, metavar="N", help="minhash: words in a row (default: %(default)s)"
    )
    parser.add_argument("--bands", type=int, default=14, metavar="B", help="minhash: bands (default: %(default)s)")
    parser.add_argument(
        "--hashes", type=int, default=8, metavar="R", help="minhash: hashes a band (default: %(default)s)"
    )


def _add_text(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what", nargs="+", metavar="RECIPE_OR_PATH", help="a .toml recipe, for its sources; or files, folders and globs"
    )
    parser.add_argument(
        "--text-key", default="text", metavar="KEY", help="column or key of paths (default: %(default)s)"
    )


_ACTIONS: tuple[tuple[str, str, Callable[[argparse.ArgumentParser], None]], ...] = (
    ("manifest", "list the files of a source with their hashes, rows and blocks", _describe_manifest),
    ("merge", "join the parts of a manifest, or several sources", _describe_merge),
    ("check", "compare files with their manifest", _describe_check),
    ("decontaminate", "list the documents that hold pieces of evaluation texts", _describe_decontaminate),
    ("dedup", "list the documents that say again what an earlier one says", _describe_dedup),
)
