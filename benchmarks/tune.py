"""Time an update of `openelm tune` beside trl's SFTTrainer: python -m benchmarks.tune MODEL --data FILE [--json].

Each side is a process of its own and learns the same examples, the same number of them a step, with the adapter and
the optimizer of the shipped recipe; they step in turns. trl gets our ids, and several settings (padded, or joined
without padding; so many examples a forward pass), of which the fastest takes part. Speeds count input tokens of
examples, not padding. `ratio` is the median over turns of our tokens a second over trl's; peaks are the most memory
that each process held.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.turns import Worker, in_turn
from openelm.model.device import cpu_name

OURS = "ours"
SETTINGS = "padded-4,padded-8,padded-16,padded-32,flat-8,flat-32"
TOLERANCES = {"fp32": 1e-4, "bf16": 3e-2}  # of first losses, which different kernels round differently

Step = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a model folder of ours")
    parser.add_argument("--data", type=Path, required=True, help="examples, as `openelm tune --data` takes them")
    parser.add_argument("--method", choices=("sft", "lora", "dora"), default="sft")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--turns", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--trl", default=SETTINGS, help="settings of trl to choose from (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="path=value", help="of the recipe, for both")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        work = {"model": str(options.model.absolute()), "data": str(options.data.absolute())}
        work |= {"method": options.method, "settings": options.set}
        (folder / "work.json").write_text(json.dumps(work))
        theirs = fastest(folder, options.trl.split(","), options.precision, options.threads)
        facts, steps = in_turns(folder, [OURS, theirs], options.precision, options.threads, options.turns)
    check_first_losses(steps, TOLERANCES[options.precision])
    result = {
        "command": shlex.join(["python", "-m", "benchmarks.tune", *sys.argv[1:]]),
        "model": options.model.name,
        "method": options.method,
        "precision": options.precision,
        **described(facts, steps, OURS, theirs),
        "turns": options.turns,
        "threads": options.threads,
        "cpu": cpu_name(),
        "date": str(date.today()),
    }
    print(json.dumps(result) if options.json else "\n".join(f"{key:28} {value}" for key, value in result.items()))


def fastest(folder: Path, settings: list[str], precision: str, threads: int) -> str:
    """Return the side of trl whose second step was the fastest."""
    seconds = {}
    for side in (f"trl-{setting}" for setting in settings):
        if len(settings) == 1:
            return side
        _, steps = in_turns(folder, [side], precision, threads, turns=1)
        seconds[side] = steps[side][1]["seconds"]
    return min(seconds, key=lambda side: seconds[side])


def in_turns(
    folder: Path, sides: list[str], precision: str, threads: int, turns: int
) -> tuple[dict[str, Any], dict[str, list[Step]]]:
    """Return what each side says of itself, and its steps, of which the first is untimed."""
    workers: dict[str, Worker] = {}
    steps: dict[str, list[Step]] = {side: [] for side in sides}
    try:
        for side in sides:
            workers[side] = Worker(side, folder, precision, threads, module="benchmarks.tune_sides")
        facts = {side: worker.answer() for side, worker in workers.items()}
        for turn in range(-1, turns):
            for side in in_turn(sides, max(0, turn)):
                steps[side].append(workers[side].ask("step"))
                print(f"{side}: step {turn + 1} of {turns}, {steps[side][-1]['seconds']:.2f} s", file=sys.stderr)
        for side, worker in workers.items():
            facts[side] |= worker.ask("stop")
    finally:
        for worker in workers.values():
            worker.close()
    return facts, steps


def check_first_losses(steps: dict[str, list[Step]], tolerance: float) -> None:
    losses = {side: found[0]["loss"] for side, found in steps.items()}
    if not max(losses.values()) - min(losses.values()) < tolerance:
        sys.exit(f"the first losses differ, so the sides do not do the same work: {losses}")


def described(facts: dict[str, Any], steps: dict[str, list[Step]], ours: str, theirs: str) -> dict[str, Any]:
    """Put the numbers of both sides together."""
    timed = {side: found[1:] for side, found in steps.items()}
    speeds = {side: [step["tokens"] / step["seconds"] for step in found] for side, found in timed.items()}
    pairs = zip(speeds[ours], speeds[theirs], strict=True)
    about: dict[str, Any] = {
        "tokens_per_second": round(median(speeds[ours]), 1),
        "trl_tokens_per_second": round(median(speeds[theirs]), 1),
        "ratio": round(median(our / their for our, their in pairs), 3),
        "trl_setting": theirs.removeprefix("trl-"),
    }
    for name, side in (("", ours), ("trl_", theirs)):
        real, all_positions = (sum(step[key] for step in timed[side]) for key in ("tokens", "positions"))
        about |= {
            f"{name}padding": round(1 - real / all_positions, 3),
            f"{name}seconds": [round(step["seconds"], 3) for step in timed[side]],
            f"{name}peak_bytes": facts[side]["peak_bytes"],
            f"{name}losses": [round(step["loss"], 4) for step in (steps[side][0], steps[side][-1])],
        }
    assert facts[ours]["learning"] == facts[theirs]["learning"]
    return {**about, "learning": facts[ours]["learning"], "torch": facts[ours]["torch"], "trl": facts[theirs]["trl"]}


if __name__ == "__main__":
    main()
