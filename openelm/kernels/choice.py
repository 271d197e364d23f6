"""The choice of the next token on CPUs: in a few passes over the logits instead of a dozen."""

from __future__ import annotations

import torch
from torch import Tensor

from openelm.kernels.native import call, runs_native


def chooses(logits: Tensor) -> bool:
    """Tell whether `choose_one` takes logits (V,)."""
    return logits.dtype == torch.float32 and logits.is_contiguous() and runs_native(logits)


def choose_one(logits: Tensor, bias: Tensor | None, temperature: float, uniform: float) -> tuple[int, float]:
    """Choose a token from logits (V,) as `generate.sampling.choose` does without filters and penalties.

    Args:
        bias: (V,) fp32, added to the logits.
        temperature: 0 takes the likeliest token, the first of equals.
        uniform: in (0, 1], where the cumulative distribution is inverted; not used at temperature 0.

    Returns:
        The id, and the natural logarithm of its probability by the logits alone; NaN if any of them is not a number.
    """
    found = torch.empty(2)
    call("choose", logits, bias, len(logits), float(temperature), float(uniform), found)
    token_id, logprob = found.tolist()
    return int(token_id), logprob
