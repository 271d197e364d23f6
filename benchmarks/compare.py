"""Time one training step against other packages: python -m benchmarks.compare --case tiny --sides ours,litgpt [--json].

Every side lives in its own process, with the same tokens, optimizer hyperparameters, threads and allocator, and steps
in turns, so that a slow window of the machine meets all of them. Packages are imported from --peers-python;
`peers.txt` pins them. Models of equal depth and width: layer-wise widths where a package has them, else equal layers
with nearly as many parameters; compare tokens a second and useful FLOP/s. Prints a table, or one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.peers import PEERS, UNIFORM
from benchmarks.turns import SideEnded, Worker, in_turn
from benchmarks.work import CASES, Case, Layers, Work, write_work

OURS = ("ours", "ours-untouched")
SIDES = (*OURS, "plain", *PEERS)
DEFAULT = "ours,plain,transformers,trainer,litgpt,openelm-pytorch"
TOLERANCES = {"fp32": 1e-3, "bf16": 3e-2}  # of first losses, which different kernels round differently


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, default="tiny")
    parser.add_argument("--sides", type=chosen_sides, default=DEFAULT, help=f"any of: {','.join(SIDES)}")
    add_common_options(parser)
    parser.add_argument("--peers-python", default=sys.executable, metavar="PATH", help="an interpreter that has them")
    parser.add_argument("--preload", metavar="PATH", help="an allocator to put under all sides")
    parser.add_argument(
        "--untouched-allocator",
        action="store_true",
        help="ours without asking glibc to keep freed memory, which `openelm train` does and the peers do not",
    )
    options = parser.parse_args()
    sides = ["ours-untouched" if side == "ours" and options.untouched_allocator else side for side in options.sides]
    if options.preload and not Path(options.preload).is_file():
        parser.error(f"--preload {options.preload} is no file")
    result = compare(
        CASES[options.case],
        sides,
        resolve(options.precision),
        options.repeats,
        options.threads,
        peers_python=options.peers_python,
        preload=options.preload,
    )
    result = {"case": options.case, **result}
    print(json.dumps(result) if options.json else table(result))


def add_common_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--precision",
        choices=("auto", "bf16", "fp32"),
        default="auto",
        help="auto: bf16 where the CPU has units for it, else fp32 (without them a peer's step takes minutes)",
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed steps a side, after one untimed")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", action="store_true")


def chosen_sides(text: str) -> list[str]:
    sides = list(dict.fromkeys(text.split(",")))
    if unknown := [side for side in sides if side not in SIDES]:
        raise argparse.ArgumentTypeError(f"no side is called {unknown[0]!r}; sides: {', '.join(SIDES)}")
    return sides


def resolve(precision: str) -> str:
    from openelm.kernels.precision import cpu_multiplies_bf16

    return ("bf16" if cpu_multiplies_bf16() else "fp32") if precision == "auto" else precision


def compare(
    case: Case,
    sides: list[str],
    precision: str,
    repeats: int,
    threads: int,
    *,
    peers_python: str = sys.executable,
    preload: str | None = None,
) -> dict[str, Any]:
    """Step all sides in turns and return what each did, or why it was skipped.

    Raises:
        SystemExit: sides with the same weights have different first losses, so they do not do the same work.
    """
    with tempfile.TemporaryDirectory() as name, ExitStack() as opened:
        kinds: dict[str, Layers] = {side: "uniform" if side in UNIFORM else "layer-wise" for side in sides}
        folders = {kind: Path(name) / kind for kind in ("layer-wise", *kinds.values())}
        works: dict[str, Work] = {kind: write_work(folder, case, kind) for kind, folder in folders.items()}
        workers: dict[str, Worker] = {}
        for side in (*sides, "matmul"):
            python = peers_python if side in PEERS else sys.executable
            folder = folders[kinds.get(side, "layer-wise")]
            workers[side] = Worker(side, folder, precision, threads, python=python, preload=preload)
            opened.callback(workers[side].close)
        yardstick = workers.pop("matmul")
        yardstick.answer()
        facts, steps, gflops = step_in_turns(workers, yardstick, repeats)
    same = {side: kind for side, kind in kinds.items() if "differs" not in facts[side]}
    check_first_losses(same, steps, TOLERANCES[precision])
    rate = median(gflops)
    answered = {side: described(facts[side], steps.get(side, []), works[kinds[side]], rate) for side in sides}
    for ours in [side for side in OURS if "tokens_per_second" in answered.get(side, {})][:1]:
        for result in (answered[side] for side in sides if "tokens_per_second" in answered[side]):
            result["ratio"] = round(answered[ours]["tokens_per_second"] / result["tokens_per_second"], 3)
            result["useful_flops_ratio"] = round(answered[ours]["useful_gflops"] / result["useful_gflops"], 3)
    return {
        "precision": precision,
        "rows": case.rows,
        "length": case.length,
        "repeats": repeats,
        "threads": threads,
        "matmul_gflops": round(rate, 1),
        "cpu": name_of_cpu(),
        "preload": preload,
        "date": date.today().isoformat(),
        "sides": answered,
    }


def step_in_turns(
    workers: dict[str, Worker], yardstick: Worker, repeats: int
) -> tuple[dict[str, dict[str, Any]], dict[str, list[dict[str, Any]]], list[float]]:
    """Return what each side says of itself, its steps, of which the first is untimed, and the speed of products."""
    facts: dict[str, dict[str, Any]] = {}
    steps: dict[str, list[dict[str, Any]]] = {}
    gflops = []

    def ask(side: str, word: str) -> None:
        try:
            if word == "step":
                step = workers[side].ask("step")
                steps.setdefault(side, []).append(step)
                done = f"step {len(steps[side]) - 1} of {repeats}" if len(steps[side]) > 1 else "untimed step"
                print(f"{side}: {done}, {step['seconds']:.2f} s", file=sys.stderr)
            else:
                facts[side] |= workers[side].ask(word) if word else workers[side].answer()
        except SideEnded as error:
            facts[side] = {"skipped": str(error)}

    def going() -> list[str]:
        return [side for side in workers if "skipped" not in facts[side]]

    for side in workers:
        facts[side] = {}
        ask(side, "")
    for side in going():
        ask(side, "step")  # untimed: allocators and caches settle
    for turn in range(repeats):
        for side in in_turn(going(), turn) if going() else ():
            ask(side, "step")
        gflops.append(yardstick.ask("step")["gflops"])
    for side in going():
        ask(side, "stop")
    return facts, steps, gflops


def check_first_losses(kinds: dict[str, Layers], steps: dict[str, list[dict[str, Any]]], tolerance: float) -> None:
    """Compare the first losses of sides with equal weights, z-loss included between ours and the plain one."""
    for kind in ("layer-wise", "uniform"):
        firsts = {side: steps[side][0] for side, layers in kinds.items() if layers == kind and side in steps}
        by_term: dict[str, dict[str, float]] = {"loss": {}, "cross_entropy": {}}
        for side, first in firsts.items():
            if side in (*OURS, "plain"):
                by_term["loss"][side] = first["loss"]
            if side != "plain":
                by_term["cross_entropy"][side] = first.get("cross_entropy", first["loss"])
        for losses in by_term.values():
            if losses and not max(losses.values()) - min(losses.values()) < tolerance:
                sys.exit(f"the first losses differ, so the sides do not do the same work: {losses}")


def described(facts: dict[str, Any], steps: list[dict[str, Any]], work: Work, gflops: float) -> dict[str, Any]:
    """Put a side's numbers together; `gflops` is the yardstick of its MFU."""
    if "skipped" in facts:
        return {"skipped": facts["skipped"]}
    seconds = [step["seconds"] for step in steps[1:]]
    tokens_per_second = work.rows * work.length / median(seconds)
    useful = tokens_per_second * work.flops_per_token / 1e9
    return {
        "tokens_per_second": round(tokens_per_second, 1),
        "useful_gflops": round(useful, 2),
        "mfu": round(useful / gflops, 3),
        "seconds": [round(value, 4) for value in seconds],
        "cpu_seconds": [round(step["cpu_seconds"], 4) for step in steps[1:]],
        "layers": work.layers,
        "flops_per_token": work.flops_per_token,
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
        **facts,
    }


