"""Choose the next token: pure functions on logits, applied in one documented order."""

from __future__ import annotations

from typing import Annotated, Any, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from openelm.config import Config


class SamplingConfig(Config):
    """How tokens are chosen and when to stop; `SamplingConfig.parse` turns bad values into ConfigErrors.

    The order is fixed, that of Hugging Face's generation and, up to the temperature, of vLLM: constraint, logit
    bias, repetition penalty, frequency and presence penalty, temperature, top-k, top-p, min-p, draw. A filter sees
    what the ones before it left, renormalised.
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
    presence_penalty: float = Field(0.0, ge=-2.0, le=2.0)
    """Take this from the logit of every token generated so far (the prompt's do not count): OpenAI's API."""
    frequency_penalty: float = Field(0.0, ge=-2.0, le=2.0)
    """Take this from the logit of every token generated so far, as many times as it was: OpenAI's API."""
    logit_bias: dict[Annotated[int, Field(ge=0)], Annotated[float, Field(strict=True, ge=-100.0, le=100.0)]] = Field(
        default={}, max_length=1024
    )
    """Add to the logits of these ids; -100 all but forbids one, 100 all but forces it."""
    top_logprobs: int = Field(0, ge=0, le=20)
    """Report this many of the likeliest tokens at each step, by the model's own probability."""
    json_schema: dict[str, Any] | None = None
    """The text is JSON, as `json.dumps` writes it, that this JSON Schema accepts; {} accepts any."""
    regex: str | None = None
    """The whole text matches this regular expression: Rust's syntax, no word boundaries, ASCII for \\d and \\w."""
    grammar: str | None = None
    """The whole text follows this grammar from its rule `start`: EBNF as Lark writes it, in llguidance's variety."""
    max_tokens: int = Field(256, ge=1)
    """End after this many tokens."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """End before the first of these strings; it is never part of the text."""
    seed: int = Field(0, ge=0, lt=2**63)
    """The same seed gives the same text."""

    @property
    def filters(self) -> bool:
        """Tell whether anything but bias and temperature stands between the logits and the draw, constraints aside."""
        drops = self.top_k is not None or self.top_p < 1.0 or self.min_p > 0.0
        return drops or self.repetition_penalty != 1.0 or bool(self.presence_penalty or self.frequency_penalty)

    @property
    def constrains(self) -> bool:
        """Tell whether the text must follow a schema, a regular expression or a grammar."""
        return (self.json_schema, self.regex, self.grammar) != (None, None, None)

    @field_validator("temperature")
    @classmethod
    def _dividable(cls, temperature: float) -> float:
        if 0.0 < temperature < 0.001:
            raise ValueError("Input should be 0 (greedy) or at least 0.001")
        return temperature

    @model_validator(mode="after")
    def _one_constraint(self) -> Self:
        given = [name for name in ("json_schema", "regex", "grammar") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"at most one of json_schema, regex and grammar is allowed, not {' and '.join(given)}")
        return self


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide positive and multiply negative logits of seen tokens by `penalty`: CTRL, arXiv:1909.05858.

    logits (..., V), seen (..., V) bool -> (..., V).
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def penalise_counts(logits: Tensor, counts: Tensor, *, presence: float, frequency: float) -> Tensor:
    """Subtract `frequency` for each time, and `presence` once, that a token was generated: OpenAI's API reference.

    logits (..., V), counts (..., V) -> (..., V).
    """
    return logits - frequency * counts - presence * (counts > 0)


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


def filter_logits(
    logits: Tensor,
    config: SamplingConfig,
    seen: Tensor | None = None,
    *,
    counts: Tensor | None = None,
    bias: Tensor | None = None,
    allowed: Tensor | None = None,
) -> Tensor:
    """Apply all that `SamplingConfig` names, in its order: logits (..., V) -> (..., V).

    Temperature 0 is left to the caller (`choose`): what comes after it changes nothing then.

    Args:
        seen: (..., V) bool, the tokens of the prompt and the text so far; None switches the repetition penalty off.
        counts: (..., V), how often each token was generated; None switches its two penalties off.
        bias: (..., V), added to the logits.
        allowed: (..., V) bool, the tokens that a constraint lets through; at least one.
    """
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -torch.inf)
    if bias is not None:
        logits = logits + bias
    if seen is not None and config.repetition_penalty != 1.0:
        logits = penalise_repetition(logits, seen, config.repetition_penalty)
    if counts is not None:
        logits = penalise_counts(logits, counts, presence=config.presence_penalty, frequency=config.frequency_penalty)
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


def choose(
    logits: Tensor,
    config: SamplingConfig,
    generator: torch.Generator,
    seen: Tensor | None = None,
    *,
    counts: Tensor | None = None,
    bias: Tensor | None = None,
    allowed: Tensor | None = None,
) -> Tensor:
    """Choose one token from the logits (V,) of one request -> id, int64 scalar on the logits' device.

    A draw takes one number from `generator`, a CPU generator that belongs to this request alone, and a greedy
    choice takes none: the text depends on the seed and the logits, not on the device or on the neighbours. The
    other arguments are those of `filter_logits`.
    """
    logits = filter_logits(logits, config, seen, counts=counts, bias=bias, allowed=allowed)
    if config.temperature == 0.0:
        return logits.argmax(dim=-1)
    return draw(logits, next_uniform(generator))


def next_uniform(generator: torch.Generator) -> float:
    """Take one number in (0, 1] from a CPU generator: nothing waits for a device."""
    return 1.0 - torch.rand((), generator=generator).item()
