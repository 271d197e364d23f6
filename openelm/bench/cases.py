"""The cases of `openelm bench`, in order; those that are held against a ceiling measure it first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from openelm.bench.ceilings import measure_matmul, measure_memory, multiplied_precisions
from openelm.bench.disk import measure_disk
from openelm.bench.loader import measure_loader
from openelm.bench.measurement import Measurement, Progress
from openelm.bench.model import measure_decode, measure_train
from openelm.bench.step import Precision
from openelm.model.config import ModelConfig

CASES = ("matmul", "memory", "disk", "train", "decode", "loader")


@dataclass(frozen=True)
class Bench:
    """What to measure, and how."""

    config: ModelConfig
    rows: int
    length: int
    precision: Precision
    device: torch.device
    repeats: int
    folder: Path
    disk_bytes: int
    progress: Progress

    def measure(self, cases: Sequence[str]) -> Iterator[Measurement]:
        """Yield the measurements of the cases, each as soon as it is known.

        Raises:
            ConfigError: the folder is none, or the model does not take the length.
            DiskError: the folder's disk is full or cannot be written.
            NumericError: a loss is not finite.
        """
        for case in CASES:
            if case in cases:
                yield from getattr(self, f"_{case}")

    @cached_property
    def _matmul(self) -> list[Measurement]:
        precisions = multiplied_precisions(self.device)
        return [
            found
            for precision in precisions
            for found in measure_matmul(precision, self.device, self.repeats, self.progress)
        ]

    @cached_property
    def _memory(self) -> list[Measurement]:
        return measure_memory(self.device, self.repeats, self.progress)

    @cached_property
    def _disk(self) -> list[Measurement]:
        return measure_disk(self.folder, self.disk_bytes, self.repeats, self.progress)

    @cached_property
    def _train(self) -> list[Measurement]:
        rates = {found.case: found for found in self._matmul}
        # bf16 without units for it is multiplied in fp32, so that is its ceiling.
        flops = rates.get(f"matmul-{self.precision}-torch", rates["matmul-fp32-torch"])
        return [
            measure_train(
                self.config,
                self.rows,
                self.length,
                precision=self.precision,
                device=self.device,
                flops=flops,
                repeats=self.repeats,
                progress=self.progress,
            )
        ]

    @cached_property
    def _decode(self) -> list[Measurement]:
        return [
            measure_decode(
                self.config,
                precision=self.precision,
                device=self.device,
                bandwidth=self._memory[0],
                repeats=self.repeats,
                progress=self.progress,
            )
        ]

    @cached_property
    def _loader(self) -> list[Measurement]:
        return [measure_loader(self.repeats, self.progress)]
