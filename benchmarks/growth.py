"""Measure how the time of an update grows: python -m benchmarks.growth rows|length|steps [--json].

rows: seconds a token of `tiny` at 512 tokens a row, with 1 to 64 rows; small batches are updated as often as it takes
to see 16 rows, so that a moment's disturbance weighs as much on each. length: seconds a FLOP of `tiny` with 4,096
tokens in rows of 512 to 4,096. steps: seconds of a small model's updates, from the first to the ten-thousandth. Updates
of the trainer itself, in fp32 on the CPU, in turns; medians, and each over the first one's.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from datetime import date
from statistics import median
from typing import Any

from benchmarks.work import DEMO, Case, model_config

Batches = Sequence[tuple[int, int]]  # rows, length
ROWS: Batches = [(1, 512), (4, 512), (16, 512), (64, 512)]
LENGTHS: Batches = [(8, 512), (4, 1024), (2, 2048), (1, 4096)]
SMALL = Case("5m", 4, 64, {**DEMO, "model_dim": 64, "vocab_size": 512})
STEPS, WINDOW = 10_000, 1_000
_LEAST_TOKENS = 16 * 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("growth", choices=("rows", "length", "steps"))
    parser.add_argument("--repeats", type=int, default=5, help="timed turns, after one untimed")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    import torch

    from openelm.model.device import cpu_name, reuse_freed_memory

    reuse_freed_memory()  # as `openelm train` does
    if options.growth == "steps":
        found = over_steps(STEPS, WINDOW)
    else:
        found = over_batches(ROWS if options.growth == "rows" else LENGTHS, options.repeats, options.growth == "length")
    facts = {
        "cpu": cpu_name(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "date": str(date.today()),
    }
    result = {"growth": options.growth, **found, **facts}
    print(json.dumps(result) if options.json else "\n".join(f"{name:24} {value}" for name, value in result.items()))


def over_batches(batches: Batches, repeats: int, by_flops: bool) -> dict[str, Any]:
    """Update `tiny` with each batch in turns; the cost of an update is counted in tokens or in FLOPs."""
    from openelm.bench.step import fixed_batch, random_tokens

    case = Case("tiny", *batches[0], {})
    config, trainer = model_config(case), updater(case, max(length for _, length in batches))
    work = {size: fixed_batch(random_tokens(config.vocab_size, *size)) for size in batches}
    seconds: dict[tuple[int, int], list[float]] = {size: [] for size in batches}
    for turn in range(repeats + 1):
        for size in batches if turn % 2 == 0 else batches[::-1]:
            updates = max(1, _LEAST_TOKENS // (size[0] * size[1]))
            seconds[size].append(sum(timed(trainer, work[size]) for _ in range(updates)) / updates)
    cost = {}
    for (rows, length), times in seconds.items():
        flops = config.plan.training_flops_per_token(config.vocab_size, length) if by_flops else 1
        cost[f"{rows} x {length}"] = median(times[1:]) / (rows * length * flops)
    first = next(iter(cost.values()))
    return {
        "seconds": {f"{rows} x {length}": round(median(times[1:]), 3) for (rows, length), times in seconds.items()},
        "cost over the first": {name: round(value / first, 3) for name, value in cost.items()},
        "repeats": repeats,
    }


def over_steps(steps: int, window: int) -> dict[str, Any]:
    """Time every update of a long run, in windows."""
    from openelm.bench.step import fixed_batch, random_tokens

    trainer = updater(SMALL, SMALL.length)
    batch = fixed_batch(random_tokens(model_config(SMALL).vocab_size, SMALL.rows, SMALL.length))
    seconds = [timed(trainer, batch) for _ in range(steps)]
    medians = [median(seconds[start : start + window]) for start in range(0, steps, window)]
    over_first = [round(value / medians[0], 3) for value in medians]
    return {"milliseconds": [round(1e3 * value, 2) for value in medians], "over the first": over_first, "steps": steps}


def updater(case: Case, length: int) -> Any:
    import torch

    from openelm.bench.step import trainer

    return trainer(model_config(case), case.rows, length, precision="fp32", device=torch.device("cpu"))


def timed(trainer: Any, batch: Any) -> float:
    began = time.perf_counter()
    trainer.update(batch)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
