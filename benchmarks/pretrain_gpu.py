"""Pre-train a size on given text for some seconds, and the model with equal layers and as many parameters beside it:

    python -m benchmarks.pretrain_gpu --text books/*.txt --seconds 500

Two real runs of `openelm train`, in turns. Called again with the same --work they go on; each call writes the curves
anew, pretrain.json and pretrain.svg, to --out, or to $OUT, or into the work folder.
"""

from __future__ import annotations

import argparse
import datetime
import html
import json
import os
import signal
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from openelm.data.stream import BatchStream
from openelm.errors import Stopped
from openelm.files.atomic import make_folder
from openelm.files.locks import folder_lock
from openelm.model.device import reuse_freed_memory
from openelm.release.probes import held_out_probe
from openelm.train.ledger import number, read_ledger, valid_events
from openelm.train.loop import train
from openelm.train.objectives import NextToken
from openelm.train.run import RunConfig, open_run

RULES = {"layer-wise": "openelm", "uniform": "uniform"}
COLOURS = {"layer-wise": "#1f6feb", "uniform": "#d1570a"}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", required=True, help="files, folders or globs")
    parser.add_argument("--held-out", nargs="*", default=[], help="other text to measure bits per byte on")
    parser.add_argument("--seconds", type=float, default=500, help="for both runs together, checkpoints included")
    parser.add_argument("--work", type=Path, default=Path("pretrain-gpu"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--size", default="270m")
    parser.add_argument("--steps", type=int, default=1000, help="of the schedule; the time may end before them")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--micro-rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--scores", type=int, default=20, help="measurements on held-out text over all steps")
    parser.add_argument("--peak", type=float, default=3e-3)
    parser.add_argument("--vocab-size", type=int, default=16_384)
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of [train], as JSON or text"
    )
    options = parser.parse_args(arguments)
    out = options.out or Path(os.environ.get("OUT", options.work))
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + options.seconds
    make_folder(options.work)
    behind_first = sorted(RULES, key=lambda side: done(options.work / side))
    for index, side in enumerate(behind_first):
        share = (end - time.monotonic()) / (len(behind_first) - index)
        train_for(options, side, time.monotonic() + share)
        write_curves(options, out)
    print(f"wrote {out / 'pretrain.json'} and {out / 'pretrain.svg'}")


def done(folder: Path) -> int:
    """Count the updates of a run."""
    return max((event["step"] for event in steps_of(folder)), default=0)


def steps_of(folder: Path, kind: str = "step") -> list[dict[str, Any]]:
    events = valid_events(read_ledger(folder / "ledger.jsonl"))
    return [event for event in events if event["event"] == kind]


def recipe(options: argparse.Namespace, side: str) -> RunConfig:
    settings = dict(setting.split("=", 1) for setting in options.set)
    held_out = [{"name": "held out", "paths": options.held_out}] if options.held_out else []
    return RunConfig.parse(
        {
            "model": {"size": options.size, "rule": RULES[side], "context": options.length},
            "tokenizer": {"vocab_size": options.vocab_size},
            "data": {
                "sources": [{"name": "text", "paths": options.text, "document_bytes": 16_384}],
                "min_characters": 1,
                "min_tokens": 1,
                "lanes": min(16, options.rows),
            },
            "held_out": held_out,
            "train": {
                "steps": options.steps,
                "rows": options.rows,
                "micro_rows": min(options.micro_rows, options.rows),
                "length": options.length,
                "device": options.device,
                **{name: int(value) if value.isdigit() else value for name, value in settings.items()},
            },
            "schedule": {"peak": options.peak, "warmup_steps": max(1, options.steps // 20)},
            "checkpoints": {"every": options.steps, "keep_last": 2},
            "evaluation": {"every": max(1, options.steps // options.scores)},
        }
    )


def train_for(options: argparse.Namespace, side: str, end: float) -> None:
    """Train until a time, and save."""
    folder: Path = options.work / side
    make_folder(folder)
    reuse_freed_memory()

    def stop_in_time(event: Any) -> None:
        if event["event"] == "step" and time.monotonic() > end:
            signal.raise_signal(signal.SIGTERM)  # the loop finishes the step and saves

    with ExitStack() as opened:
        opened.enter_context(folder_lock(folder))
        run = open_run(folder, recipe(options, side))
        settings = run.config.train

        def open_batches(cursors: Any) -> BatchStream:
            data = (run.config.data, run.manifest, run.tokenizer, run.tokenizer_folder)
            stream = BatchStream(*data, seed=settings.seed, rows=settings.rows, length=settings.length, cursors=cursors)
            return opened.enter_context(stream)

        try:
            train(
                run,
                open_batches=open_batches,
                objective=NextToken(settings.z_loss),
                probes=[held_out_probe(run)] if run.held_out else [],
                observers=[stop_in_time],
            )
        except Stopped as stopped:
            print(f"{side}: {stopped.what}")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def write_curves(options: argparse.Namespace, out: Path) -> None:
    """Write what the ledgers hold as JSON and as a picture."""
    sides = {side: curve(options.work / side) for side in RULES if (options.work / side / "run.json").exists()}
    device = torch.cuda.get_device_name() if options.device == "cuda" else options.device
    report = {"date": datetime.date.today().isoformat(), "device": device, "torch": torch.__version__, "sides": sides}
    (out / "pretrain.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "pretrain.svg").write_text(picture(sides, f"{options.size} on {device}, {report['date']}"))


def curve(folder: Path) -> dict[str, Any]:
    """Read a run's curve: tokens, nats a token, bits a byte of each step, its speed, and the held-out scores."""
    description = json.loads((folder / "run.json").read_bytes())
    events = steps_of(folder)
    speeds = sorted(event["tokens_per_second"] for event in events[5:]) or [0.0]
    tokens = {event["step"]: event["tokens"] for event in events}
    return {
        "parameters": description["parameters"],
        "plan": description["plan"],
        "tokens_per_second": speeds[len(speeds) // 2],
        "mfu_of_matmul": sorted(event["mfu"] for event in events)[len(events) // 2] if events else None,
        "steps": [
            [event["step"], event["tokens"], round(number(event["loss"]), 5), round(bits_per_byte(event), 5)]
            for event in events
        ],
        "held_out": [
            [event["step"], tokens.get(event["step"]), round(number(event["bits_per_byte"]), 5)]
            for event in steps_of(folder, "evaluation")
        ],
    }


def bits_per_byte(event: dict[str, Any]) -> float:
    return number(event["loss"]) * event["target_tokens"] / event["target_bytes"] / 0.6931471805599453


def picture(sides: dict[str, Any], title: str) -> str:
    """Draw training bits per byte over tokens, smoothed; circles are held-out text."""
    width, height, left, top, bottom = 900, 480, 60, 40, 50
    lines = {side: smooth([(row[1], row[3]) for row in found["steps"]]) for side, found in sides.items()}
    dots = {side: [(row[1], row[2]) for row in found["held_out"] if row[1]] for side, found in sides.items()}
    points = [point for group in (lines, dots) for one in group.values() for point in one]
    if not points:
        return '<svg xmlns="http://www.w3.org/2000/svg"/>\n'
    most, low, high = max(x for x, _ in points), min(y for _, y in points), max(y for _, y in points)
    high = max(high, low + 1e-6)

    def at(x: float, y: float) -> tuple[float, float]:
        share = (high - y) / (high - low)
        return left + x / most * (width - left - 20), top + share * (height - top - bottom)

    parts = [f'<text x="{left}" y="22" font-weight="bold">{html.escape(title)}: training bits per byte, tokens</text>']
    for step in range(5):
        y, x = low + step / 4 * (high - low), most * step / 4
        parts.append(f'<text x="8" y="{at(0, y)[1] + 4:.1f}">{y:.2f}</text>')
        parts.append(f'<path d="M{left} {at(0, y)[1]:.1f}H{width - 20}" stroke="#ddd"/>')
        parts.append(f'<text x="{at(x, low)[0]:.1f}" y="{height - 28}" text-anchor="middle">{x / 1e6:.1f}M</text>')
    for index, (side, line) in enumerate(lines.items()):
        path = "L".join(f"{px:.1f} {py:.1f}" for px, py in (at(x, y) for x, y in line))
        parts.append(f'<path d="M{path}" fill="none" stroke="{COLOURS[side]}" stroke-width="2"/>' if path else "")
        circles = (at(x, y) for x, y in dots[side])
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{COLOURS[side]}"/>' for x, y in circles]
        label = f"{side}, {sides[side]['parameters'] / 1e6:.1f}M, {sides[side]['tokens_per_second']:,.0f} tokens/s"
        parts.append(f'<text x="{width - 330}" y="{top + 18 + 18 * index}" fill="{COLOURS[side]}">{label}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="13"><rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n'
    )


def smooth(points: list[tuple[int, float]], weight: float = 0.9) -> list[tuple[int, float]]:
    """Take an exponential mean, without the bias of its beginning; at most 600 points."""
    mean, total, found = 0.0, 0.0, []
    for x, y in points:
        mean, total = weight * mean + (1 - weight) * y, weight * total + (1 - weight)
        found.append((x, mean / total))
    return found[:: max(1, len(found) // 600)]


if __name__ == "__main__":
    main()
