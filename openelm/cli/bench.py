"""`openelm bench`: what this machine can do at most, and what part of it training, decoding and loading reach."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.progress import MofNCompleteColumn

from openelm.bench.cases import CASES, Bench
from openelm.bench.machine import allocator
from openelm.bench.measurement import Measurement
from openelm.bench.step import Precision
from openelm.cli.screen import Screen, WorkBar
from openelm.errors import ConfigError
from openelm.evaluate.tables import aligned
from openelm.kernels.precision import cpu_multiplies_bf16
from openelm.model.device import choose_device, reuse_freed_memory
from openelm.model.sizes import model_size
from openelm.release.units import significant
from openelm.train.environment import environment

LEAST_REPEATS = 5


def bench(arguments: argparse.Namespace) -> int:
    """Measure the chosen cases; prints a JSON line for each as it is done, or a table of all."""
    _check(arguments)
    config = model_size(arguments.size)
    if arguments.length > config.rope_max_length:
        raise ConfigError(
            f"--length {arguments.length} is longer than the {config.rope_max_length} positions of {arguments.size}",
            fix="give a smaller --length",
        )
    device = choose_device(arguments.device)
    precision = arguments.precision
    if precision == "auto":
        precision = "bf16" if device.type != "cpu" or cpu_multiplies_bf16() else "fp32"
    reuse_freed_memory()
    with (
        _threads(arguments.threads),
        WorkBar(Screen(stderr=True), MofNCompleteColumn(), "{what} {done}/{total}") as bar,
    ):
        work = Bench(
            config,
            arguments.rows,
            arguments.length,
            precision,
            device,
            arguments.repeats,
            Path(arguments.folder),
            arguments.disk_mib << 20,
            bar,
        )
        facts, found = _facts(device, precision), []
        for measurement in work.measure(arguments.case or CASES):
            found.append(measurement)
            if arguments.json:
                print(json.dumps(_line(measurement, facts)), flush=True)
    if not arguments.json:
        _show(found, facts, arguments, precision)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    if arguments.repeats < LEAST_REPEATS:
        raise ConfigError(
            f"--repeats {arguments.repeats} is too few for a median",
            fix=f"give {LEAST_REPEATS} or more",
        )
    for name in ("rows", "length", "disk_mib", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}", fix="give 1 or more")


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Compute on so many threads, and afterwards on as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _facts(device: torch.device, precision: Precision) -> dict[str, Any]:
    surroundings, memory = environment(device, precision), allocator()
    return {
        "device": surroundings["device"],
        "torch": surroundings["torch"],
        "threads": int(surroundings["threads"]),
        "allocator": memory,
        "allocator_settings": "mallopt" if memory.startswith("glibc") else None,
        "date": date.today().isoformat(),
    }


def _line(measurement: Measurement, facts: dict[str, Any]) -> dict[str, Any]:
    """Put the measurement first; what it says of itself, such as its threads, goes before the common facts."""
    values = measurement.to_json()
    return {**values, **facts, **values}


def _show(found: list[Measurement], facts: dict[str, Any], arguments: argparse.Namespace, precision: Precision) -> None:
    screen, chosen = Screen(), {measurement.case for measurement in found}
    settings = f", {facts['allocator_settings']}" if facts["allocator_settings"] else ""
    screen.print(
        f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}, {facts['allocator']}{settings}, "
        f"{facts['date']}"
    )
    if chosen & {"train", "decode"}:
        screen.print(f"model {arguments.size}, {arguments.rows} × {arguments.length} tokens a step, {precision}")
    rows = [
        (
            measurement.case,
            significant(measurement.value, 3),
            measurement.unit,
            "" if measurement.ratio is None else f"{measurement.ratio:.3f}",
            ""
            if measurement.ceiling is None
            else f"{significant(measurement.ceiling, 3)} by {measurement.ceiling_from}",
            f"{significant(min(measurement.values), 3)} to {significant(max(measurement.values), 3)}",
            len(measurement.values),
        )
        for measurement in found
    ]
    screen.print("\n" + aligned(("case", "median", "unit", "ratio", "to a ceiling of", "spread", "repeats"), rows))
    for measurement in found:
        if measurement.settings.get("cache", "dropped") != "dropped":
            screen.print(
                f"disk-read: the page cache was {measurement.settings['cache']}, so this may be memory's speed"
            )
