"""`openelm table`: published scores, and measured ones among them."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from openelm.errors import printable
from openelm.evaluate.comparison import FORMATS, compare, to_json
from openelm.evaluate.presets import PRESETS
from openelm.evaluate.results import read_result
from openelm.files.atomic import write_atomic

TABLE_EXAMPLE = (
    "openelm table\n"
    "  openelm eval runs/demo/model --suite openllm --json > mine.json\n"
    "  openelm table mine.json --suite openllm --format html --out table.html"
)


def add_table_options(parser: argparse.ArgumentParser) -> None:
    """Describe the options."""
    parser.add_argument(
        "results",
        nargs="*",
        metavar="RESULTS.json",
        help="what openelm eval MODEL --suite NAME --json printed, one model and suite a file",
    )
    parser.add_argument("--suite", choices=tuple(PRESETS), help="only this table (default: all)")
    layout = parser.add_mutually_exclusive_group()
    layout.add_argument("--format", choices=tuple(FORMATS), default="text", help="(default: %(default)s)")
    layout.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", metavar="FILE", help="write there and print nothing")


def table(arguments: argparse.Namespace) -> int:
    """Lay out the tables and print or write them."""
    results = [read_result(Path(name)) for name in arguments.results]
    suites = [suite for suite in PRESETS.values() if arguments.suite in (None, suite.name)]
    for result in results:
        if result.suite not in {suite.name for suite in suites}:
            print(f"openelm: {printable(result.file)} is of {result.suite}, left out", file=sys.stderr)
    comparisons = [compare(suite, results) for suite in suites]
    text = json.dumps(to_json(comparisons)) + "\n" if arguments.json else FORMATS[arguments.format](comparisons)
    if arguments.out is None:
        print(text, end="")
    else:
        write_atomic(Path(arguments.out), text.encode())
    return 0
