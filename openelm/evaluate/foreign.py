"""Models of transformers as trees are scored by them: any causal one that takes masks and positions of its caller's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from openelm.errors import ConfigError
from openelm.evaluate.trees import Forest, Tree

_PROBE = tuple(range(1, 9))
_TOLERANCE = 1e-2
"""Of the largest logit; in bf16 another order of sums makes as much."""


class TransformersScores:
    """A causal language model of transformers.

    Args:
        model: what `AutoModelForCausalLM` gives, in evaluation mode.

    Raises:
        ConfigError: the model does not compute with masks or positions of its caller's what it computes by itself.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.vocab_size: int = model.get_output_embeddings().weight.shape[0]
        config = model.config.get_text_config()
        self.context_tokens: int = getattr(config, "max_position_embeddings", None) or 2048
        windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size", "window_size"))
        if getattr(config, "attention_types", None):  # of GPT-Neo, whose windows are in rows of tokens, not positions
            raise self._refusal()
        self._window = min((window for window in windows if isinstance(window, int)), default=self.context_tokens)
        self._scales = False
        self._check()

    def states(self, forest: Forest) -> Tensor:
        """Return the final states (R, D); of a model that does more to them than a product, its predictions (R, V)."""
        length = int(forest.positions.max()) + 1
        if length > self._window:
            raise ConfigError(
                f"a text of {length} tokens is longer than the {self._window} that some layers of the model see",
                fix="evaluate it with lm-evaluation-harness itself",
            )
        device, dtype = self._model.device, self._model.dtype
        unseen = torch.zeros(forest.visible.shape, dtype=dtype, device=device)
        unseen.masked_fill_(~forest.visible.to(device), torch.finfo(dtype).min)
        found = (self._model if self._scales else self._model.get_decoder())(
            input_ids=forest.tokens[None].to(device),
            position_ids=forest.positions[None].to(device),
            attention_mask=unseen[None, None],
            use_cache=False,
        )
        states: Tensor = (found.logits if self._scales else found.last_hidden_state)[0]
        return states

    def logits(self, states: Tensor) -> Tensor:
        """Predict from states (N, D): (N, vocab_size)."""
        predicted: Tensor = states if self._scales else self._model.get_output_embeddings()(states)
        return predicted

    @torch.inference_mode()
    def _check(self) -> None:
        """Compare a text by itself with the same as the last answer of a row, and see what the head does to states."""
        ids = torch.tensor([_PROBE], device=self._model.device) % self.vocab_size
        wanted = self._model(input_ids=ids, use_cache=False).logits[0]
        text = tuple(ids[0].tolist())
        others = ((*text[::-1], 0), (*text, 0))
        row = Forest([Tree(text[::-1], others), Tree(text[:3], (*others, (*text[3:], 0)))])
        for self._scales in (False, True):  # scaled or capped logits are the whole model's alone
            try:
                found = self.logits(self.states(row))
            except (AttributeError, IndexError, TypeError, ValueError, RuntimeError):
                continue  # its code takes no such thing
            found = torch.cat((found[row.trees[1][0]], found[row.trees[1][1][-1].own]))
            if (found - wanted).abs().max() <= _TOLERANCE * wanted.abs().max():
                return
        raise self._refusal()

    def _refusal(self) -> ConfigError:
        return ConfigError(
            f"{type(self._model).__name__} does not take masks and positions of its caller's",
            fix="evaluate it with lm-evaluation-harness itself",
        )
