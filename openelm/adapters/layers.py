"""peft's layers around our modules: its parameters under its names, with products that keep little."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Embedding as PeftEmbedding
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

from openelm.kernels.adapted import adapted_linear, row_norms
from openelm.kernels.cross_entropy import AdaptedHead
from openelm.kernels.linear import linear
from openelm.model.quantized import QuantizedMatrix

NAME = "default"
"""What peft calls the only adapter of a model."""


def base_matrix(base: Any) -> Tensor:
    """Return the matrix of a module that is adapted; a quantised one's until this thread asks for another."""
    weight: Tensor = base.momentary() if isinstance(base, QuantizedMatrix) else base.weight
    return weight


class Magnitude(nn.Module):
    """DoRA's learned lengths, in a module as peft has them."""

    def __init__(self, lengths: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(lengths)


class AdaptedLinear(PeftLinear):
    """A projection with an adapter."""

    @property
    def draws(self) -> bool:
        """Whether the next product drops numbers at random."""
        return self.training and self.dropout > 0

    @property
    def dropout(self) -> float:
        return float(getattr(self.lora_dropout[NAME], "p", 0.0))

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r)."""
        return self.lora_A[NAME].weight, self.lora_B[NAME].weight

    @property
    def magnitude(self) -> Tensor | None:
        """DoRA's (out,)."""
        return self.lora_magnitude_vector[NAME].weight if NAME in self.lora_magnitude_vector else None

    def forward(self, x: Tensor) -> Tensor:
        return self._product(x, multiplies=True)

    def keep_operands(self, x: Tensor) -> Tensor:
        """Keep what `forward` keeps for the backward pass, without the product."""
        return self._product(x, multiplies=False)

    def _product(self, x: Tensor, *, multiplies: bool) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        scale, base = self.scaling[NAME], self.base_layer
        return adapted_linear(
            x,
            lambda: base_matrix(base),
            *self.factors,
            scale,
            self.magnitude,
            dropout=dropout,
            multiplies=multiplies,
        )

    def add_magnitude(self) -> None:
        """Make a LoRA adapter one of DoRA, which changes nothing yet."""
        lengths = row_norms(base_matrix(self.base_layer), *self.factors, self.scaling[NAME])
        self.lora_magnitude_vector[NAME] = Magnitude(lengths.detach().clone())

    def merged_matrix(self) -> Tensor:
        """Return the matrix that base and adapter stand for, in float64."""
        down, up = (factor.double() for factor in self.factors)
        whole = torch.addmm(base_matrix(self.base_layer).double(), up, down, alpha=self.scaling[NAME])
        if self.magnitude is not None:
            whole *= (self.magnitude.double() / torch.linalg.vector_norm(whole, dim=1))[:, None]
        return whole


class AdaptedEmbedding(PeftEmbedding):
    """An embedding with an adapter, which the output matrix shares where it is the embedding too.

    A is (r, V), B (D, r); DoRA's magnitudes are those of the columns, (D,), as in peft.
    """

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_embedding_A[NAME], self.lora_embedding_B[NAME]

    @property
    def magnitude(self) -> Tensor | None:
        return self.lora_magnitude_vector[NAME].weight if NAME in self.lora_magnitude_vector else None

    def forward(self, tokens: Tensor) -> Tensor:
        down, up = self.factors
        found: Tensor = self.base_layer(tokens)
        change = linear(F.embedding(tokens, down.t()), up) * self.scaling[NAME]
        return self._stretched(found + change).to(found.dtype)

    def product(self, x: Tensor) -> Tensor:
        """Multiply rows by the adapted matrix: x (..., D) -> (..., V)."""
        down, up = self.factors
        x = self._stretched(x).to(x.dtype)
        base = self.base_layer
        out = base.product(x) if isinstance(base, QuantizedMatrix) else linear(x, base.weight)
        low = linear(x.to(torch.promote_types(x.dtype, up.dtype)), up.t())
        whole: Tensor = out + linear(low, down.t()) * self.scaling[NAME]
        return whole.to(out.dtype)

    def whole_matrix(self) -> Tensor:
        """Return the adapted matrix (V, D), from which gradients reach the adapter."""
        down, up = self.factors
        base = base_matrix(self.base_layer)
        wide = torch.promote_types(base.dtype, down.dtype)
        whole = torch.addmm(base.to(wide), down.t().to(wide), up.t().to(wide), alpha=self.scaling[NAME])
        return self._stretched(whole).to(base.dtype)

    @property
    def parts(self) -> AdaptedHead | None:
        """The adapted matrix in parts; None of DoRA, which has none."""
        if self.magnitude is not None:
            return None
        (down, up), base = self.factors, self.base_layer
        weight = base.whole_matrix() if isinstance(base, QuantizedMatrix) else base.weight
        return AdaptedHead(weight, down.t(), up.t(), self.scaling[NAME])

    def _stretched(self, x: Tensor) -> Tensor:
        """Multiply columns by DoRA's factors, if it is one."""
        if self.magnitude is None:
            return x
        return x * (self.magnitude / self._column_norms())

    @torch.no_grad()
    def _column_norms(self) -> Tensor:
        down, up = self.factors
        base = base_matrix(self.base_layer)
        wide = torch.promote_types(base.dtype, down.dtype)
        whole = torch.addmm(base.to(wide), down.t(), up.t(), alpha=self.scaling[NAME])
        norms: Tensor = torch.linalg.vector_norm(whole, dim=0)
        return norms

    def add_magnitude(self) -> None:
        """Make a LoRA adapter one of DoRA, which changes nothing yet."""
        self.lora_magnitude_vector[NAME] = Magnitude(self._column_norms())

    def merged_matrix(self) -> Tensor:
        """Return the matrix that base and adapter stand for, in float64."""
        down, up = (factor.double().t() for factor in self.factors)
        whole = torch.addmm(base_matrix(self.base_layer).double(), down, up, alpha=self.scaling[NAME])
        if self.magnitude is not None:
            whole *= self.magnitude.double() / torch.linalg.vector_norm(whole, dim=0)
        return whole


Adapted = AdaptedLinear | AdaptedEmbedding
