"""Public numbers of devices, and the training speeds that this project measured: what `openelm plan` starts from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """What a device can do at most.

    Attributes:
        flops_per_second: peak of dense bf16 products with fp32 sums; None: to be measured on this machine.
        memory_bytes: its own memory; None: this machine's.
    """

    name: str
    flops_per_second: float | None
    memory_bytes: int | None
    source: str


DEVICES = {
    "h100": Device("h100", 989.4e12, 80 * 10**9, "NVIDIA H100 data sheet, SXM5, dense (half of the sparse number)"),
    "h200": Device("h200", 989.4e12, 141 * 10**9, "NVIDIA H200 data sheet, SXM5, dense (half of the sparse number)"),
    "a100": Device("a100", 312e12, 80 * 10**9, "NVIDIA A100 data sheet, 80 GB SXM4, dense"),
    "rtx-4090": Device(
        "rtx-4090", 165.2e12, 24 * 2**30, "NVIDIA Ada GPU architecture paper, bf16 with fp32 sums, dense"
    ),
    "cpu": Device("cpu", None, None, "matrix products timed on this machine now"),
}


@dataclass(frozen=True)
class Measurement:
    """One timed training run or benchmark.

    Attributes:
        size: a named size; vocabulary 32,128.
        side: "ours", or "baseline": the plain eager implementation of benchmarks/baseline.py.
        flops_per_second: the yardstick of its MFU, the peak or the measured rate of matrix products.
        peak_bytes: most memory held; None: measured in another way than the accounting counts.
    """

    date: str
    device: str
    size: str
    rows: int
    length: int
    precision: str
    side: str
    tokens_per_second: float
    flops_per_second: float
    peak_bytes: int | None
    file: str


_H100 = "benchmarks/results/2026-11-22-h100.json"
_ZEN3 = "benchmarks/results/2026-11-23-zen3-train-step.json"
MEASURED = (
    Measurement("2026-11-22", "h100", "270m", 8, 2048, "bf16", "ours", 128_597, 989e12, 18_614_449_152, _H100),
    Measurement("2026-11-22", "h100", "1.1b", 4, 2048, "bf16", "ours", 40_147, 989e12, 35_096_390_144, _H100),
    Measurement("2026-11-22", "h100", "3b", 2, 2048, "bf16", "ours", 15_482, 989e12, 62_017_787_392, _H100),
    Measurement("2026-11-22", "h100", "270m", 8, 2048, "bf16", "compiled", 185_125, 989e12, None, _H100),
    Measurement("2026-11-22", "h100", "270m", 8, 2048, "bf16", "baseline", 87_533, 989e12, None, _H100),
    Measurement("2026-11-22", "h100", "1.1b", 4, 2048, "bf16", "baseline", 28_583, 989e12, None, _H100),
    Measurement("2026-11-22", "h100", "3b", 2, 2048, "bf16", "baseline", 10_656, 989e12, None, _H100),
    Measurement("2026-11-23", "cpu", "tiny", 8, 512, "fp32", "ours", 438.4, 127.3e9, None, _ZEN3),
    Measurement("2026-11-23", "cpu", "tiny", 8, 512, "fp32", "baseline", 242.6, 127.3e9, None, _ZEN3),
)
"""Rows of training speed in the results of this project; tests compare them with the files."""
