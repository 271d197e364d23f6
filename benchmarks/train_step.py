"""Measure training steps against the plain baseline: python -m benchmarks.train_step --case tiny [--json].

Two sides of `benchmarks.compare`, both on the allocator as it is: the trainer's own update and the plain
implementation, with the same weights and batch, in turns. Prints one JSON line, or a short table.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from benchmarks.compare import add_common_options, compare, resolve
from benchmarks.work import CASES

OURS, PLAIN = "ours-untouched", "plain"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=CASES, default="tiny")
    add_common_options(parser)
    options = parser.parse_args()
    found = compare(CASES[options.case], [OURS, PLAIN], resolve(options.precision), options.repeats, options.threads)
    result = {"case": options.case, **short(found)}
    if options.json:
        print(json.dumps(result))
    else:
        print("\n".join(f"{name:28} {value}" for name, value in result.items()))


def short(found: dict[str, Any]) -> dict[str, Any]:
    """Name the numbers of both sides as the files in `results/` do."""
    ours, plain = found["sides"][OURS], found["sides"][PLAIN]
    pairs = {}
    for name in ("tokens_per_second", "mfu", "peak_bytes", "seconds", "first_loss"):
        pairs |= {name: ours[name], f"baseline_{name}": plain[name]}
    return {
        "precision": found["precision"],
        **pairs,
        "ratio": plain["ratio"],
        "matmul_gflops": found["matmul_gflops"],
        "allocator": ours["allocator"],
        "cpu": found["cpu"],
        "torch": ours["torch"],
        "threads": found["threads"],
        "repeats": found["repeats"],
        "date": found["date"],
    }


if __name__ == "__main__":
    main()
