"""`openelm plan`: what a recipe needs on given devices, before anything is bought or started."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from openelm.cli.screen import Screen
from openelm.cli.train import find_recipe, read_recipe
from openelm.config import apply_overrides
from openelm.errors import ConfigError, printable
from openelm.evaluate.tables import aligned
from openelm.model.budget import (
    Held,
    Memory,
    Time,
    Work,
    layouts,
    measured_mfu,
    measured_parameters,
    nearest_measurement,
    predicted_again,
    run_time,
)
from openelm.model.measured import DEVICES, Device
from openelm.model.plan import LayerPlan
from openelm.release.units import duration, significant, size
from openelm.text.tokenizer import load_tokenizer
from openelm.train.run import RunConfig


@dataclass(frozen=True)
class Budget:
    """A recipe on some devices."""

    plan: LayerPlan
    vocab_size: int
    tokens: int
    devices: int
    device: Device
    work: Work
    mfu: float
    time: Time
    memory: dict[str, Memory]
    assumptions: tuple[str, ...]


def plan(arguments: argparse.Namespace) -> int:
    """Print memory, time and cost of a recipe, or compare the arithmetic with what was measured."""
    if arguments.check:
        return _check(arguments)
    if arguments.recipe is None:
        raise ConfigError("no recipe was given", fix="openelm plan RECIPE, or openelm plan --check")
    recipe = find_recipe(arguments.recipe)
    config = RunConfig.parse(apply_overrides(read_recipe(recipe), arguments.overrides), file=recipe)
    if arguments.devices < 1 or (arguments.mfu is not None and not 0 < arguments.mfu <= 1):
        given = f"--devices {arguments.devices}, --mfu {arguments.mfu}"
        raise ConfigError(f"--devices is at least 1, and --mfu above 0 and at most 1 (given: {given})")
    budget = _budget(config, arguments)
    price = arguments.price_per_hour
    if arguments.json:
        print(json.dumps(_to_json(budget, price)))
        return 0
    _show(budget, arguments.recipe, price)
    return 0


def _budget(config: RunConfig, arguments: argparse.Namespace) -> Budget:
    train, devices = config.train, arguments.devices
    if train.rows % devices:
        fix = f"make train.rows a multiple of {devices}, such as train.rows={-(-train.rows // devices) * devices}"
        raise ConfigError(f"{devices} devices cannot share {train.rows} rows a batch", fix=fix)
    vocab_size = arguments.vocab_size or _vocab_size(config)
    model = config.model.config(vocab_size)
    device, precision, notes = _device(arguments.device, train.precision)
    work = train.work(model.plan, devices, precision, arguments.device)
    mfu, source = _mfu(model.parameters, device, arguments.mfu)
    assert device.flops_per_second is not None
    tokens = train.steps * train.rows * train.length
    held = Held(config.optimizer.kind, config.optimizer.weights)
    time = run_time(
        model.plan, vocab_size, tokens=tokens, length=train.length, devices=devices,
        flops_per_second=device.flops_per_second, mfu=mfu, recompute=work.recompute,
    )  # fmt: skip
    assumptions = (
        *notes,
        f"MFU {mfu:.3f}: {source}",
        "devices lose nothing to waiting for each other: no run on many has been measured; lower --mfu to allow for it",
        f"{vocab_size:,} ids; {work.rows} rows of {train.length:,} tokens go through a device at once",
        f"weights, gradients and two moments are fp32, 4 bytes each, but matrices of layers have {held.weight_bytes} "
        f"of weights, {held.moment_bytes} of moments (optimizer.kind {held.kind}, optimizer.weights {held.weights}); "
        f"activations and copies {precision}, {work.narrow} bytes, but the residual stream 4",
        "sharded: weights, gradients and moments spread over all devices, one layer and the embedding gathered at a "
        "time; arithmetic, for train.shard_processes = all of them; no such run was measured",
        "not counted: what the driver and the allocator keep (some GB on a GPU), evaluation, checkpoints, loading",
    )
    if train.activation_gb is not None:
        counts = (f"{work.recompute.count(kind)} {kind}" for kind in ("selective", "full"))
        assumptions += (
            f"recompute by layer: {' and '.join(counts)} of {model.plan.layers} layers, the least work for which "
            f"they keep at most train.activation_gb {train.activation_gb:g}; the time counts it",
        )
    if train.document_mask:
        assumptions += ("every row holds several documents: each layer keeps a mask (measured on CPUs only)",)
    shown = layouts(model.plan, vocab_size, work, devices, held)
    return Budget(model.plan, vocab_size, tokens, devices, device, work, mfu, time, shown, assumptions)


def _vocab_size(config: RunConfig) -> int:
    if config.tokenizer.path is None:
        return config.tokenizer.vocab_size
    if not Path(config.tokenizer.path).exists():
        what = f"the recipe's tokenizer {config.tokenizer.path} is not here, so its number of ids is unknown"
        raise ConfigError(what, fix="give --vocab-size, such as --vocab-size 32000")
    return load_tokenizer(Path(config.tokenizer.path)).vocab_size


def _device(name: str, precision: str) -> tuple[Device, str, tuple[str, ...]]:
    """Complete a device's numbers; returns it with the precision that training would take, and what was assumed."""
    device = DEVICES[name]
    if name != "cpu":
        if precision == "fp32":
            raise ConfigError("rates of GPUs are known for bf16 only", fix="plan with train.precision=bf16")
        assert device.flops_per_second is not None and device.memory_bytes is not None
        peak = f"{device.flops_per_second / 1e12:,.1f} TFLOP/s bf16"
        return device, "bf16", (f"{name}: {peak}, {size(device.memory_bytes)} ({device.source})",)
    import torch

    from openelm.kernels.precision import cpu_multiplies_bf16
    from openelm.model.device import matmul_flops_per_second

    if precision == "auto":
        precision = "bf16" if cpu_multiplies_bf16() else "fp32"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    rate = matmul_flops_per_second(torch.device("cpu"), dtype)
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    note = f"cpu: {rate / 1e9:,.0f} GFLOP/s {precision}, {size(memory_bytes)} ({device.source})"
    return Device(name, rate, memory_bytes, device.source), precision, (note,)


