"""Objectives: what a batch asks of the model. The loop divides their sums by the weight of the batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from openelm.data.stream import Batch
from openelm.kernels.attention_gpu import Documents
from openelm.kernels.cross_entropy import linear_cross_entropy, linear_log_likelihoods
from openelm.model.transformer import OpenELM

PreferenceLoss: TypeAlias = Literal["sigmoid", "hinge", "ipo"]


@dataclass(frozen=True)
class Rows:
    """Some rows of a batch, on the model's device.

    Attributes:
        inputs, targets: ids (B, T); targets are -100 where there is nothing to learn.
        visible: what `visible_documents` makes of the documents, or None where rows hold one each or hide none.
        documents: (B, T) document of each position.
        examples: (B, P) index of each row's examples, -1 where there is none, or None for text.
    """

    inputs: Tensor
    targets: Tensor
    visible: Tensor | Documents | None
    documents: Tensor
    examples: Tensor | None = None


class Objective(Protocol):
    """Turns rows of a batch into a sum to minimise."""

    @property
    def statistics(self) -> tuple[str, ...]:
        """Name the sums that the ledger records beside the loss."""

    def weight(self, batch: Batch) -> int:
        """Count what the sums over a batch are divided by: its targets, or its pairs."""

    def __call__(self, model: OpenELM, rows: Rows) -> tuple[Tensor, Tensor]:
        """Return (differentiable sum to minimise, detached sums (1 + statistics,), the first of them in nats)."""


@dataclass(frozen=True)
class NextToken:
    """Cross-entropy of the next token plus `z_loss` · logsumexp² (arXiv 2204.02311, section 5)."""

    z_loss: float = 1e-4
    statistics: ClassVar[tuple[str, ...]] = ()

    def weight(self, batch: Batch) -> int:
        return int((batch.targets != -100).sum())

    def __call__(self, model: OpenELM, rows: Rows) -> tuple[Tensor, Tensor]:
        hidden = model.hidden(rows.inputs, documents=rows.visible)
        loss_sum, nll_sum = linear_cross_entropy(
            hidden.flatten(0, 1), model.head_parts, rows.targets.flatten(), z_loss=self.z_loss
        )
        return loss_sum, nll_sum[None]


@dataclass(frozen=True, eq=False)
class Preference:
    """Prefer the chosen answer of each pair to the rejected one, more than the reference model does.

    With h = log π(chosen) - log π(rejected) - (log π_ref(chosen) - log π_ref(rejected)), the logs summed over an
    answer's tokens: -log σ(β h) is DPO (arXiv 2305.18290, equation 7), max(0, 1 - β h) the hinge of SLiC and of
    statistical rejection sampling (arXiv 2309.06657, equation 11), and (h - 1 / 2β)² IPO (arXiv 2310.12036, equation
    17), there with logs divided by the number of their answer's tokens, as trl takes them.

    Args:
        reference: the reference model's log-likelihoods (examples, 2) of chosen and rejected answers.
    """

    loss: PreferenceLoss
    beta: float
    reference: Tensor
    statistics: ClassVar[tuple[str, ...]] = ("preference_accuracy", "preference_margin")

    def weight(self, batch: Batch) -> int:
        assert batch.examples is not None
        return int((batch.examples >= 0).sum())

    def __call__(self, model: OpenELM, rows: Rows) -> tuple[Tensor, Tensor]:
        """Return the sums; the statistics are how many pairs have h > 0, and β h."""
        assert rows.examples is not None
        own, lengths = answer_log_likelihoods(model, rows)
        there = rows.examples >= 0
        reference = self.reference.to(own.device, own.dtype)[rows.examples[there]]  # (pairs, 2)
        ratios = own[there] - reference
        losses = self._losses(_difference(ratios / lengths[there] if self.loss == "ipo" else ratios))
        margins = self.beta * _difference(ratios.detach())
        sums = torch.stack([losses.detach().sum(), (margins > 0).to(margins.dtype).sum(), margins.sum()])
        return losses.sum(), sums

    def _losses(self, preferred: Tensor) -> Tensor:
        if self.loss == "sigmoid":
            return -F.logsigmoid(self.beta * preferred)
        if self.loss == "hinge":
            return torch.relu(1 - self.beta * preferred)
        return (preferred - 1 / (2 * self.beta)).square()


def _difference(ratios: Tensor) -> Tensor:
    return ratios[:, 0] - ratios[:, 1]


def answer_log_likelihoods(model: OpenELM, rows: Rows) -> tuple[Tensor, Tensor]:
    """Return the log-likelihoods in nats, and the numbers of tokens, of chosen and rejected answers: (B, P, 2) each."""
    assert rows.examples is not None
    hidden = model.hidden(rows.inputs, documents=rows.visible)
    learned = rows.targets != -100
    values = linear_log_likelihoods(hidden[learned], model.head_parts, rows.targets[learned])
    count, pairs = rows.examples.shape
    row = torch.arange(count, device=learned.device)[:, None].expand_as(learned)[learned]
    answers = row * (2 * pairs) + rows.documents[learned]
    sums = values.new_zeros(count * 2 * pairs).index_add(0, answers, values)
    tokens = torch.bincount(answers, minlength=count * 2 * pairs).to(values.dtype)
    return sums.view(count, pairs, 2), tokens.view(count, pairs, 2)
