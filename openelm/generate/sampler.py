"""The choices of one request: what it has generated so far, and the state of its constraint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from openelm.errors import ConfigError
from openelm.generate.grammar import Constraint
from openelm.generate.sampling import SamplingConfig, choose, next_uniform
from openelm.kernels.choice import choose_one, chooses
from openelm.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Choice:
    """One chosen token, still on the device of its logits.

    Attributes:
        id: int64 scalar.
        logprob: fp32 scalar, natural log of the model's own probability, before anything was applied.
        top_ids: (top_logprobs,) int64, the model's likeliest tokens, most likely first.
        top_logprobs: (top_logprobs,) fp32, theirs.
    """

    id: Tensor
    logprob: Tensor
    top_ids: Tensor
    top_logprobs: Tensor


@dataclass(frozen=True)
class Chosen:
    """A `Choice` on the host."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Sampler:
    """Chooses the tokens of one request, each from the logits and from what it accepted before.

    Args:
        prompt_ids: ids of the tokenizer, which the caller has checked.
        device: of the logits.

    Raises:
        ConfigError: a biased id is not in the vocabulary, or the constraint cannot be used.
    """

    def __init__(
        self,
        config: SamplingConfig,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        device: torch.device | str,
    ) -> None:
        size = tokenizer.vocab_size
        self._config = config
        self._generator = torch.Generator().manual_seed(config.seed)
        self._constraint = Constraint.of(config, tokenizer, prompt_ids)
        self._bias = _bias(config.logit_bias, size).to(device) if config.logit_bias else None
        self._is_plain = not (config.filters or config.top_logprobs or config.constrains)
        self._seen: Tensor | None = None
        if config.repetition_penalty != 1.0:
            self._seen = torch.zeros(size, dtype=torch.bool, device=device)
            self._seen[torch.tensor(prompt_ids, device=device)] = True
        self._counts: Tensor | None = None
        if config.presence_penalty or config.frequency_penalty:
            self._counts = torch.zeros(size, device=device)

    def choose(self, logits: Tensor) -> Choice | Chosen:
        """Choose one token from the model's logits (V,), fp32; the device is not waited for.

        Raises:
            ConfigError: the constraint leaves no token, or following it takes too much work.
        """
        if self._is_plain and chooses(logits):
            temperature = self._config.temperature
            uniform = next_uniform(self._generator) if temperature else 0.0
            return Chosen(*choose_one(logits, self._bias, temperature, uniform), ())
        allowed = None
        if self._constraint is not None:
            allowed = _moved(self._constraint.allowed(), logits.device)
        chosen = choose(
            logits,
            self._config,
            self._generator,
            self._seen,
            counts=self._counts,
            bias=self._bias,
            allowed=allowed,
        )
        logprobs = logits.log_softmax(dim=-1)
        top = logprobs.topk(min(self._config.top_logprobs, len(logprobs)))
        # The id stays on the device, so no plain index: that would read it.
        return Choice(chosen, logprobs.gather(0, chosen[None])[0], top.indices, top.values)

    def accept(self, token_id: int) -> None:
        """Take note of the token that was chosen, once its id is known.

        Raises:
            ConfigError: following the constraint takes too much work.
        """
        if self._seen is not None:
            self._seen[token_id] = True
        if self._counts is not None:
            self._counts[token_id] += 1
        if self._constraint is not None:
            self._constraint.accept(token_id)


def _bias(biases: dict[int, float], vocab_size: int) -> Tensor:
    outside = [token_id for token_id in biases if token_id >= vocab_size]
    if outside:
        raise ConfigError(
            f"logit_bias: id {outside[0]} is outside the vocabulary 0..{vocab_size - 1}",
            fix="use ids of the model's tokenizer",
        )
    bias = torch.zeros(vocab_size)
    bias[list(biases)] = torch.tensor(list(biases.values()))
    return bias


def _moved(mask: Tensor, device: torch.device) -> Tensor:
    """Bring a mask to a device; from pinned memory, without which CUDA would wait for all that it has to do."""
    if device.type == "cuda":
        mask = mask.pin_memory()
    return mask.to(device, non_blocking=True)