def name_of_cpu() -> str:
    from openelm.model.device import cpu_name

    return cpu_name()


def table(result: dict[str, Any]) -> str:
    """Lay the result out for a terminal."""
    from openelm.evaluate.tables import aligned

    keys = ("tokens_per_second", "ratio", "useful_gflops", "useful_flops_ratio", "mfu")
    rows, notes = [], []
    for side, values in result["sides"].items():
        if "skipped" in values:
            notes.append(f"{side}: skipped: {values['skipped']}")
            continue
        if "differs" in values:
            notes.append(f"{side} does less: {values['differs']}")
        low, high = min(values["seconds"]), max(values["seconds"])
        rows.append(
            (
                side,
                *(values.get(key) for key in keys),
                f"{low:.2f} to {high:.2f}",
                f"{median(values['cpu_seconds']):.2f}",
                f"{values['peak_bytes'] / 1e9:.2f}",
                f"{values['parameters']:,}",
                f"{values['flops_per_token'] / 1e6:.1f}",
                f"{values['first_loss']:.4f} {values['last_loss']:.4f}",
                f"{values['allocator']} {values.get('allocator_settings') or ''}".strip(),
            )
        )
    heads = (
        "side",
        "tokens/s",
        "ours/it",
        "useful GFLOP/s",
        "ours/it",
        "MFU",
        "seconds a step",
        "CPU seconds",
        "peak GB",
    )
    heads += ("parameters", "MFLOP/token", "first, last loss", "allocator")
    start = (
        f"{result['case']}, {result['rows']} x {result['length']} tokens, {result['precision']}, {result['cpu']}, "
        f"{result['threads']} threads, matmul {result['matmul_gflops']} GFLOP/s, {result['date']}"
    )
    return "\n".join([start, "", aligned(heads, rows), *notes])


if __name__ == "__main__":
    main()
