"""Models of transformers as trees are scored by them: any causal one that takes masks of its caller's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from openelm.evaluate.trees import Forest


class TransformersScores:
    """A causal language model of transformers.

    Args:
        model: what `AutoModelForCausalLM` gives, in evaluation mode.
        vocab_size: ids that probabilities are over; by default all that the model predicts, as the harness has it.
    """

    def __init__(self, model: Any, vocab_size: int | None = None) -> None:
        self._model = model
        self.vocab_size = vocab_size or model.config.vocab_size
        self.context_tokens = model.config.max_position_embeddings

    def states(self, forest: Forest) -> Tensor:
        """Return the final states (R, D)."""
        device, dtype = self._model.device, self._model.dtype
        unseen = torch.zeros(forest.visible.shape, dtype=dtype, device=device)
        unseen.masked_fill_(~forest.visible.to(device), torch.finfo(dtype).min)
        found = self._model.get_decoder()(
            input_ids=forest.tokens[None].to(device),
            position_ids=forest.positions[None].to(device),
            attention_mask=unseen[None, None],
            use_cache=False,
        )
        states: Tensor = found.last_hidden_state[0]
        return states

    def logits(self, states: Tensor) -> Tensor:
        """Predict from states (N, D): (N, vocab_size)."""
        predicted: Tensor = self._model.get_output_embeddings()(states)
        return predicted[:, : self.vocab_size]