def _mfu(parameters: int, device: Device, given: float | None) -> tuple[float, str]:
    if given is not None:
        return given, "given with --mfu"
    nearest = nearest_measurement(parameters, device)
    assert nearest is not None  # an H100 or a CPU measurement always exists
    where = "" if nearest.device == device.name else f" on {nearest.device}, as {device.name} has not been measured"
    what = f"measured with {nearest.size}, the nearest size{where} ({nearest.date}, {nearest.file})"
    ratio = measured_parameters(nearest) / parameters
    if max(ratio, 1 / ratio) > 4:
        what += f"; it is {significant(ratio, 2)} × as large, so this is a guess: small models reach less"
    return measured_mfu(nearest), what


def _to_json(budget: Budget, price: float | None) -> dict[str, Any]:
    time = budget.time
    return {
        "parameters": budget.plan.parameters(budget.vocab_size),
        "vocab_size": budget.vocab_size,
        "tokens": budget.tokens,
        "devices": budget.devices,
        "device": asdict(budget.device),
        "work": asdict(budget.work),
        "mfu": budget.mfu,
        **asdict(time),
        "days": time.seconds / 86_400,
        "price_per_hour": price,
        "cost": None if price is None else price * time.device_hours,
        "memory_bytes": {name: {**asdict(memory), "total": memory.total} for name, memory in budget.memory.items()},
        "assumptions": list(budget.assumptions),
    }


def _show(budget: Budget, recipe: str, price: float | None) -> None:
    console, time = Screen(), budget.time
    total_flops = time.flops_per_token * budget.tokens
    console.print(f"{printable(recipe)} on {budget.devices} × {budget.device.name}")
    console.print(f"  model   {budget.plan.parameters(budget.vocab_size):,} parameters")
    console.print(
        f"  work    {budget.tokens:,} tokens × {time.flops_per_token / 1e9:.3f} GFLOP = {total_flops:.3g} FLOP"
    )
    console.print(f"  speed   {significant(time.tokens_per_second)} tokens/s")
    console.print(f"  time    {duration(time.seconds)} ({significant(time.seconds / 86_400, 3)} days)")
    console.print(f"  devices {significant(time.device_hours)} hours")
    if price is not None:
        console.print(f"  cost    {significant(price * time.device_hours)} at {price:g} an hour and device")
    else:
        console.print("  cost    give --price-per-hour")
    console.print("\nGB on each device, at the end of the forward pass")
    names = list(asdict(next(iter(budget.memory.values()))))
    limit = budget.device.memory_bytes or 0
    rows = [
        (
            name,
            *(f"{part / 1e9:.2f}" for part in asdict(memory).values()),
            f"{memory.total / 1e9:.2f}",
            "yes" if memory.total <= limit else "no",
        )
        for name, memory in budget.memory.items()
    ]
    console.print(aligned(("layout", *names, "total", f"fits {limit / 1e9:.0f}"), rows))
    console.print("assumed")
    for line in budget.assumptions:
        console.print(f"  - {line}")


def _check(arguments: argparse.Namespace) -> int:
    """Print every measured run beside what the arithmetic says of it."""
    checks = predicted_again()
    if arguments.json:
        print(json.dumps([asdict(check) | {"error": check.error} for check in checks]))
        return 0
    rows = [
        (
            check.run,
            check.what,
            significant(check.measured),
            "-" if check.predicted is None else significant(check.predicted),
            "-" if check.error is None else f"{100 * check.error:+.1f} %",
            check.how,
        )
        for check in checks
    ]
    Screen().print(aligned(("run", "what", "measured", "predicted", "error", "predicted from"), rows))
    return 0
