"""Measure what exact sums cost: python -m benchmarks.numerics --case demo [--shards 8] [--json].

Updates of the trainer itself, with `train.numerics` "fast" and "exact" in turns, on the same weights and batch. Under
`torchrun --nproc-per-node 2 -m benchmarks.numerics` both share the batch between the processes.
"""

from __future__ import annotations

import argparse
import json
import time
from statistics import median
from typing import Any

from benchmarks.work import CASES, model_config


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

    from openelm.model.device import cpu_name

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

    from openelm.bench.step import trainer

    case = CASES[case_name]
    return trainer(
        model_config(case),
        case.rows,
        case.length,
        precision="fp32",
        device=torch.device("cpu"),
        settings={"numerics": numerics, "shards": shards},
        processes=processes,
    )


def own_rows(case_name: str, processes: Any) -> Any:
    """Draw a batch and return this process's rows."""
    from openelm.bench.step import fixed_batch, random_tokens

    case = CASES[case_name]
    tokens = random_tokens(model_config(case).vocab_size, case.rows, case.length)
    return fixed_batch(tokens[processes.rank :: processes.count].contiguous())


if __name__ == "__main__":
    main()
