"""What the device can do at most: products of matrices, and bytes from and to memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch import Tensor

from openelm.bench.measurement import Measurement, Progress, repeats_within, timed
from openelm.kernels.linear import linear
from openelm.kernels.precision import cpu_multiplies_bf16

Shape = tuple[int, int, int]
CPU_SHAPES: tuple[Shape, ...] = ((1024, 1024, 1024), (4096, 512, 2048), (2048, 2048, 2048))
GPU_SHAPES: tuple[Shape, ...] = ((4096, 4096, 4096), (8192, 8192, 8192), (16_384, 4096, 8192))
"""Rows, inputs and outputs of the products."""
BUFFER_BYTES = 1 << 29
"""Of each of the two buffers; the last cache of a CPU holds a small part of one."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def multiplied_precisions(device: torch.device) -> tuple[str, ...]:
    """Name the precisions that the device has units for."""
    return ("fp32", "bf16") if device.type != "cpu" or cpu_multiplies_bf16() else ("fp32",)


@torch.no_grad()
def measure_matmul(precision: str, device: torch.device, repeats: int, progress: Progress) -> list[Measurement]:
    """Multiply by torch into a buffer and by the model's own kernel, in turns; of several shapes the best one each.

    Returns:
        GFLOP/s through torch, a ceiling, and through our kernel, held against it.
    """
    shapes = CPU_SHAPES if device.type == "cpu" else GPU_SHAPES
    rates: dict[str, dict[Shape, list[float]]] = {"torch": {}, "linear": {}}
    for number, (rows, inputs, outputs) in enumerate(shapes):
        draw = partial(torch.rand, dtype=DTYPES[precision], device=device)
        x, weight, out = draw(rows, inputs), draw(outputs, inputs), draw(rows, outputs)
        ways: dict[str, Callable[[], Tensor]] = {
            "torch": partial(torch.mm, x, weight.t(), out=out),
            "linear": partial(linear, x, weight),
        }
        within = {way: repeats_within(multiply, device) for way, multiply in ways.items()}
        for turn in range(repeats):
            for way, multiply in ways.items():
                seconds = timed(partial(_many, multiply, within[way]), device) / within[way]
                rates[way].setdefault(shapes[number], []).append(2 * rows * inputs * outputs / seconds / 1e9)
            progress(f"matmul {precision}", number * repeats + turn + 1, len(shapes) * repeats)
    best = {way: max(found, key=lambda shape: median(found[shape])) for way, found in rates.items()}
    ceiling = Measurement(
        f"matmul-{precision}-torch",
        tuple(rates["torch"][best["torch"]]),
        "GFLOP/s",
        precision,
        settings={"shape": best["torch"]},
    )
    ours = Measurement(
        f"matmul-{precision}-linear",
        tuple(rates["linear"][best["linear"]]),
        "GFLOP/s",
        precision,
        ceiling.value,
        ceiling.case,
        {"shape": best["linear"]},
    )
    return [ceiling, ours]


@torch.no_grad()
def measure_memory(device: torch.device, repeats: int, progress: Progress) -> list[Measurement]:
    """Read a large buffer, and copy one into another; a copied byte counts twice, as it is read and written."""
    numbers = BUFFER_BYTES // 4 // 4096 * 4096
    source, target = torch.ones(numbers, device=device), torch.zeros(numbers, device=device)
    matrix, vector = source.view(-1, 4096), torch.ones(4096, device=device)
    ways: dict[str, tuple[int, Callable[[], Tensor]]] = {
        "product": (1, partial(torch.mv, matrix, vector)),
        "sum": (1, partial(torch.sum, source)),
        "copy": (2, partial(target.copy_, source)),
    }
    rates: dict[str, list[float]] = {way: [] for way in ways}
    within = {way: repeats_within(work, device) for way, (_, work) in ways.items()}
    for turn in range(repeats):
        for way, (passes, work) in ways.items():
            seconds = timed(partial(_many, work, within[way]), device) / within[way]
            rates[way].append(passes * source.nbytes / seconds / 1e9)
        progress("memory", turn + 1, repeats)
    read = max(("product", "sum"), key=lambda way: median(rates[way]))
    return [
        Measurement("memory-read", tuple(rates[read]), "GB/s", settings={"buffer_bytes": source.nbytes, "by": read}),
        Measurement("memory-copy", tuple(rates["copy"]), "GB/s", settings={"buffer_bytes": source.nbytes}),
    ]


def _many(work: Callable[[], object], times: int) -> None:
    for _ in range(times):
        work()
