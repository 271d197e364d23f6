"""The CUDA loss: its Triton kernel, interpreted on a CPU, against float64; skipped without Triton."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from openelm.kernels import cross_entropy_gpu

pytest.importorskip("triton", reason="the kernel is Triton's, which is not installed")


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    logits = hidden @ weight.T
    kept = targets != -100
    log_sums = logits.logsumexp(1)[kept]
    nll = log_sums - logits[kept].gather(1, targets[kept, None])[:, 0]
    return nll.sum() + z_loss * log_sums.square().sum(), nll.sum()


def check(dtype: torch.dtype, tolerance: float, *, rows: int, columns: int, z_loss: float) -> None:
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, 32, generator=generator).to(dtype)
    weight = torch.randn(columns, 32, generator=generator).to(dtype)
    targets = torch.randint(0, columns, (rows,), generator=generator)
    targets[1::3] = -100
    wide = [x.double().requires_grad_() for x in (hidden, weight)]
    loss, nll = plain(*wide, targets, z_loss)
    expected = [loss, nll, *torch.autograd.grad(loss, wide)]
    found = cross_entropy_gpu.loss_and_gradients(hidden, weight, targets, z_loss, dtype, (True, True))
    for ours, truth in zip(found, expected, strict=True):
        assert ours is not None
        assert float((ours.double() - truth).abs().max() / truth.abs().max()) < tolerance
    alone = cross_entropy_gpu.loss_and_gradients(hidden, weight, targets, z_loss, dtype, (False, False))
    assert torch.equal(alone[0], found[0]) and torch.equal(alone[1], found[1])


def interpreted() -> None:
    """What the test runs in a process whose Triton interprets, for that is chosen when Triton is imported."""
    check(torch.float32, 2e-5, rows=7, columns=5000, z_loss=1e-2)
    check(torch.float32, 2e-5, rows=3, columns=4096, z_loss=0.0)
    check(torch.float32, 2e-5, rows=2, columns=10, z_loss=1e-4)
    check(torch.bfloat16, 2e-2, rows=9, columns=9000, z_loss=1e-2)
    cross_entropy_gpu.CHUNK_BYTES = 2 * 5000 * 4
    check(torch.float32, 2e-5, rows=7, columns=5000, z_loss=1e-2)


def test_values_and_gradients_are_those_of_float64_also_in_chunks() -> None:
    code = f"import runpy; runpy.run_path({__file__!r})['interpreted']()"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
