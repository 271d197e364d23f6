"""Measure what exact sums cost: python -m benchmarks.numerics --case demo [--shards 8] [--json].

Updates of the trainer itself, with `train.numerics` "fast" and "exact" in turns, on the same weights and batch. Under
`torchrun --nproc-per-node 2 -m benchmarks.numerics` both share the batch between the processes.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.train_step import CASES, cpu_name, model_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=CASES, default="demo")
    parser.add_argument("--shards", type=int, default=8, help="parts of the batch with exact sums")
    parser.add_argument("--repeats", type=int, default=5, help="timed updates a side, after one untimed")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    from openelm.train.distributed import open_processes

    with open_processes("cpu", 600.0) as processes:
        result = compare(options.case, options.shards, options.repeats, processes)
    if processes.leads:
        print(json.dumps(result) if options.json else "\n".join(f"{name:24} {value}" for name, value in result.items()))


def compare(case_name: str, shards: int, repeats: int, processes: Any) -> dict[str, Any]:
    """Update both sides in turns and return the medians."""
    import torch

    batch = own_rows(case_name, processes)
    updaters = {numerics: updater(case_name, numerics, shards, processes) for numerics in ("fast", "exact")}
    seconds: dict[str, list[float]] = {numerics: [] for numerics in updaters}
    for turn in range(repeats + 1):
        order = list(updaters) if turn % 2 == 0 else list(updaters)[::-1]
        for numerics in order:
            processes.wait_for_all()
            began = time.perf_counter()
            updaters[numerics].update(batch)
            processes.wait_for_all()
            seconds[numerics].append(time.perf_counter() - began)
    fast, exact = (median(seconds[numerics][1:]) for numerics in ("fast", "exact"))
    return {
        "case": case_name,
        "processes": processes.count,
        "shards": shards,
        "fast_seconds": round(fast, 4),
        "exact_seconds": round(exact, 4),
        "exact_over_fast": round(exact / fast, 3),
        "threads": torch.get_num_threads(),
        "cpu": cpu_name(),
        "torch": torch.__version__,
        "repeats": repeats,
    }


def updater(case_name: str, numerics: str, shards: int, processes: Any) -> Any:
    """Make the trainer's own updater for a case, without data."""
    import torch

    from openelm.train.objectives import NextToken
    from openelm.train.run import Run, RunConfig
    from openelm.train.update import Updater

    case = CASES[case_name]
    config = RunConfig.parse(
        {
            "data": {"sources": [{"name": "none", "paths": ["none"]}]},
            "train": {
                "steps": 1_000,
                "rows": case.rows,
                "length": case.length,
                "numerics": numerics,
                "shards": shards,
                "device": "cpu",
            },
        }
    )
    nothing: Any = None
    return Updater(
        Run(Path("none"), config, model_config(case), nothing, None, nothing, torch.device("cpu"), "fp32"),
        NextToken(),
        processes,
    )


def own_rows(case_name: str, processes: Any) -> Any:
    """Draw a batch and return this process's rows."""
    from openelm.data.stream import Batch

    case = CASES[case_name]
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, model_config(case).vocab_size, (case.rows, case.length + 1))
    rows = tokens[processes.rank :: processes.count]
    inputs, targets = np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])
    return Batch(inputs, targets, np.zeros(inputs.shape, np.int32), 1, np.zeros((len(rows), 32), np.uint8))


if __name__ == "__main__":
    main()
