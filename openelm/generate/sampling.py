"""Choose the next token: pure functions on logits, applied in one documented order."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field, field_validator
from torch import Tensor

from openelm.config import Config


class SamplingConfig(Config):
    """How tokens are chosen and when to stop; `SamplingConfig.parse` turns bad values into ConfigErrors.

    The order is fixed, that of Hugging Face's generation: repetition penalty, temperature, top-k, top-p,
    min-p, draw. A filter sees what the ones before it left, renormalised.
    """

    temperature: float = Field(0.8, ge=0.0, le=100.0)
    """0 is greedy: the most likely token, and no randomness."""
    top_k: int | None = Field(None, ge=1)
    """Keep the k most likely tokens, and any that tie with the last of them."""
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    """Keep the fewest most likely tokens whose probabilities reach this sum."""
    min_p: float = Field(0.0, ge=0.0, le=1.0)
    """Keep tokens at least this fraction as likely as the most likely one."""
    repetition_penalty: float = Field(1.0, gt=0.0, le=100.0)
    """Above 1, tokens of the prompt and of the text so far become less likely; 1 is off."""
    max_tokens: int = Field(256, ge=1)
    """End after this many tokens."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """End before the first of these strings; it is never part of the text."""
    presence_penalty: float = Field(0.0, ge=-2.0, le=2.0)
    frequency_penalty: float = Field(0.0, ge=-2.0, le=2.0)
    logit_bias: dict[int, float] = Field(default_factory=dict)
    top_logprobs: int = Field(0, ge=0, le=20)
    seed: int = Field(0, ge=0, lt=2**63)
    """The same seed gives the same text."""

    @field_validator("temperature")
    @classmethod
    def _dividable(cls, temperature: float) -> float:
        if 0.0 < temperature < 0.001:
            raise ValueError("Input should be 0 (greedy) or at least 0.001")
        return temperature


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide positive and multiply negative logits of seen tokens by `penalty`: CTRL, arXiv:1909.05858.

    logits (..., V), seen (..., V) bool -> (..., V).
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Set logits (..., V) below the k-th largest to -inf; what ties with the k-th stays."""
    if k >= logits.shape[-1]:
        return logits
    smallest = logits.topk(k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < smallest, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest most likely tokens of logits (..., V) that sum to p or more: arXiv:1904.09751.

    At least one token stays; among equals the lower id comes first.
    """
    if p >= 1.0:
        return logits
    ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(dim=-1)
    reached = probabilities.cumsum(dim=-1) - probabilities >= p
    reached[..., 0] = False
    return logits.masked_fill(reached.scatter(-1, ids, reached), -torch.inf)


def keep_min_p(logits: Tensor, fraction: float) -> Tensor:
    """Keep tokens of logits (..., V) at least `fraction` as likely as the likeliest: arXiv:2407.01082."""
    probabilities = logits.softmax(dim=-1)
    return logits.masked_fill(probabilities < fraction * probabilities.amax(dim=-1, keepdim=True), -torch.inf)


def filter_logits(logits: Tensor, config: SamplingConfig, seen: Tensor | None = None) -> Tensor:
    """Apply penalty, temperature, top-k, top-p and min-p in this order: logits (..., V) -> (..., V).

    seen (..., V) bool marks the tokens of the prompt and the text so far; None switches the penalty off.
    Temperature 0 is left to the caller (`choose`): it needs no filter.
    """
    if seen is not None and config.repetition_penalty != 1.0:
        logits = penalise_repetition(logits, seen, config.repetition_penalty)
    if config.temperature == 0.0:
        return logits
    # With the largest at 0 no quotient overflows.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / config.temperature
    if config.top_k is not None:
        logits = keep_top_k(logits, config.top_k)
    if config.top_p < 1.0:
        logits = keep_top_p(logits, config.top_p)
    if config.min_p > 0.0:
        logits = keep_min_p(logits, config.min_p)
    return logits


def draw(logits: Tensor, uniform: float) -> Tensor:
    """Invert the cumulative distribution of logits (..., V) at `uniform` in (0, 1] -> token ids (...), int64.

    A token of probability 0 is never drawn: it is no candidate, whatever the rounding of the sums.
    """
    probabilities = logits.softmax(dim=-1)
    reached = torch.where(probabilities > 0, probabilities.cumsum(dim=-1), 0.0)
    threshold = uniform * reached.amax(dim=-1, keepdim=True)
    return (reached >= threshold).int().argmax(dim=-1)  # the first one that reaches it


def choose(logits: Tensor, config: SamplingConfig, generator: torch.Generator, seen: Tensor | None = None) -> Tensor:
    """Choose one token from the logits (V,) of one request -> id, int64 scalar on the logits' device.

    A draw takes one number from `generator`, a CPU generator that belongs to this request alone, and a greedy
    choice takes none: the text depends on the seed and the logits, not on the device or on the neighbours.
    """
    logits = filter_logits(logits, config, seen)
    if config.temperature == 0.0:
        return logits.argmax(dim=-1)
    uniform = 1.0 - torch.rand((), generator=generator).item()  # (0, 1]
    return draw(logits, uniform)
