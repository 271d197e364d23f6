"""Objectives: what a batch asks of the model. The loop divides their sums by the batch's targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from openelm.kernels.attention_gpu import Documents
from openelm.kernels.cross_entropy import linear_cross_entropy
from openelm.model.transformer import OpenELM


class Objective(Protocol):
    """Turns rows of a batch into a sum to minimise."""

    def __call__(
        self, model: OpenELM, inputs: Tensor, targets: Tensor, documents: Tensor | Documents | None
    ) -> tuple[Tensor, Tensor]:
        """Return (differentiable sum to minimise, detached sum of nats) over the targets that are not -100.

        Args:
            inputs, targets: ids (B, T).
            documents: (B, T) document of each position, what `visible_documents` makes of it, or None where rows hold
                one document each.
        """


@dataclass(frozen=True)
class NextToken:
    """Cross-entropy of the next token plus `z_loss` · logsumexp² (arXiv 2204.02311, section 5)."""

    z_loss: float = 1e-4

    def __call__(
        self, model: OpenELM, inputs: Tensor, targets: Tensor, documents: Tensor | Documents | None
    ) -> tuple[Tensor, Tensor]:
        hidden = model.hidden(inputs, documents=documents)
        return linear_cross_entropy(hidden.flatten(0, 1), model.head_weight, targets.flatten(), z_loss=self.z_loss)
